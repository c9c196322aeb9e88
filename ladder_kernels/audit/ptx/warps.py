"""What the threads of a warp do together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.errors import PTXError, UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering
from ladder_kernels.audit.ptx.operands import Pair
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import WARP, Threads
from ladder_kernels.audit.ptx.types import Array

__all__ = ["BUILDERS", "whole_warps"]

_LANES = np.arange(WARP)
_LANES.flags.writeable = False
_LANE_BITS = np.uint64(1) << _LANES.astype(np.uint64)
_LANE_BITS.flags.writeable = False


def whole_warps(threads: Threads, mask: Array | None) -> Array:
    """Which warps take part in what only whole warps can do.

    Raises:
        PTXError: Part of a warp takes part.
    """
    active = threads.active(mask)
    some, every = active.any(axis=1), active.all(axis=1)
    if (some != every).any():
        raise PTXError("an instruction for whole warps, reached by part of a warp")
    return np.asarray(every)


def _ballot(values: Array) -> Array:
    """uint32 for each warp: its booleans as bits."""
    return (values * _LANE_BITS).sum(axis=1).astype(np.uint32)


def _shuffle_source(mode: str, step: Array, control: Array) -> tuple[Array, Array]:
    """The lane to read from, and whether it is within the segment."""
    clamp, segment = control & 31, (control >> 8) & 31
    last = (_LANES & segment) | (clamp & ~segment & 31)
    if mode == "up":
        source = _LANES - step
        return source, source >= last
    if mode == "down":
        source = _LANES + step
    elif mode == "bfly":
        source = _LANES ^ step
    else:
        source = (_LANES & segment) | (step & ~segment & 31)
    return source, source <= last


def _shuffle(instruction: Instruction, lowering: Lowering) -> Action:
    mode = instruction.one_of("bfly", "up", "down", "idx")
    target = instruction.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write = lowering.write(first, "b32")
    write_inside = None if second is None else lowering.write(second, "pred")
    value, step, control = lowering.read_all(instruction.operands[1:4], "u32")

    def action(threads: Threads, mask: Array | None) -> None:
        values = threads.by_warp(value(threads))
        steps = (threads.by_warp(step(threads)) & 31).astype(np.int64)
        source, inside = _shuffle_source(
            mode, steps, threads.by_warp(control(threads)).astype(np.int64)
        )
        source = np.where(inside, source, _LANES)
        active = threads.active(mask)
        if (active & ~np.take_along_axis(active, source, 1)).any():
            raise PTXError("shfl reads from a thread that does not take part")
        write(threads, np.take_along_axis(values, source, 1).ravel(), mask)
        if write_inside is not None:
            write_inside(threads, np.broadcast_to(inside, values.shape).ravel(), mask)

    return action


_VOTES: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {
        "all": lambda votes, active: (votes | ~active).all(axis=1),
        "any": lambda votes, active: (votes & active).any(axis=1),
        "ballot": lambda votes, active: _ballot(votes & active),
        "uni": lambda votes, active: (votes | ~active).all(axis=1) | ~(votes & active).any(axis=1),
    }
)


def _vote(instruction: Instruction, lowering: Lowering) -> Action:
    mode = instruction.one_of(*_VOTES)
    read = lowering.read(instruction.operands[1], "pred")
    write = lowering.write(instruction.operands[0], "b32" if mode == "ballot" else "pred")
    result = _VOTES[mode]

    def action(threads: Threads, mask: Array | None) -> None:
        votes = threads.by_warp(read(threads))
        write(threads, np.repeat(result(votes, threads.active(mask)), WARP), mask)

    return action


def _active_mask(instruction: Instruction, lowering: Lowering) -> Action:
    write = lowering.write(instruction.operands[0], "b32")

    def action(threads: Threads, mask: Array | None) -> None:
        write(threads, np.repeat(_ballot(threads.active(mask)), WARP), mask)

    return action


_REDUCTIONS: Mapping[str, np.ufunc] = MappingProxyType(
    {
        "add": np.add,
        "and": np.bitwise_and,
        "max": np.maximum,
        "min": np.minimum,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
)


def _reduce(instruction: Instruction, lowering: Lowering) -> Action:
    """``redux``."""
    kind = instruction.type
    name = instruction.one_of(*_REDUCTIONS)
    reduction = _REDUCTIONS[name]
    if kind.floating:
        if name not in ("min", "max") or instruction.has("abs"):
            raise UnsupportedInstructionError("redux of floats is modelled for min and max alone")
        quiet = np.fmin if name == "min" else np.fmax
        reduction = reduction if instruction.has("NaN") else quiet
    read = lowering.read(instruction.operands[1], kind)
    write = lowering.write(instruction.operands[0], kind)

    def action(threads: Threads, mask: Array | None) -> None:
        whole_warps(threads, mask)
        values = threads.by_warp(read(threads))
        reduced = reduction.reduce(values, axis=1, dtype=values.dtype)
        write(threads, np.repeat(reduced, WARP), mask)

    return action


def _match(instruction: Instruction, lowering: Lowering) -> Action:
    """``match.any``: the lanes that hold the same value; ``match.all``: whether all do."""
    every = instruction.one_of("any", "all") == "all"
    target = instruction.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    read = lowering.read(instruction.operands[1], instruction.type)
    write = lowering.write(first, "b32")
    write_agree = None if second is None else lowering.write(second, "pred")

    def action(threads: Threads, mask: Array | None) -> None:
        values, active = threads.by_warp(read(threads)), threads.active(mask)
        same = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        agree = (same | ~active[:, None, :]).all(axis=2)
        found = (same * _LANE_BITS).sum(axis=2).astype(np.uint32)
        if every:
            found = np.where(agree, found, np.uint32(0))
        write(threads, found.ravel(), mask)
        if write_agree is not None:
            write_agree(threads, agree.ravel(), mask)

    return action


def _elect(instruction: Instruction, lowering: Lowering) -> Action:
    """``elect.sync``: one thread of each warp, here the lowest that takes part."""
    target = instruction.operands[0]
    if not isinstance(target, Pair):
        raise UnsupportedInstructionError("elect has two destinations")
    write_lane = lowering.write(target.first, "b32")
    write_chosen = lowering.write(target.second, "pred")

    def action(threads: Threads, mask: Array | None) -> None:
        lane = threads.active(mask).argmax(axis=1)
        write_lane(threads, np.repeat(lane, WARP).astype(np.uint32), mask)
        write_chosen(threads, (lane[:, None] == _LANES).ravel(), mask)

    return action


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "activemask": _active_mask,
        "elect": _elect,
        "match": _match,
        "redux": _reduce,
        "shfl": _shuffle,
        "vote": _vote,
    }
)
"""Builders by opcode."""
