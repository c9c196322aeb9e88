"""Every operation and backend against its rivals, on the shapes of real models."""

from __future__ import annotations

__all__ = ["SETS"]

SETS = ("quick", "default", "full")
"""Of cases; each holds those before it."""
