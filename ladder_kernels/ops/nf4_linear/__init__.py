"""Linear layer with a frozen NF4 weight, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _nf4_args
from ladder_kernels.ops._dispatch import call, register_autograd, run
from ladder_kernels.ops._numeric import flatten_rows

__all__ = ["nf4_linear", "nf4_linear_transposed"]

_OP = "nf4_linear"


def nf4_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply by a frozen NF4 weight: ``x @ W^T (+ bias) (+ residual)``.

    The weight is dequantised piece by piece inside the product, to x's dtype; a dequantised copy
    of it is neither held nor saved. Differentiable in ``x``, ``bias`` and ``residual``, any number
    of times; the backward pass saves no activation, since ``grad @ W`` is all it needs
    (:func:`nf4_linear_transposed`). Under autocast the floating inputs are cast to its dtype.

    Args:
        x: ``[..., K]``, float16, bfloat16, float32 or float64.
        weight: ``[N, K]``.
        bias: ``[N]`` in x's dtype, or ``None``.
        residual: ``[..., N]`` in x's dtype, added last, or ``None``.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    x = _nf4_args.checked_input(_OP, "x", x, weight, 1)
    bias, residual = _nf4_args.checked_addends(_OP, x, weight, bias, residual)
    return call(_linear, x, *_nf4_args.flatten(weight), bias, residual)


def nf4_linear_transposed(grad: Tensor, weight: NF4Weight) -> Tensor:
    """Multiply by a frozen NF4 weight from the other side: ``grad @ W``.

    The gradient of :func:`nf4_linear` to its input. Differentiable in ``grad``, any number of
    times.

    Args:
        grad: ``[..., N]``, float16, bfloat16, float32 or float64.
        weight: ``[N, K]``.

    Returns:
        ``[..., K]`` in grad's dtype.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    grad = _nf4_args.checked_input(_OP, "grad", grad, weight, 0)
    return _transposed(grad, *_nf4_args.flatten(weight))


# Backends see matrices: leading dimensions are flattened here, once for all of them.


@torch.library.custom_op(
    "ladder_kernels::nf4_linear",
    mutates_args=(),
    schema=f"(Tensor x, {_nf4_args.schema()}, Tensor? bias, Tensor? residual) -> Tensor",
)
def _linear(x: Tensor, *args: Any) -> Tensor:
    weight = _nf4_args.rebuild(args[: _nf4_args.COUNT], x.dtype)
    bias, residual = args[_nf4_args.COUNT :]
    if residual is not None:
        residual = flatten_rows(residual)
    out = run(_OP, "nf4_linear", flatten_rows(x), weight, bias, residual)
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(
    "ladder_kernels::nf4_linear_transposed",
    mutates_args=(),
    schema=f"(Tensor grad, {_nf4_args.schema()}) -> Tensor",
)
def _transposed(grad: Tensor, *args: Any) -> Tensor:
    weight = _nf4_args.rebuild(args, grad.dtype)
    out = run(_OP, "nf4_linear_transposed", flatten_rows(grad), weight)
    return out.view(*grad.shape[:-1], weight.shape[1])


@_linear.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    shape = args[_nf4_args.COUNT - 2]
    return x.new_empty((*x.shape[:-1], shape[0]))


@_transposed.register_fake
def _(grad: Tensor, *args: Any) -> Tensor:
    shape = args[_nf4_args.COUNT - 2]
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def _save_weight(ctx: Any, arguments: tuple[Any, ...]) -> None:
    *tensors, ctx.shape, ctx.blocksize = arguments
    ctx.save_for_backward(*tensors)


def _saved_weight(ctx: Any) -> tuple[Any, ...]:
    return (*ctx.saved_tensors, ctx.shape, ctx.blocksize)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_weight(ctx, inputs[1 : 1 + _nf4_args.COUNT])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, *_, need_bias, need_residual = ctx.needs_input_grad
    return (
        _transposed(grad, *_saved_weight(ctx)) if need_x else None,
        *[None] * _nf4_args.COUNT,
        flatten_rows(grad).sum(0) if need_bias else None,
        grad if need_residual else None,
    )


def _transposed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_weight(ctx, inputs[1:])


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dgrad = _linear(grad, *_saved_weight(ctx), None, None) if ctx.needs_input_grad[0] else None
    return (dgrad, *[None] * _nf4_args.COUNT)


register_autograd(_linear, _backward, setup_context=_setup)
register_autograd(_transposed, _transposed_backward, setup_context=_transposed_setup)
