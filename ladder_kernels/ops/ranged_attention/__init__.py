"""Attention in which every query sees a range of keys that ends at itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.ops import _checks
from ladder_kernels.ops._dispatch import call, run

__all__ = ["ranged_attention"]

_OP = "ranged_attention"


def ranged_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend to a range of keys: ``softmax(scale * q @ k^T) @ v``, query ``s`` over its range.

    Query ``s`` stands at place ``T - S + s`` among the keys and sees those from ``first[b, s]`` to
    its own place. That one number a query holds causal order, sliding windows, packed documents and
    padding at the ends; keys that nobody sees cost nothing. Not differentiable: it serves the
    frozen pass (:func:`ladder_kernels.ops.ranged_attention.reference.ranged_attention` is).

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
    _check(q, k, v)
    if first is not None:
        _checks.check_tensor(_OP, "first", first)
        _checks.check_same_device(_OP, "first", first, "q", q)
        _checks.check_shape(_OP, "first", first, (q.shape[0], q.shape[2]), "batch, queries")
        if first.dtype != torch.int64:
            raise _checks.refuse(_OP, "first", f"has dtype {first.dtype}", "it must be int64")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(_ranged_attention, q, k, v, first, scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    _checks.check_floating(_OP, "q", q)
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
    schema="(Tensor q, Tensor k, Tensor v, Tensor? first, float scale) -> Tensor",
)
def _ranged_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float
) -> Tensor:
    return run(_OP, "ranged_attention", q, k, v, first, scale)


@_ranged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty((batch, queries, heads * width))
