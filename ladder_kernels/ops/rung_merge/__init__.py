"""One rung's reading of the backbone: normalise its taps, project them, merge them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ladder_kernels.ops import _checks
from ladder_kernels.ops._dispatch import call, register_autograd, run

__all__ = ["MODES", "rung_merge"]

_OP = "rung_merge"

MODES = ("sum", "gate", "channel")
"""How a projected tap meets the side stream."""


def rung_merge(
    side: Tensor,
    taps: Sequence[Tensor],
    downs: Sequence[Tensor],
    gate: Tensor | None,
    mode: str = "gate",
    eps: float = 1e-6,
) -> Tensor:
    """Normalise taps, project them to the side stream's width, and merge them into it.

    ``z = sum_j n(taps[j]) @ downs[j]^T`` with ``n(x) = x / sqrt(mean(x^2) + eps)``, and then

    - mode "sum": ``side + z``;
    - mode "gate": ``gate * side + (1 - gate) * z`` with one gate for the rung (Ladder Side Tuning,
      arXiv:2206.06522);
    - mode "channel": the same with one gate a channel (QST, arXiv:2401.07159).

    Everything inside is float32 (float64 for float64 inputs), rounded once. Differentiable (once)
    in ``side``, ``downs`` and ``gate``. Taps are constants: no gradient ever reaches them, and
    their normalised form is neither held as a whole nor kept for the backward pass. Under autocast
    ``side``, ``downs`` and ``gate`` are cast to its dtype.

    Args:
        side: the side stream ``[..., d]``.
        taps: residual streams of the backbone, each ``[..., D]`` with side's leading dimensions, in
            any floating dtype. An empty sequence (a free rung) returns ``side`` itself.
        downs: one projection ``[d, D]`` for each tap, in side's dtype.
        gate: the weight of ``side``, already between 0 and 1, in side's dtype: ``None`` for "sum",
            one number (``[]`` or ``[1]``) for "gate", ``[d]`` for "channel".
        mode: "sum", "gate" or "channel".
        eps: added to the mean square of a tap's row.

    Returns:
        The merged side stream ``[..., d]`` in side's dtype.

    Raises:
        ConfigError: an unknown mode, a gate that does not fit the mode, another number of downs
            than of taps, or a shape, dtype or device that does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    if mode not in MODES:
        raise _checks.refuse(_OP, "mode", f"is {mode!r}", "allowed are 'sum', 'gate' and 'channel'")
    _checks.check_floating(_OP, "side", side)
    if side.dim() == 0:
        raise _checks.refuse(_OP, "side", "has no dimension", "it must be [..., d]")
    if isinstance(taps, Tensor) or isinstance(downs, Tensor):
        name = "taps" if isinstance(taps, Tensor) else "downs"
        raise _checks.refuse(_OP, name, "is a Tensor", "it must be a sequence of tensors")
    if len(taps) != len(downs):
        raise _checks.refuse(
            _OP, "downs", f"has {len(downs)} entries", f"it must have {len(taps)}, one for each tap"
        )
    side = _checks.autocast(side)
    downs = [_cast("downs", j, down) for j, down in enumerate(downs)]
    for j, (tap, down) in enumerate(zip(taps, downs, strict=True)):
        _check_pair(j, tap, down, side)
    gate = _checked_gate(gate, mode, side)
    return call(_rung_merge, side, list(taps), downs, gate, mode, eps) if taps else side


def _cast(name: str, j: int, value: Tensor) -> Tensor:
    _checks.check_floating(_OP, f"{name}[{j}]", value)
    return _checks.autocast(value)


def _check_pair(j: int, tap: Tensor, down: Tensor, side: Tensor) -> None:
    _checks.check_floating(_OP, f"taps[{j}]", tap)
    _checks.check_same_device(_OP, f"taps[{j}]", tap, "side", side)
    if tap.shape[:-1] != side.shape[:-1] or tap.dim() != side.dim():
        raise _checks.refuse(
            _OP,
            f"taps[{j}]",
            f"has shape {list(tap.shape)}",
            f"it must be {[*side.shape[:-1], 'D']} (the leading dimensions of side)",
        )
    _checks.check_same_dtype(_OP, f"downs[{j}]", down, "side", side)
    _checks.check_same_device(_OP, f"downs[{j}]", down, "side", side)
    _checks.check_shape(
        _OP, f"downs[{j}]", down, (side.shape[-1], tap.shape[-1]), f"widths of side and taps[{j}]"
    )


def _checked_gate(gate: Tensor | None, mode: str, side: Tensor) -> Tensor | None:
    if mode == "sum":
        if gate is not None:
            raise _checks.refuse(_OP, "gate", "is given", "mode 'sum' takes None")
        return None
    if gate is None:
        shape = "[] or [1]" if mode == "gate" else f"[{side.shape[-1]}]"
        raise _checks.refuse(_OP, "gate", "is None", f"mode '{mode}' needs a tensor of {shape}")
    gate = _cast_gate(gate)
    _checks.check_same_dtype(_OP, "gate", gate, "side", side)
    _checks.check_same_device(_OP, "gate", gate, "side", side)
    if mode == "channel":
        _checks.check_shape(_OP, "gate", gate, side.shape[-1:], "mode 'channel', the width of side")
    elif tuple(gate.shape) not in ((), (1,)):
        raise _checks.refuse(
            _OP, "gate", f"has shape {list(gate.shape)}", "mode 'gate' needs [] or [1]"
        )
    return gate


def _cast_gate(gate: Tensor) -> Tensor:
    _checks.check_floating(_OP, "gate", gate)
    return _checks.autocast(gate)


_ARGUMENTS = "Tensor side, Tensor[] taps, Tensor[] downs, Tensor? gate, str mode, float eps"


@torch.library.custom_op(
    "ladder_kernels::rung_merge", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
def _rung_merge(
    side: Tensor,
    taps: list[Tensor],
    downs: list[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
) -> Tensor:
    return run(_OP, "rung_merge", side, taps, downs, gate, mode, eps)


@torch.library.custom_op(
    "ladder_kernels::rung_merge_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, {_ARGUMENTS}, bool need_side, bool[] need_downs, bool need_gate)"
        " -> (Tensor, Tensor[], Tensor)"
    ),
)
def _rung_merge_backward(
    grad: Tensor,
    side: Tensor,
    taps: list[Tensor],
    downs: list[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
    need_side: bool,
    need_downs: list[bool],
    need_gate: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    needs = (need_side, need_downs, need_gate)
    return run(_OP, "rung_merge_backward", grad, side, taps, downs, gate, mode, eps, *needs)


@_rung_merge.register_fake
def _(
    side: Tensor,
    taps: list[Tensor],
    downs: list[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
) -> Tensor:
    return side.new_empty(side.shape)


@_rung_merge_backward.register_fake
def _(
    grad: Tensor,
    side: Tensor,
    taps: list[Tensor],
    downs: list[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
    need_side: bool,
    need_downs: list[bool],
    need_gate: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    return (
        side.new_empty(side.shape if need_side else (0,)),
        [
            down.new_empty(down.shape if needed else (0,))
            for down, needed in zip(downs, need_downs, strict=True)
        ],
        side.new_empty((0,)) if gate is None or not need_gate else gate.new_empty(gate.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    side, taps, downs, gate, ctx.mode, ctx.eps = inputs
    ctx.taps = len(taps)
    # Only the gate's gradient reads the side stream's values; the rest needs its shape and dtype.
    ctx.save_for_backward(side, gate, *taps, *downs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    side, gate, *rest = ctx.saved_tensors
    taps, downs = list(rest[: ctx.taps]), list(rest[ctx.taps :])
    need_side, _, need_downs, need_gate = ctx.needs_input_grad[:4]
    dside, ddowns, dgate = _rung_merge_backward(
        grad, side, taps, downs, gate, ctx.mode, ctx.eps, need_side, list(need_downs), need_gate
    )
    return (
        dside if need_side else None,
        [None] * ctx.taps,
        [ddown if needed else None for ddown, needed in zip(ddowns, need_downs, strict=True)],
        dgate if need_gate else None,
        None,
        None,
    )


register_autograd(_rung_merge, _backward, setup_context=_setup)
