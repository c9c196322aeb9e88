"""Attention in which every query sees a range of keys that ends at itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.ops import _checks
from ladder_kernels.ops._dispatch import call, register_autograd, run
from ladder_kernels.ops._numeric import accumulation_dtype

__all__ = ["ranged_attention"]

_OP = "ranged_attention"


def ranged_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend to a range of keys: ``softmax(scale * q @ k^T) @ v``, query ``s`` over its range.

    Query ``s`` stands at place ``T - S + s`` among the keys and sees those from ``first[b, s]`` to
    its own place. That one number a query holds causal order, sliding windows, packed documents and
    padding at the ends; keys that nobody sees cost nothing. Differentiable (once) in ``q``, ``k``
    and ``v``: the backward pass keeps those, the result and a float32 number a query and head, and
    computes scores again, block by block. Under autocast the inputs are cast to its dtype.

    Args:
        q: ``[B, H, S, hd]``, float16, bfloat16, float32 or float64; elements of a head adjacent.
        k: ``[B, Hkv, T, hd]`` as ``q``, ``T >= S``, ``H`` a multiple of ``Hkv``: query head ``h``
            reads key head ``h * Hkv // H``.
        v: As ``k``.
        first: int64 ``[B, S]``, each in ``[0, T - S + s]``; ``None`` for 0, plain causal attention.
        scale: Factor on the scores; default ``hd ** -0.5``.

    Returns:
        ``[B, S, H * hd]`` in q's dtype, as the output projection reads it.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.check_floating(_OP, name, value)
    q, k, v = (_checks.autocast(value) for value in (q, k, v))
    _check(q, k, v)
    if first is not None:
        _checks.check_tensor(_OP, "first", first)
        _checks.check_same_device(_OP, "first", first, "q", q)
        _checks.check_shape(_OP, "first", first, (q.shape[0], q.shape[2]), "batch, queries")
        if first.dtype != torch.int64:
            raise _checks.refuse(_OP, "first", f"has dtype {first.dtype}", "it must be int64")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    need_grad = torch.is_grad_enabled() and any(value.requires_grad for value in (q, k, v))
    return call(_ranged_attention, q, k, v, first, scale, need_grad)[0]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or q.shape[-1] == 0:
        raise _checks.refuse(_OP, "q", f"has shape {list(q.shape)}", "it must be [B, H, S, hd]")
    for name, value in (("k", k), ("v", v)):
        _checks.check_same_dtype(_OP, name, value, "q", q)
        _checks.check_same_device(_OP, name, value, "q", q)
    batch, heads, queries, width = q.shape
    if (
        k.dim() != 4
        or (k.shape[0], k.shape[3]) != (batch, width)
        or k.shape[1] == 0
        or heads % k.shape[1]
        or k.shape[2] < queries
    ):
        raise _checks.refuse(
            _OP,
            "k",
            f"has shape {list(k.shape)}",
            f"it must be [{batch}, a divisor of {heads}, at least {queries}, {width}]",
        )
    _checks.check_shape(_OP, "v", v, k.shape, "the shape of k")


@torch.library.custom_op(
    "ladder_kernels::ranged_attention",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? first, float scale, bool need_grad)"
        " -> (Tensor out, Tensor lse)"
    ),
)
def _ranged_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    return run(_OP, "ranged_attention", q, k, v, first, scale, need_grad)


@torch.library.custom_op(
    "ladder_kernels::ranged_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? first, float scale, Tensor out,"
        " Tensor lse) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
)
def _ranged_attention_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return run(_OP, "ranged_attention_backward", grad, *args)


@_ranged_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    dtype = accumulation_dtype(q.dtype)
    lse = q.new_empty((batch, heads, queries) if need_grad else (0,), dtype=dtype)
    return q.new_empty((batch, queries, heads * width)), lse


@_ranged_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    def by_token(value: Tensor) -> Tensor:
        batch, heads, tokens, width = value.shape
        return value.new_empty((batch, tokens, heads, width))

    return by_token(q), by_token(k), by_token(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, first, ctx.scale, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, first, out, lse)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    q, k, v, first, out, lse = ctx.saved_tensors
    grads = _ranged_attention_backward(grad, q, k, v, first, ctx.scale, out, lse)
    by_head = (
        value.transpose(1, 2) if needed else None
        for value, needed in zip(grads, ctx.needs_input_grad, strict=False)
    )
    return (*by_head, None, None, None)


register_autograd(_ranged_attention, _backward, setup_context=_setup)
