"""Products with an NF4 weight on the native CPU kernels (``csrc/src/nf4_linear.inc``).

The same functions as ``reference.py``. Sums are float32 whatever x's dtype, bias and residual are
added before the only rounding, and the number of threads (``torch.get_num_threads()``) changes no
bit. float64 has no native kernel.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.errors import BackendError
from ladder_kernels.nf4 import NF4Weight

__all__ = ["nf4_linear", "nf4_linear_transposed", "unsupported"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run natively; ``None`` if it can."""
    if x.dtype not in _DTYPES:
        return f"it has no native kernel for {x.dtype}"
    return native.status().reason


def nf4_linear(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return ``x @ W^T (+ bias) (+ residual)``; as the reference's."""
    x = _with_adjacent_columns(x)
    residual = None if residual is None else _with_adjacent_columns(residual)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _check(
        _library().lk_nf4_linear(
            _matrix(weight),
            _DTYPES[x.dtype],
            x.shape[0],
            x.data_ptr(),
            x.stride(0),
            _pointer(bias),
            _pointer(residual),
            0 if residual is None else residual.stride(0),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def nf4_linear_transposed(grad: Tensor, weight: NF4Weight) -> Tensor:
    """Return ``grad @ W``; as the reference's."""
    grad = _with_adjacent_columns(grad)
    out = grad.new_empty((grad.shape[0], weight.shape[1]))
    _check(
        _library().lk_nf4_linear_transposed(
            _matrix(weight),
            _DTYPES[grad.dtype],
            grad.shape[0],
            grad.data_ptr(),
            grad.stride(0),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def _library() -> ctypes.CDLL:
    loaded = native.library()
    if loaded is None:
        raise BackendError(str(native.status().reason))
    return loaded


def _with_adjacent_columns(value: Tensor) -> Tensor:
    """The matrix itself if its rows lie one after another, overlapping nowhere; else a copy."""
    rows, columns = value.shape
    adjacent = columns <= 1 or value.stride(1) == 1
    return value if adjacent and (rows <= 1 or value.stride(0) >= columns) else value.contiguous()


def _pointer(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def _matrix(weight: NF4Weight) -> native.NF4Matrix:
    nested = weight.double_quant
    return native.NF4Matrix(
        weight.packed.data_ptr(),
        None if nested else weight.absmax.data_ptr(),
        weight.absmax.data_ptr() if nested else None,
        _pointer(weight.nested_absmax),
        _pointer(weight.nested_code),
        _pointer(weight.nested_offset),
        *weight.shape,
        weight.blocksize,
    )


def _check(code: int) -> None:
    if code == 2:
        raise MemoryError("the native CPU kernels found no memory for their workspace")
    if code != 0:
        raise BackendError(f"the native CPU kernels refused a call (code {code})")
