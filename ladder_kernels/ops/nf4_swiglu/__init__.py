"""The gated half of a SwiGLU MLP with two frozen NF4 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _nf4_args
from ladder_kernels.ops._dispatch import call, register_autograd, run
from ladder_kernels.ops._numeric import flatten_rows

__all__ = ["nf4_swiglu"]

_OP = "nf4_swiglu"


def nf4_swiglu(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Compute ``silu(x @ Wg^T) * (x @ Wu^T)`` without either product in memory as a whole.

    SwiGLU (arXiv:2002.05202) up to its down projection, which is an ordinary :func:`nf4_linear`.
    Differentiable (once) in ``x``; the backward pass keeps ``x`` only and computes both products
    again. Under autocast ``x`` is cast to its dtype.

    Args:
        x: ``[..., K]``, float16, bfloat16, float32 or float64.
        w_gate: ``[N, K]``.
        w_up: ``[N, K]``.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    x = _nf4_args.checked_gated_input(_OP, x, w_gate, w_up)
    return call(_swiglu, x, *_nf4_args.flatten(w_gate), *_nf4_args.flatten(w_up))


_WEIGHTS = f"{_nf4_args.schema('gate_')}, {_nf4_args.schema('up_')}"


def _weights(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[NF4Weight, NF4Weight]:
    gate, up = args[: _nf4_args.COUNT], args[_nf4_args.COUNT :]
    return _nf4_args.rebuild(gate, dtype), _nf4_args.rebuild(up, dtype)


@torch.library.custom_op(
    "ladder_kernels::nf4_swiglu", mutates_args=(), schema=f"(Tensor x, {_WEIGHTS}) -> Tensor"
)
def _swiglu(x: Tensor, *args: Any) -> Tensor:
    w_gate, w_up = _weights(args, x.dtype)
    out = run(_OP, "nf4_swiglu", flatten_rows(x), w_gate, w_up)
    return out.view(*x.shape[:-1], w_gate.shape[0])


@torch.library.custom_op(
    "ladder_kernels::nf4_swiglu_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, {_WEIGHTS}) -> Tensor",
)
def _swiglu_backward(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    weights = _weights(args, x.dtype)
    out = run(_OP, "nf4_swiglu_backward", flatten_rows(grad), flatten_rows(x), *weights)
    return out.view(x.shape)


@_swiglu.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    shape = args[_nf4_args.COUNT - 2]
    return x.new_empty((*x.shape[:-1], shape[0]))


@_swiglu_backward.register_fake
def _(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weights = inputs
    # Tensors (and the Nones of weights without double quantisation) go where autograd watches
    # them; shapes and blocksizes are plain values.
    ctx.plain = [None if v is None or isinstance(v, Tensor) else v for v in weights]
    ctx.save_for_backward(x, *(v if isinstance(v, Tensor) else None for v in weights))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    weights = [p if t is None else t for t, p in zip(tensors, ctx.plain, strict=True)]
    dx = _swiglu_backward(grad, x, *weights) if ctx.needs_input_grad[0] else None
    return (dx, *[None] * len(weights))


register_autograd(_swiglu, _backward, setup_context=_setup)
