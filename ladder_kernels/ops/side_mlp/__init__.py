"""The gated MLP of a side block with its norm and its residual, in one op.

For those who build side networks of their own. Made for narrow streams: on a GPU one program holds
whole rows of it, and what is inside the MLP is never in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.ops import _checks
from ladder_kernels.ops._dispatch import call, register_autograd, run

__all__ = ["side_mlp"]

_OP = "side_mlp"


def side_mlp(
    u: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float = 1e-6
) -> Tensor:
    """Return ``u + (silu(x @ gate^T) * (x @ up^T)) @ down^T``, ``x = rms_norm(u, norm_weight)``.

    Differentiable (once) in every tensor. Only they are kept for the backward pass: what is inside
    is computed again there. Under autocast all of them are cast to its dtype.

    Args:
        u: the side stream ``[..., d]``, float16, bfloat16, float32 or float64.
        norm_weight: ``[d]`` in u's dtype.
        gate: ``[m, d]`` in u's dtype.
        up: ``[m, d]``, as ``gate``.
        down: ``[d, m]`` in u's dtype.
        eps: added to the mean square of a row.

    Returns:
        ``[..., d]`` in u's dtype.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    _checks.check_floating(_OP, "u", u)
    if u.dim() == 0:
        raise _checks.refuse(_OP, "u", "has no dimension", "it must be [..., d]")
    _checks.check_floating(_OP, "gate", gate)
    if gate.dim() != 2:
        raise _checks.refuse(_OP, "gate", f"has shape {list(gate.shape)}", "it must be [m, d]")
    d, m = u.shape[-1], gate.shape[0]
    u = _checks.autocast(u)
    weights = []
    for name, value, shape, why in (
        ("norm_weight", norm_weight, (d,), "the last dimension of u"),
        ("gate", gate, (m, d), "m of its own, d of u"),
        ("up", up, (m, d), "the shape of gate"),
        ("down", down, (d, m), "the shape of gate, transposed"),
    ):
        _checks.check_floating(_OP, name, value)
        cast = _checks.autocast(value)
        _checks.check_same_dtype(_OP, name, cast, "u", u)
        _checks.check_same_device(_OP, name, cast, "u", u)
        _checks.check_shape(_OP, name, cast, shape, why)
        weights.append(cast)
    return call(_side_mlp, u, *weights, eps)


_ARGUMENTS = "Tensor u, Tensor norm_weight, Tensor gate, Tensor up, Tensor down, float eps"


@torch.library.custom_op(
    "ladder_kernels::side_mlp", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
def _side_mlp(
    u: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    return run(_OP, "side_mlp", u, norm_weight, gate, up, down, eps)


@torch.library.custom_op(
    "ladder_kernels::side_mlp_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, {_ARGUMENTS}, bool need_stream, bool need_norm, bool need_matrices)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _side_mlp_backward(
    grad: Tensor,
    u: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    need_stream: bool,
    need_norm: bool,
    need_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (grad, u, norm_weight, gate, up, down, eps)
    return run(_OP, "side_mlp_backward", *given, need_stream, need_norm, need_matrices)


@_side_mlp.register_fake
def _(u: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    return u.new_empty(u.shape)


@_side_mlp_backward.register_fake
def _(
    grad: Tensor,
    u: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    need_stream: bool,
    need_norm: bool,
    need_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dgate, dup, ddown = (
        value.new_empty(value.shape if need_matrices else (0,)) for value in (gate, up, down)
    )
    return (
        u.new_empty(u.shape if need_stream else (0,)),
        u.new_empty(norm_weight.shape if need_norm else (0,)),
        dgate,
        dup,
        ddown,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:5]
    found = _side_mlp_backward(
        grad, *ctx.saved_tensors, ctx.eps, needs[0], needs[1], any(needs[2:])
    )
    return (*(value if need else None for value, need in zip(found, needs, strict=True)), None)


register_autograd(_side_mlp, _backward, setup_context=_setup)
