"""The gated half of a SwiGLU MLP in whole numbers, natively (``csrc/src/nf4_linear_int8.inc``).

Both products and the activation are float32 and rounded once together. float64 has no native
kernel.
"""

from __future__ import annotations

from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _native

__all__ = ["nf4_swiglu_int8", "unsupported"]


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(x)


def nf4_swiglu_int8(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return about ``silu(x @ Wg^T) * (x @ Wu^T)``; as the reference's."""
    return _native.nf4_swiglu("lk_nf4_swiglu_int8", x, w_gate, w_up)
