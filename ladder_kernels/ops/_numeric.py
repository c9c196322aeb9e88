"""Small numerical helpers that several reference implementations share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "blocks", "flatten_rows"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive blocks of at most ``size`` that cover ``total``."""
    for start in range(0, total, size):
        yield start, min(start + size, total)


def flatten_rows(value: Tensor) -> Tensor:
    """View or copy ``[..., D]`` as ``[rows, D]``, also when it is empty."""
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1])
