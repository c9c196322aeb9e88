"""Products with an NF4 weight in whole numbers, natively (``csrc/src/nf4_linear_int8.inc``).

The same function as ``reference.py``: the same whole numbers, blocks summed in float32 in another
order. The number of threads (``torch.get_num_threads()``) changes no bit. float64 has no native
kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _native

__all__ = ["nf4_linear_int8", "unsupported"]


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(x)


def nf4_linear_int8(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return about ``x @ W^T (+ bias) (+ residual)``; as the reference's."""
    x = _native.adjacent_columns(x)
    residual = None if residual is None else _native.adjacent_columns(residual)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((x.shape[0], weight.shape[0]))
    code = _native.library().lk_nf4_linear_int8(
        _native.matrix(weight),
        _native.DTYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        _native.pointer(bias),
        _native.pointer(residual),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    _native.check(code)
    return out
