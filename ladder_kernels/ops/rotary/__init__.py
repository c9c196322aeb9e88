"""Rotary position embeddings: what a backbone does to queries and keys.

In place for the frozen pass, and differentiable for the layers above a re-entry. Turning is
orthogonal, so the gradient is the gradient turned back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.ops import _checks
from ladder_kernels.ops._dispatch import call, register_autograd, run

__all__ = ["rotary", "rotary_"]

_OP = "rotary_"


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn each head of queries and keys by its token's position, in place.

    Channel ``i`` turns with channel ``i + hd / 2`` (RoFormer, arXiv:2104.09864, in the layout of
    llama); each product and sum is rounded to q's dtype, exactly as in transformers. Not
    differentiable: it serves the frozen pass.

    Args:
        q: ``[B, S, H, hd]``, float16, bfloat16, float32 or float64, ``hd`` even; overwritten.
        k: ``[B, S, Hkv, hd]`` in q's dtype; overwritten. It may not overlap ``q``.
        cos: Cosines of the angles, ``[B or 1, S, 1, hd / 2]`` in q's dtype.
        sin: Sines, as ``cos``.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    _check(_OP, q, k, cos, sin)
    call(_rotary, q, k, cos, sin)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each head of queries and keys by its token's position, by the bits of :func:`rotary_`.

    Args:
        q: ``[B, S, H, hd]``, float16, bfloat16, float32 or float64, ``hd`` even.
        k: ``[B, S, Hkv, hd]`` in q's dtype.
        cos: Cosines, ``[B or 1, S, 1, hd / 2]`` in q's dtype; constants.
        sin: Sines, as ``cos``.

    Returns:
        The turned ``q`` and ``k``, differentiable in both.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    _check("rotary", q, k, cos, sin)
    return _turned(q, k, cos, sin)


def _check(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    _checks.check_floating(op, "q", q)
    if q.dim() != 4 or q.shape[-1] % 2:
        raise _checks.refuse(
            op, "q", f"has shape {list(q.shape)}", "it must be [B, S, H, hd], hd even"
        )
    batch, length, _, width = q.shape
    for name, value in (("k", k), ("cos", cos), ("sin", sin)):
        _checks.check_same_dtype(op, name, value, "q", q)
        _checks.check_same_device(op, name, value, "q", q)
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, length, width):
        raise _checks.refuse(
            op,
            "k",
            f"has shape {list(k.shape)}",
            f"it must be [{batch}, {length}, 'Hkv', {width}]",
        )
    rows = 1 if cos.dim() > 0 and cos.shape[0] == 1 else batch
    _checks.check_shape(op, "cos", cos, (rows, length, 1, width // 2), "B or 1, S, 1, hd / 2")
    _checks.check_shape(op, "sin", sin, cos.shape, "the shape of cos")


@torch.library.custom_op(
    "ladder_kernels::rotary_",
    mutates_args=("q", "k"),
    schema="(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()",
)
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    run("rotary", "rotary_", q, k, cos, sin)


@_rotary.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


@torch.library.custom_op(
    "ladder_kernels::rotary",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
)
def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    out = (
        q.clone(memory_format=torch.contiguous_format),
        k.clone(memory_format=torch.contiguous_format),
    )
    run("rotary", "rotary_", *out, cos, sin)
    return out


@_turned.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return (*_turned(grad_q, grad_k, cos, -sin), None, None)


register_autograd(_turned, _backward, setup_context=_setup)
