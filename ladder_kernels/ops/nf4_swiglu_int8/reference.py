"""The first half of a SwiGLU MLP (arXiv:2002.05202) in whole numbers, in plain PyTorch.

    y = silu(gate) * up,    gate and up as nf4_linear_int8 computes them, before its rounding

A block of rows of both weights is taken at a time, so neither half ``[M, N]`` exists as a whole.
The activation and the product are float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops._numeric import blocks
from ladder_kernels.ops.nf4_linear_int8 import reference as linear

__all__ = ["nf4_swiglu_int8"]


def nf4_swiglu_int8(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return about ``silu(x @ Wg^T) * (x @ Wu^T)``.

    Args:
        x: ``[M, K]``, floating.
        w_gate: ``[N, K]``, its rows whole numbers of blocks.
        w_up: ``[N, K]``, of the same blocksize.

    Returns:
        ``[M, N]`` in x's dtype, a new contiguous tensor.
    """
    q, steps = linear.quantize_rows(x, w_gate.blocksize)
    rows = w_gate.shape[0]
    out = x.new_empty((x.shape[0], rows))
    for start, stop in blocks(rows, linear.rows_at_a_time(x.shape[0], w_gate)):
        gate = linear.product_rows(q, steps, w_gate, start, stop)
        up = linear.product_rows(q, steps, w_up, start, stop)
        out[:, start:stop] = torch.mul(silu(gate, inplace=True), up)
    return out
