"""What rows of data mean, and how they become tokens and labels."""

from __future__ import annotations

FORMATS = ("auto", "text", "completion", "chat")
"""Formats of rows; "auto" chooses by the columns that there are."""
