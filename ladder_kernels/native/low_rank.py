"""The products of low-rank adapters on the native CPU kernels (``csrc/src/low_rank.inc``).

What is wide is read and written in its own dtype (float32, bfloat16 or float16), what is narrow is
float32, and so are the sums. The number of threads (``torch.get_num_threads()``) changes no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.native.tensors import DTYPES, adjacent_columns, check, library

__all__ = ["gradient", "narrow", "widen", "widen_onto"]


def narrow(x: Tensor, p: Tensor) -> Tensor:
    """Return ``x @ p^T``.

    Args:
        x: ``[M, K]``.
        p: ``[r, K]``, float32.

    Returns:
        ``[M, r]``, float32.
    """
    x, p = adjacent_columns(x), p.contiguous()
    rows, cols = x.shape
    out = p.new_empty((rows, p.shape[0]))
    code = library().lk_low_rank_narrow(
        *(DTYPES[x.dtype], rows, cols, p.shape[0], x.data_ptr(), x.stride(0)),
        *(p.data_ptr(), out.data_ptr(), torch.get_num_threads()),
    )
    check(code)
    return out


def widen(values: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values @ p``, rounded once.

    Args:
        values: ``[M, r]``, float32.
        p: ``[r, K]``, float32.
        dtype: Of the result.

    Returns:
        ``[M, K]``.
    """
    out = torch.empty((values.shape[0], p.shape[1]), dtype=dtype, device="cpu")
    _widen(values, p, out, add=False)
    return out


def widen_onto(out: Tensor, values: Tensor, p: Tensor) -> None:
    """Add ``values @ p`` to ``out`` where it is; each sum is rounded once.

    Args:
        out: ``[M, K]``, contiguous.
        values: ``[M, r]``, float32.
        p: ``[r, K]``, float32.
    """
    _widen(values, p, out, add=True)


def _widen(values: Tensor, p: Tensor, out: Tensor, *, add: bool) -> None:
    values, p = values.contiguous(), p.contiguous()
    code = library().lk_low_rank_widen(
        *(DTYPES[out.dtype], *out.shape, p.shape[0]),
        *(values.data_ptr(), p.data_ptr(), int(add), out.data_ptr(), torch.get_num_threads()),
    )
    check(code)


def gradient(values: Tensor, x: Tensor) -> Tensor:
    """Return ``values^T @ x``.

    Args:
        values: ``[M, r]``, float32.
        x: ``[M, K]``.

    Returns:
        ``[r, K]``, float32.
    """
    values, x = values.contiguous(), adjacent_columns(x)
    rows, cols = x.shape
    out = values.new_empty((values.shape[1], cols))
    code = library().lk_low_rank_gradient(
        *(DTYPES[x.dtype], rows, cols, values.shape[1]),
        *(values.data_ptr(), x.data_ptr(), x.stride(0), out.data_ptr(), torch.get_num_threads()),
    )
    check(code)
    return out
