"""What the native CPU side of every operation shares: tensors as the C interface takes them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.errors import BackendError
from ladder_kernels.nf4 import NF4Weight

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

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""``lk_dtype`` of each dtype that has native kernels."""

_OUT_OF_MEMORY = 2


def unsupported(x: Tensor) -> str | None:
    """Say why a call whose activations are ``x`` cannot run natively; ``None`` if it can."""
    if x.dtype not in DTYPES:
        return f"there is no native kernel for {x.dtype}"
    return native.status().reason


def library() -> ctypes.CDLL:
    """Return the native library.

    Raises:
        BackendError: There is none that can be used.
    """
    loaded = native.library()
    if loaded is None:
        raise BackendError(str(native.status().reason))
    return loaded


def check(code: int) -> None:
    """Turn an ``lk_status`` into an exception.

    Raises:
        MemoryError: There was no memory for a workspace.
        BackendError: The library refused the call.
    """
    if code == _OUT_OF_MEMORY:
        raise MemoryError("the native CPU kernels found no memory for their workspace")
    if code != 0:
        raise BackendError(f"the native CPU kernels refused a call (code {code})")


def adjacent_columns(value: Tensor) -> Tensor:
    """Return ``value`` ``[rows, columns]`` so that elements of a row are adjacent.

    Itself if they are, and rows do not overlap; else a contiguous copy.
    """
    rows, columns = value.shape
    adjacent = columns <= 1 or value.stride(1) == 1
    return value if adjacent and (rows <= 1 or value.stride(0) >= columns) else value.contiguous()


def pointer(value: Tensor | None) -> int | None:
    """Address of a tensor's first element; ``None`` for ``None``."""
    return None if value is None else value.data_ptr()


def matrix(weight: NF4Weight) -> native.NF4Matrix:
    """Return a weight ``[N, K]`` as ``lk_nf4_matrix``; it must outlive the call."""
    nested = weight.double_quant
    return native.NF4Matrix(
        weight.packed.data_ptr(),
        None if nested else weight.absmax.data_ptr(),
        weight.absmax.data_ptr() if nested else None,
        pointer(weight.nested_absmax),
        pointer(weight.nested_code),
        pointer(weight.nested_offset),
        *weight.shape,
        weight.blocksize,
    )


def dense_matrix(value: Tensor) -> native.DenseMatrix:
    """Return a matrix with adjacent columns as ``lk_dense_matrix``; it must outlive the call."""
    return native.DenseMatrix(value.data_ptr(), DTYPES[value.dtype], *value.shape, value.stride(0))
