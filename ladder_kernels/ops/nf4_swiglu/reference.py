"""The first half of a SwiGLU MLP with NF4 weights (Shazeer 2020, arXiv:2002.05202), in PyTorch.

    gate = x @ Wg^T      up = x @ Wu^T      y = silu(gate) * up

A block of rows of both weights is dequantised at a time (the blocks of ``nf4_linear``), so neither
half ``[M, N]`` exists as a whole and the workspace does not grow with N. Each step is rounded to
x's dtype, as the plain expression does.

The gradient to x, with ``s = sigmoid(gate)`` and ``e`` the gradient of ``y``,

    dx = (e * up * s * (1 + gate * (1 - s))) @ Wg  +  (e * gate * s) @ Wu

computes ``gate`` and ``up`` again, block by block, and adds blocks in float32 (float64 for
float64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops._numeric import accumulation_dtype
from ladder_kernels.ops.nf4_linear.reference import row_blocks

__all__ = ["nf4_swiglu", "nf4_swiglu_backward"]


def nf4_swiglu(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return ``silu(x @ Wg^T) * (x @ Wu^T)``.

    Args:
        x: ``[M, K]``, floating.
        w_gate: ``[N, K]``.
        w_up: ``[N, K]``.

    Returns:
        ``[M, N]`` in x's dtype, a new contiguous tensor.
    """
    out = x.new_empty((x.shape[0], w_gate.shape[0]))
    for start, stop in row_blocks(w_gate):
        gate = silu(x @ w_gate.dequantize_rows(start, stop, x.dtype).t(), inplace=True)
        up = x @ w_up.dequantize_rows(start, stop, x.dtype).t()
        torch.mul(gate, up, out=out[:, start:stop])
    return out


def nf4_swiglu_backward(grad: Tensor, x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return the gradient to ``x`` ``[M, K]`` from ``grad`` ``[M, N]``, in x's dtype."""
    dtype = accumulation_dtype(x.dtype)
    total = x.new_zeros(x.shape, dtype=dtype)
    for start, stop in row_blocks(w_gate):
        gate_rows = w_gate.dequantize_rows(start, stop, x.dtype)
        up_rows = w_up.dequantize_rows(start, stop, x.dtype)
        gate = (x @ gate_rows.t()).to(dtype)
        up = (x @ up_rows.t()).to(dtype)
        sigmoid = gate.sigmoid()
        along = grad[:, start:stop].to(dtype)
        dup = along * gate * sigmoid
        dgate = along * up * sigmoid * (1 + gate * (1 - sigmoid))
        total += dgate.to(x.dtype) @ gate_rows
        total += dup.to(x.dtype) @ up_rows
    return total.to(x.dtype)
