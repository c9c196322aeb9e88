"""Tensors as the C interface takes them, and its status codes as exceptions."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.errors import BackendError

if TYPE_CHECKING:
    from ladder_kernels.nf4 import NF4Weight

__all__ = ["DTYPES", "NOT_FINITE", "adjacent_columns", "check", "library", "matrix", "pointer"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""``lk_dtype`` of each dtype that has native kernels."""

NOT_FINITE = 4
"""``LK_NOT_FINITE``: an input that must be finite is not."""

_OUT_OF_MEMORY = 2


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


def pointer(value: Tensor | None) -> int | None:
    """Address of a tensor's first element; ``None`` for ``None``."""
    return None if value is None else value.data_ptr()


def adjacent_columns(value: Tensor) -> Tensor:
    """Return ``value`` ``[rows, columns]`` so that elements of a row are adjacent.

    Itself if they are, and rows do not overlap; else a contiguous copy.
    """
    rows, columns = value.shape
    adjacent = columns <= 1 or value.stride(1) == 1
    return value if adjacent and (rows <= 1 or value.stride(0) >= columns) else value.contiguous()


def matrix(weight: NF4Weight, shape: tuple[int, int] | None = None) -> native.NF4Matrix:
    """Return a weight as ``lk_nf4_matrix``; it must outlive the call.

    Args:
        weight: ``[N, K]``, or any if ``shape`` is given.
        shape: Rows and columns to take it for, where these are not its own.
    """
    nested = weight.double_quant
    return native.NF4Matrix(
        weight.packed.data_ptr(),
        None if nested else weight.absmax.data_ptr(),
        weight.absmax.data_ptr() if nested else None,
        pointer(weight.nested_absmax),
        pointer(weight.nested_code),
        pointer(weight.nested_offset),
        *(weight.shape if shape is None else shape),
        weight.blocksize,
    )
