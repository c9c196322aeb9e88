"""The gated half of a SwiGLU MLP on the native CPU kernels (``csrc/src/nf4_swiglu.inc``).

Both products and the activation are float32 and rounded once together. The backward pass computes
both products again, some rows of x at a time, so that its workspace does not grow with M, and
rounds the sum of the gradients through both once. float64 has no native kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _native
from ladder_kernels.ops._numeric import blocks
from ladder_kernels.ops.nf4_linear import cpu as linear

__all__ = ["nf4_swiglu", "nf4_swiglu_backward", "unsupported"]

_BACKWARD_NUMBERS = 1 << 21
"""Numbers of each of the backward's [rows of x, N] temporaries."""


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(x)


def nf4_swiglu(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return ``silu(x @ Wg^T) * (x @ Wu^T)``; as the reference's."""
    return _native.nf4_swiglu("lk_nf4_swiglu", x, w_gate, w_up)


def nf4_swiglu_backward(grad: Tensor, x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return the gradient to ``x`` ``[M, K]`` from ``grad`` ``[M, N]``; as the reference's."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = w_gate.shape[0]
    tokens = max(64, _BACKWARD_NUMBERS // max(1, width))
    for start, stop in blocks(x.shape[0], tokens):
        rows = x[start:stop]
        gate = linear.nf4_linear(rows, w_gate).float()
        up = linear.nf4_linear(rows, w_up).float()
        sigmoid = gate.sigmoid()
        along = grad[start:stop].float() * sigmoid
        both = x.new_empty((stop - start, 2 * width))
        torch.mul(along, gate, out=both[:, width:])
        slope = gate.mul_(1 - sigmoid).add_(1)  # of silu, over the sigmoid
        torch.mul(along.mul_(up), slope, out=both[:, :width])
        out[start:stop] = linear.nf4_linear_transposed(both, w_gate, w_up)
    return out
