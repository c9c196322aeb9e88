"""A frozen NF4 layer and its low-rank adapter as one differentiable function.

``y = x W^T + bias + scale * (x A^T) B^T`` of a model in 16 bits whose adapters are float32, as PEFT
keeps them. Written with separate operations, ``x`` is copied to float32 and kept so for the
gradient of ``A``, once for each layer that reads it, and what the adapter adds passes through
memory several times. Here ``x`` is kept as it is, wide numbers exist for a block of tokens at a
time, and the sum is the product's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import nf4_linear
from ladder_kernels.ops.nf4_linear import nf4_linear_transposed

__all__ = ["adapted_linear"]

# Of a float32 copy that stays in a processor's cache between the products that read it.
_BLOCK = 1 << 18  # numbers


def adapted_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    seen: Tensor | None = None,
) -> Tensor:
    """Compute ``x W^T (+ bias) + scale * (x A^T) B^T``, the second product in the dtype of ``a``.

    LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3) on a frozen weight. Differentiable in every
    floating argument, any number of times.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32.
        weight: ``[N, K]``.
        bias: ``[N]`` in x's dtype, or ``None``.
        a: ``[r, K]``, floating.
        b: ``[N, r]`` as ``a``.
        scale: LoRA writes it ``alpha / r``.
        seen: ``[..., K]`` in the dtype of ``a``: what the adapter sees instead of ``x``, for
            dropout.

    Returns:
        ``[..., N]`` in x's dtype; what the adapter adds is rounded to that, and then the sum.

    Raises:
        ConfigError: ``x``, ``weight`` and ``bias`` do not fit each other, see :func:`nf4_linear`.
    """
    return _AdaptedLinear.apply(x, seen, a, b, bias, scale, weight)  # type: ignore[return-value]


def _blocks(rows: Tensor, width: int, dtype: torch.dtype) -> Iterator[slice]:
    """Pieces of ``rows`` whose copies in ``dtype``, ``width`` numbers a row, are small."""
    count = rows.shape[0]
    step = count
    if rows.dtype != dtype and rows.device.type == "cpu":
        step = max(1, _BLOCK // max(1, width))
    for start in range(0, count, max(1, step)):
        yield slice(start, min(count, start + step))


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seen: Tensor | None,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
        weight: NF4Weight,
    ) -> Tensor:
        rows = x.flatten(0, -2)
        read = rows if seen is None else seen.flatten(0, -2)
        narrow = a.new_empty((rows.shape[0], a.shape[0]))
        added = rows.new_empty((rows.shape[0], b.shape[0]))
        scaled = (b * scale).t()
        for block in _blocks(rows, max(weight.shape), a.dtype):
            torch.mm(read[block].to(a.dtype), a.t(), out=narrow[block])
            added[block] = torch.mm(narrow[block], scaled)
        ctx.save_for_backward(x, seen, a, b, narrow)
        ctx.scale, ctx.weight = scale, weight
        return nf4_linear(x, weight, bias, added.view(*x.shape[:-1], b.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grads[0])
        x, seen, a, b, narrow = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        rows = x.flatten(0, -2)
        read = rows if seen is None else seen.flatten(0, -2)
        need_x, need_seen, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
        grad_x = nf4_linear_transposed(grad, ctx.weight) if need_x else None
        # Where the gradient of what the adapter saw goes.
        grad_read = grad_x if seen is None else torch.empty_like(read) if need_seen else None
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        scaled = b * ctx.scale
        for block in _blocks(rows, max(ctx.weight.shape), a.dtype):
            wide = grad[block].to(a.dtype)
            grad_narrow = wide @ scaled
            if need_b:
                grad_b.addmm_(wide.t(), narrow[block], alpha=ctx.scale)
            if need_a:
                grad_a.addmm_(grad_narrow.t(), read[block].to(a.dtype))
            if seen is not None and grad_read is not None:
                torch.mm(grad_narrow, a, out=grad_read[block])
            elif grad_read is not None and grad_read.dtype == a.dtype:
                grad_read[block].addmm_(grad_narrow, a)
            elif grad_read is not None:
                grad_read[block] += grad_narrow @ a
        return (
            None if grad_x is None else grad_x.view(x.shape),
            None if seen is None or grad_read is None else grad_read.view(seen.shape),
            grad_a if need_a else None,
            grad_b if need_b else None,
            grad.sum(0) if need_bias else None,
            None,
            None,
        )


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The same with operations that have a gradient, and no blocks."""
    x, seen, a, b, _ = ctx.saved_tensors
    read = (x if seen is None else seen).flatten(0, -2).to(a.dtype)
    wide = grad.flatten(0, -2).to(a.dtype)
    grad_narrow = ctx.scale * (wide @ b)
    grad_x = nf4_linear_transposed(grad, ctx.weight)
    grad_read = (grad_narrow @ a).view(x.shape)
    if seen is None:
        grad_x = grad_x + grad_read.to(x.dtype)
    return (
        grad_x,
        None if seen is None else grad_read,
        grad_narrow.t() @ read,
        ctx.scale * (wide.t() @ (read @ a.t())),
        grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None,
        None,
        None,
    )
