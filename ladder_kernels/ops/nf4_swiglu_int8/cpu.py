"""The gated half of a SwiGLU MLP in whole numbers, natively (``csrc/src/nf4_linear_int8.inc``).

Both products and the activation are float32 and rounded once together. float64 has no native
kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _native

__all__ = ["nf4_swiglu_int8", "unsupported"]


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(x)


def nf4_swiglu_int8(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return about ``silu(x @ Wg^T) * (x @ Wu^T)``; as the reference's."""
    x = _native.adjacent_columns(x)
    out = x.new_empty((x.shape[0], w_gate.shape[0]))
    code = _native.library().lk_nf4_swiglu_int8(
        _native.matrix(w_gate),
        _native.matrix(w_up),
        _native.DTYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    _native.check(code)
    return out
