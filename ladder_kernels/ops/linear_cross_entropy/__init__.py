"""Cross entropy of a linear head that never holds the ``[T, V]`` logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _checks, _nf4_args
from ladder_kernels.ops._dispatch import register_autograd, run
from ladder_kernels.ops._numeric import accumulation_dtype, blocks, flatten_rows

__all__ = ["REDUCTIONS", "linear_cross_entropy"]

_OP = "linear_cross_entropy"

_SCALED_AT_A_TIME = 1 << 20  # numbers

REDUCTIONS = ("none", "sum", "mean")
"""How the losses of the tokens become the result."""


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor | NF4Weight,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    *,
    logit_scale: float = 1.0,
) -> Tensor:
    """Cross entropy of ``softmax(head @ hidden)`` against labels, without the logits in memory.

    Equals ``F.cross_entropy(cap(logit_scale * hidden @ head^T), labels)`` with
    ``cap(z) = softcap * tanh(z / softcap)``, computed in float32 (float64 for float64 ``hidden``).
    Tokens labelled ``ignore_index`` are dropped first and cost nothing. The rest passes through
    blocks of tokens and vocabulary whose workspace is constant
    (:mod:`ladder_kernels.ops.linear_cross_entropy.reference` says how large), and the gradient of
    ``hidden`` is computed in the same sweep as the loss. The same bits come out of every run.

    Differentiable (once) in ``hidden``, and in ``head`` if that is a tensor that requires a
    gradient. Under autocast ``hidden`` is cast to its dtype.

    Args:
        hidden: ``[..., D]``, float16, bfloat16, float32 or float64.
        head: ``[V, D]``, a tensor of any floating dtype, or an :class:`NF4Weight` (read in slices,
            dequantised to hidden's dtype).
        labels: integers ``[...]``, each in ``[0, V)`` or ``ignore_index``. They are not shifted.
        ignore_index: the label of tokens that do not count.
        reduction: "mean" over the tokens that count (nan if there is none, as in PyTorch), "sum",
            or "none" (0 at ignored tokens).
        softcap: the bound of the logits (Gemma 2, arXiv:2408.00118), above 0; ``None`` for none.
        logit_scale: a factor on the logits before the softcap (Cohere, Granite).

    Returns:
        A 0-d tensor, or ``[...]`` for "none"; float32, or float64 for float64 ``hidden``.

    Raises:
        ConfigError: an unknown reduction, a softcap that is not above 0, a label out of range (in
            Triton on a GPU that is a device-side assertion instead: nothing waits for the device),
            a shape, dtype or device that does not fit, or ``create_graph=True`` in the backward
            pass.
        BackendError: a backend forced by name cannot run this call.
    """
    if reduction not in REDUCTIONS:
        raise _checks.refuse(
            _OP, "reduction", f"is {reduction!r}", "allowed are 'none', 'sum' and 'mean'"
        )
    if softcap is not None and not softcap > 0:
        raise _checks.refuse(_OP, "softcap", f"is {softcap}", "it must be above 0, or None")
    _check_inputs(hidden, head, labels)
    hidden = _checks.autocast(hidden)
    rows = flatten_rows(hidden)
    flat_labels = labels.reshape(-1).to(torch.int64)
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    options = (ignore_index, softcap, float(logit_scale), need_grad)
    if isinstance(head, NF4Weight):
        loss, _, _ = _nf4_loss(rows, *_nf4_args.flatten(head), flat_labels, *options)
    else:
        loss, _, _ = _loss(rows, head, flat_labels, *options)
    if reduction == "none":
        return loss.view(labels.shape)
    total = loss.sum()
    return total if reduction == "sum" else total / (flat_labels != ignore_index).sum()


def _check_inputs(hidden: Tensor, head: Tensor | NF4Weight, labels: Tensor) -> None:
    _checks.check_floating(_OP, "hidden", hidden)
    if hidden.dim() == 0:
        raise _checks.refuse(_OP, "hidden", "has no dimension", "it must be [..., D]")
    if isinstance(head, NF4Weight):
        _checks.check_nf4(_OP, "head", head)
        _checks.check_same_device(_OP, "head", head.packed, "hidden", hidden)
    else:
        _checks.check_floating(_OP, "head", head)
        _checks.check_same_device(_OP, "head", head, "hidden", hidden)
    if len(head.shape) != 2 or head.shape[1] != hidden.shape[-1]:
        raise _checks.refuse(
            _OP,
            "head",
            f"has shape {list(head.shape)}",
            f"it must be ['V', {hidden.shape[-1]}] (the last dimension of hidden)",
        )
    _checks.check_tensor(_OP, "labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise _checks.refuse(_OP, "labels", f"has dtype {labels.dtype}", "it must be integers")
    _checks.check_same_device(_OP, "labels", labels, "hidden", hidden)
    _checks.check_shape(_OP, "labels", labels, hidden.shape[:-1], "hidden without its last one")


_OPTIONS = "int ignore_index, float? softcap, float logit_scale"
_RETURNS = "-> (Tensor loss, Tensor lse, Tensor grad_hidden)"


@torch.library.custom_op(
    "ladder_kernels::linear_cross_entropy",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor head, Tensor labels, {_OPTIONS}, bool need_grad) {_RETURNS}",
)
def _loss(hidden: Tensor, head: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return run(_OP, "linear_cross_entropy", hidden, head, labels, *options)


@torch.library.custom_op(
    "ladder_kernels::nf4_linear_cross_entropy",
    mutates_args=(),
    schema=(
        f"(Tensor hidden, {_nf4_args.schema('head_')}, Tensor labels, {_OPTIONS}, bool need_grad)"
        f" {_RETURNS}"
    ),
)
def _nf4_loss(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head = _nf4_args.rebuild(args[: _nf4_args.COUNT], hidden.dtype)
    return run(_OP, "linear_cross_entropy", hidden, head, *args[_nf4_args.COUNT :])


@torch.library.custom_op(
    "ladder_kernels::linear_cross_entropy_head_grad",
    mutates_args=(),
    schema=(
        f"(Tensor grad_loss, Tensor hidden, Tensor head, Tensor labels, Tensor lse, {_OPTIONS})"
        " -> Tensor"
    ),
)
def _head_grad(grad_loss: Tensor, *args: Any) -> Tensor:
    return run(_OP, "head_grad", grad_loss, *args)


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tokens, width = hidden.shape
    loss = hidden.new_empty((tokens,), dtype=accumulation_dtype(hidden.dtype))
    need_grad = args[-1]
    return loss, torch.empty_like(loss), hidden.new_empty((tokens if need_grad else 0, width))


_loss.register_fake(_fake)
_nf4_loss.register_fake(_fake)


@_head_grad.register_fake
def _(grad_loss: Tensor, hidden: Tensor, head: Tensor, *args: Any) -> Tensor:
    return head.new_empty(head.shape)


def _set_up(ctx: Any, output: tuple[Tensor, ...], *for_head: Tensor) -> None:
    _, lse, grad_hidden = output
    ctx.mark_non_differentiable(lse, grad_hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, *for_head)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, head, labels, *options, _ = inputs
    ctx.options = options
    # Hidden states are kept only for the gradient of the head; their own is computed already.
    for_head = (hidden, head, labels, output[1]) if ctx.needs_input_grad[1] else ()
    _set_up(ctx, output, *for_head)


def _nf4_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.inputs = len(inputs)
    _set_up(ctx, output)


def _scaled(unit: Tensor, grad_loss: Tensor) -> Tensor:
    """Each token's gradient times the gradient of its loss."""
    if torch.is_grad_enabled():
        raise ConfigError(
            f"{_OP}: create_graph is True; only False is allowed, its gradient was computed with "
            "the loss and has none of its own"
        )
    if unit.dtype == grad_loss.dtype or torch.compiler.is_compiling():
        return (unit * grad_loss.unsqueeze(1)).to(unit.dtype)
    # The product is in the wider dtype, and all of it at once would be the largest tensor here.
    out = torch.empty_like(unit)
    for start, stop in blocks(unit.shape[0], max(1, _SCALED_AT_A_TIME // max(1, unit.shape[1]))):
        out[start:stop] = unit[start:stop] * grad_loss[start:stop].unsqueeze(1)
    return out


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: None, grad_unit: None
) -> tuple[Tensor | None, ...]:
    unit, *for_head = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * (3 + len(ctx.options) + 1)
    if grad_loss is not None:
        if ctx.needs_input_grad[0]:
            grads[0] = _scaled(unit, grad_loss)
        if ctx.needs_input_grad[1]:
            grads[1] = _head_grad(grad_loss, *for_head, *ctx.options)
    return tuple(grads)


def _nf4_backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: None, grad_unit: None
) -> tuple[Tensor | None, ...]:
    (unit,) = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * ctx.inputs
    if grad_loss is not None and ctx.needs_input_grad[0]:
        grads[0] = _scaled(unit, grad_loss)
    return tuple(grads)


register_autograd(_loss, _backward, setup_context=_setup)
register_autograd(_nf4_loss, _nf4_backward, setup_context=_nf4_setup)
