"""Products with an NF4 weight ``W`` ``[N, K]``, in plain PyTorch.

    nf4_linear(x)               = x @ W^T (+ bias) (+ residual)
    nf4_linear_transposed(grad) = grad @ W                          the gradient to x of the former

``W`` is dequantised to x's dtype (centroid times scale in float32, rounded once), a block of rows
at a time: at most ``BLOCK_NUMBERS`` numbers, or one row if a row is longer. A dequantised copy of
the whole weight never exists unless it fits in one block. Both are ordinary products of x's dtype;
the residual is added to the rounded product, as ``F.linear(x, W, bias) + residual`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops._numeric import accumulation_dtype, blocks

__all__ = ["BLOCK_NUMBERS", "nf4_linear", "nf4_linear_transposed", "row_blocks"]

BLOCK_NUMBERS = 1 << 20
"""Numbers of a weight that are dequantised at a time."""


def row_blocks(weight: NF4Weight) -> list[tuple[int, int]]:
    """Return (start, stop) of the blocks of rows in which ``weight`` is dequantised."""
    rows, columns = weight.shape
    return list(blocks(rows, max(1, BLOCK_NUMBERS // max(1, columns))))


def nf4_linear(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return ``x @ W^T (+ bias) (+ residual)``.

    Args:
        x: ``[M, K]``, floating.
        weight: ``[N, K]``.
        bias: ``[N]`` in x's dtype, or ``None``.
        residual: ``[M, N]`` in x's dtype, or ``None``.

    Returns:
        ``[M, N]`` in x's dtype, a new contiguous tensor.
    """
    out = x.new_empty((x.shape[0], weight.shape[0]))
    for start, stop in row_blocks(weight):
        rows = weight.dequantize_rows(start, stop, x.dtype).t()
        if bias is None:
            torch.mm(x, rows, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, rows, out=out[:, start:stop])
    return out if residual is None else out.add_(residual)


def nf4_linear_transposed(grad: Tensor, weight: NF4Weight) -> Tensor:
    """Return ``grad @ W``: ``[M, N]`` to ``[M, K]`` in grad's dtype, a new contiguous tensor.

    Partial sums of several blocks are added in float32 (float64 for float64).
    """
    parts = row_blocks(weight)
    if len(parts) == 1:
        return grad @ weight.dequantize_rows(*parts[0], grad.dtype)
    total = grad.new_zeros((grad.shape[0], weight.shape[1]), dtype=accumulation_dtype(grad.dtype))
    for start, stop in parts:
        total += grad[:, start:stop] @ weight.dequantize_rows(start, stop, grad.dtype)
    return total.to(grad.dtype)
