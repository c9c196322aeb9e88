"""A frozen NF4 layer and its low-rank adapter as one differentiable function.

``y = x W^T + bias + scale * (x A^T) B^T`` of a model in 16 bits whose adapters are float32, as PEFT
keeps them. Written with separate operations, ``x`` is copied to float32 and kept so for the
gradient of ``A``, once for each layer that reads it, and what the adapter adds passes through
memory several times. Here ``x`` is kept as it is, and the sum is the frozen product's own. Native
kernels read and write what is wide in its own dtype; without them, wide float32 numbers exist for a
block of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ladder_kernels.backend import get_backend, use_backend
from ladder_kernels.native import low_rank
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.cpu import is_chosen
from ladder_kernels.ops import nf4_linear
from ladder_kernels.ops._numeric import flatten_rows
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


def _blocks(read: Tensor, made: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Pieces of the rows of both whose copies in ``dtype`` are small."""
    count = step = read.shape[0]
    if made.dtype != dtype and made.device.type == "cpu":
        step = max(1, _BLOCK // max(1, read.shape[1], made.shape[1]))
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
        read = flatten_rows(x if seen is None else seen)
        ctx.native = a.dtype == torch.float32 and is_chosen(x, x.dtype, name="adapted_linear")
        add = _add_natively if ctx.native else _add
        narrow, added = add(read, a, (b * scale).t(), x.dtype)
        ctx.save_for_backward(x, seen, a, b, narrow)
        ctx.scale, ctx.weight, ctx.backend = scale, weight, get_backend()
        return nf4_linear(x, weight, bias, added.view(*x.shape[:-1], b.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with use_backend(ctx.backend):
            return (_differentiable_backward if torch.is_grad_enabled() else _backward)(ctx, *grads)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: recomputed ones are given out no second time
    x, seen = saved[:2]
    grad = flatten_rows(grad_out)
    grad_x = nf4_linear_transposed(grad, ctx.weight) if ctx.needs_input_grad[0] else None
    gradients = _gradients_natively if ctx.native else _gradients
    grad_seen, grad_a, grad_b = gradients(ctx, saved, grad, grad_x)
    return (
        None if grad_x is None else grad_x.view(x.shape),
        None if grad_seen is None else grad_seen.view(seen.shape),
        grad_a,
        grad_b,
        grad.sum(0) if ctx.needs_input_grad[4] else None,
        None,
        None,
    )


def _add(read: Tensor, a: Tensor, scaled: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``read A^T``, and that times ``scaled`` ``[r, N]`` in ``dtype``."""
    narrow = a.new_empty((read.shape[0], a.shape[0]))
    added = a.new_empty((read.shape[0], scaled.shape[1]), dtype=dtype)
    for block in _blocks(read, added, a.dtype):
        torch.mm(read[block].to(a.dtype), a.t(), out=narrow[block])
        added[block] = torch.mm(narrow[block], scaled)
    return narrow, added


def _add_natively(
    read: Tensor, a: Tensor, scaled: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    narrow = low_rank.narrow(read, a)
    return narrow, low_rank.widen(narrow, scaled, dtype)


def _gradients(
    ctx: Any, saved: tuple[Any, ...], grad: Tensor, grad_x: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of ``seen``, ``a`` and ``b``; without ``seen``, its part is added to ``grad_x``."""
    x, seen, a, b, narrow = saved
    _, need_seen, need_a, need_b, *_ = ctx.needs_input_grad
    read = flatten_rows(x if seen is None else seen)
    grad_seen = torch.empty_like(read) if need_seen else None
    grad_a = torch.zeros_like(a) if need_a else None
    grad_b = torch.zeros_like(b) if need_b else None
    scaled = b * ctx.scale
    for block in _blocks(read, grad, a.dtype):
        wide = grad[block].to(a.dtype)
        grad_narrow = wide @ scaled
        if grad_b is not None:
            grad_b.addmm_(wide.t(), narrow[block], alpha=ctx.scale)
        if grad_a is not None:
            grad_a.addmm_(grad_narrow.t(), read[block].to(a.dtype))
        if grad_seen is not None:
            torch.mm(grad_narrow, a, out=grad_seen[block])
        elif seen is None and grad_x is not None and grad_x.dtype == a.dtype:
            grad_x[block].addmm_(grad_narrow, a)
        elif seen is None and grad_x is not None:
            grad_x[block] += grad_narrow @ a
    return grad_seen, grad_a, grad_b


def _gradients_natively(
    ctx: Any, saved: tuple[Any, ...], grad: Tensor, grad_x: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, seen, a, b, narrow = saved
    _, need_seen, need_a, need_b, *_ = ctx.needs_input_grad
    read = flatten_rows(x if seen is None else seen)
    grad_narrow = low_rank.narrow(grad, (b * ctx.scale).t())
    if seen is None and grad_x is not None:
        low_rank.widen_onto(grad_x, grad_narrow, a)
    grad_b = low_rank.gradient(narrow, grad).t().contiguous() if need_b else None
    return (
        low_rank.widen(grad_narrow, a, a.dtype) if need_seen else None,
        low_rank.gradient(grad_narrow, read) if need_a else None,
        None if grad_b is None else grad_b.mul_(ctx.scale),
    )


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The same with operations that have a gradient, and no blocks."""
    x, seen, a, b, _ = ctx.saved_tensors
    read = flatten_rows(x if seen is None else seen).to(a.dtype)
    wide = flatten_rows(grad).to(a.dtype)
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
        flatten_rows(grad).sum(0) if ctx.needs_input_grad[4] else None,
        None,
        None,
    )
