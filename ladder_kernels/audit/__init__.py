"""Proof of the Triton kernels without a GPU."""

from __future__ import annotations

from ladder_kernels.audit.interpreter import interpreting

__all__ = ["interpreting"]
