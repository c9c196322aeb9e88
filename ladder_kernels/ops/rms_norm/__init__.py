"""Root-mean-square normalisation, with the residual addition before it where that is wanted."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from ladder_kernels.ops import _checks
from ladder_kernels.ops._dispatch import call, register_autograd, run

__all__ = ["rms_norm"]

_OP = "rms_norm"


@overload
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide each row by its root mean square, then multiply by a weight a channel.

    ``y = weight * x / sqrt(mean(x^2) + eps)``, the mean over the last dimension
    (arXiv:1910.07467). The statistics are float32 and the normalised row is rounded to x's dtype
    before the weight is applied, exactly as in transformers' Llama. With ``residual``, what is
    normalised is ``x + residual``, and that sum is returned too. Differentiable (once) in ``x``,
    ``weight`` and ``residual``. Under autocast the inputs are cast to its dtype.

    Args:
        x: ``[..., D]``, float16, bfloat16, float32 or float64 (which computes in float64).
        weight: ``[D]`` in x's dtype, or ``None`` for no weight.
        eps: added to the mean square.
        residual: ``[..., D]`` as ``x``, or ``None``.

    Returns:
        ``y`` ``[..., D]`` in x's dtype; with ``residual`` the pair ``(y, x + residual)``.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    _checks.check_floating(_OP, "x", x)
    if x.dim() == 0:
        raise _checks.refuse(_OP, "x", "has no dimension", "it must be [..., D]")
    x = _checks.autocast(x)
    if weight is not None:
        _checks.check_floating(_OP, "weight", weight)
        weight = _checks.autocast(weight)
        _checks.check_same_dtype(_OP, "weight", weight, "x", x)
        _checks.check_same_device(_OP, "weight", weight, "x", x)
        _checks.check_shape(_OP, "weight", weight, x.shape[-1:], "the last dimension of x")
    if residual is None:
        return call(_rms_norm, x, weight, eps)
    _checks.check_floating(_OP, "residual", residual)
    residual = _checks.autocast(residual)
    _checks.check_same_dtype(_OP, "residual", residual, "x", x)
    _checks.check_same_device(_OP, "residual", residual, "x", x)
    _checks.check_shape(_OP, "residual", residual, x.shape, "the shape of x")
    return call(_add_rms_norm, x, residual, weight, eps)


@torch.library.custom_op(
    "ladder_kernels::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, float eps) -> Tensor",
)
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return run(_OP, "rms_norm", x, weight, eps)


@torch.library.custom_op(
    "ladder_kernels::add_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
)
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return run(_OP, "add_rms_norm", x, residual, weight, eps)


@torch.library.custom_op(
    "ladder_kernels::rms_norm_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor? weight, float eps, bool need_weight) -> (Tensor, Tensor)"
    ),
)
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return run(_OP, "rms_norm_backward", grad, x, weight, eps, need_weight)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_rms_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:] if need_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, _ = ctx.needs_input_grad
    dx, dweight = _rms_norm_backward(grad, x, weight, ctx.eps, need_weight)
    return dx if need_x else None, dweight if need_weight else None, None


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _add_backward(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    need_x, need_residual, need_weight, _ = ctx.needs_input_grad
    dweight = None
    if grad is not None:
        dx, dweight = _rms_norm_backward(grad, total, weight, ctx.eps, need_weight)
        grad_total = dx if grad_total is None else dx + grad_total
    return (
        grad_total if need_x else None,
        grad_total if need_residual else None,
        dweight if need_weight else None,
        None,
    )


register_autograd(_rms_norm, _backward, setup_context=_setup)
register_autograd(_add_rms_norm, _add_backward, setup_context=_add_setup)
