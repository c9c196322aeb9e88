"""What the native CPU side of every operation shares: tensors as the C interface takes them."""

from __future__ import annotations

from torch import Tensor

from ladder_kernels import native
from ladder_kernels.native.tensors import DTYPES, check, library, matrix, pointer

__all__ = [
    "DTYPES",
    "adjacent_columns",
    "check",
    "dense_matrix",
    "library",
    "matrix",
    "pointer",
    "unsupported",
]


def unsupported(x: Tensor) -> str | None:
    """Say why a call whose activations are ``x`` cannot run natively; ``None`` if it can."""
    if x.dtype not in DTYPES:
        return f"there is no native kernel for {x.dtype}"
    return native.status().reason


def adjacent_columns(value: Tensor) -> Tensor:
    """Return ``value`` ``[rows, columns]`` so that elements of a row are adjacent.

    Itself if they are, and rows do not overlap; else a contiguous copy.
    """
    rows, columns = value.shape
    adjacent = columns <= 1 or value.stride(1) == 1
    return value if adjacent and (rows <= 1 or value.stride(0) >= columns) else value.contiguous()


def dense_matrix(value: Tensor) -> native.DenseMatrix:
    """Return a matrix with adjacent columns as ``lk_dense_matrix``; it must outlive the call."""
    return native.DenseMatrix(value.data_ptr(), DTYPES[value.dtype], *value.shape, value.stride(0))
