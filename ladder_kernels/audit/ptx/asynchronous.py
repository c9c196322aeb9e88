"""``cp.async``: copies from global to shared memory that land later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.access import count
from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering
from ladder_kernels.audit.ptx.memory import GARBAGE
from ladder_kernels.audit.ptx.operands import Immediate, Operand
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import Array

__all__ = ["BUILDERS", "PendingCopies"]


@dataclass
class _Copy:
    """Copies that one instruction began.

    Attributes:
        threads: Which threads began one.
        groups: For each of them, the group that it belongs to.
        places: ``[threads, bytes]``, where the bytes go.
        data: ``[threads, bytes]``.
    """

    threads: Array
    groups: Array
    places: Array
    data: Array


class PendingCopies:
    """What has been copied but has not landed, in groups of each thread's own."""

    def __init__(self, count: int) -> None:
        self._committed = np.zeros(count, np.int64)
        self._copies: list[_Copy] = []

    def begin(self, threads: Array, places: Array, data: Array) -> None:
        """Add copies of these threads to their open groups."""
        self._copies.append(_Copy(threads, self._committed[threads], places, data))

    def commit(self, mask: Array | None) -> None:
        """Close the open groups of the threads of a mask."""
        self._committed[slice(None) if mask is None else mask] += 1

    def land(self, shared: Array, mask: Array | None, still_open: int) -> None:
        """Land all groups of the threads of a mask but the last few committed."""
        remaining = []
        for copy in self._copies:
            landing = copy.groups < self._committed[copy.threads] - still_open
            if mask is not None:
                landing &= mask[copy.threads]
            shared[copy.places[landing]] = copy.data[landing]
            if not landing.all():
                rest = ~landing
                remaining.append(
                    _Copy(copy.threads[rest], copy.groups[rest], copy.places[rest], copy.data[rest])
                )
        self._copies = remaining


def _constant(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise UnsupportedInstructionError("a cp.async of a size that is not constant")
    return operand.value


def _copy(instruction: Instruction, lowering: Lowering) -> Action:
    if not instruction.has("async") or instruction.has("bulk", "mbarrier", "reduce"):
        raise UnsupportedInstructionError("of cp, only cp.async without bulk is modelled")
    if instruction.has("commit_group"):
        return lambda threads, mask: threads.copies.commit(mask)
    if instruction.has("wait_group"):
        return _wait(_constant(instruction.operands[0]))
    if instruction.has("wait_all"):
        return _wait_all
    return _begin(instruction, lowering)


def _wait(still_open: int) -> Action:
    def action(threads: Threads, mask: Array | None) -> None:
        threads.copies.land(threads.memories["shared"].bytes, mask, still_open)

    return action


def _wait_all(threads: Threads, mask: Array | None) -> None:
    threads.copies.commit(mask)
    threads.copies.land(threads.memories["shared"].bytes, mask, 0)


def _begin(instruction: Instruction, lowering: Lowering) -> Action:
    """Copy ``size`` bytes, the last of them zeros if a fourth operand asks for fewer."""
    size = _constant(instruction.operands[2])
    optional = instruction.operands[3:]
    if any("cache_hint" in modifier for modifier in instruction.modifiers):
        optional = optional[:-1]
    target = lowering.address(instruction.operands[0])
    source = lowering.address(instruction.operands[1])
    wanted = lowering.read(optional[0], "u32") if optional else None
    full = np.array([size], np.uint32)

    def action(threads: Threads, mask: Array | None) -> None:
        shared = threads.memories["shared"]
        goals = target(threads)
        places = shared.locate(threads, goals, mask, size, "cp.async write")
        lengths = threads.each(full if wanted is None else wanted(threads)).astype(np.int64)
        data = _fetch(threads, source(threads), mask, np.minimum(lengths, size), size)
        count(threads, "shared", goals, mask, size, load=False)
        places = places[:, None] + np.arange(size)
        if not threads.run.schedule.late_copies:
            shared.bytes[places] = data
            return
        shared.bytes[places] = GARBAGE
        who = np.arange(threads.count) if mask is None else np.flatnonzero(mask)
        threads.copies.begin(who, places, data)

    return action


def _fetch(
    threads: Threads, addresses: Array, mask: Array | None, lengths: Array, size: int
) -> Array:
    """``[threads of the mask, size]``: the bytes read, zeros beyond each thread's length."""
    memory = threads.memories["global"]
    data = np.zeros((threads.count, size), np.uint8)
    active = np.ones(threads.count, bool) if mask is None else mask
    for length in np.unique(lengths[active]).tolist():
        if length == 0:
            continue
        chosen = active & (lengths == length)
        # The address is aligned to the whole size even where fewer bytes are read.
        step = size if length == size else 1
        for first in range(0, length, step):
            places = memory.locate(threads, addresses + first, chosen, step, "cp.async read")
            data[chosen, first : first + step] = memory.bytes[places[:, None] + np.arange(step)]
        count(threads, "global", addresses, chosen, size, load=True)
    return data if mask is None else data[mask]


BUILDERS: Mapping[str, Builder] = MappingProxyType({"cp": _copy})
"""Builders by opcode."""
