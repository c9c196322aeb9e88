"""Products with an NF4 weight in whole numbers, natively (``csrc/src/nf4_linear_int8.inc``).

The same function as ``reference.py``: the same whole numbers, blocks summed in float32 in another
order. The number of threads (``torch.get_num_threads()``) changes no bit. float64 has no native
kernel.
"""

from __future__ import annotations

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
    return _native.nf4_linear("lk_nf4_linear_int8", x, weight, bias, residual)
