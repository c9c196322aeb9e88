"""The threads that step together, and all that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ladder_kernels.audit.ptx.counters import Counters
from ladder_kernels.audit.ptx.memory import BlockMemory, GlobalMemory, Memory
from ladder_kernels.audit.ptx.parser import Program
from ladder_kernels.audit.ptx.types import UNSIGNED, Array

if TYPE_CHECKING:
    from ladder_kernels.audit.ptx.asynchronous import PendingCopies

__all__ = ["EXITED", "NO_BARRIER", "WAITING", "WARP", "Flow", "Run", "Schedule", "Threads"]

WARP = 32
"""Threads of a warp."""
EXITED = 2**63 - 1
"""The program counter of a thread that has returned."""
WAITING = EXITED - 1
"""The program counter of a thread that waits at a barrier."""
NO_BARRIER = -1
"""In place of a barrier's."""

_GARBAGE = 0xDEADBEEFDEADBEEF


@dataclass(frozen=True)
class Schedule:
    """In which order things happen that the hardware may order as it likes.

    Attributes:
        lockstep: All warps of a block take each instruction together, which is fast and hides
            races. Otherwise one warp runs up to the next barrier before the next one starts, so
            that a missing barrier shows.
        reverse: Blocks, and warps unless in lockstep, run from the last to the first.
        late_copies: ``cp.async`` lands when it is waited for, otherwise at once.
    """

    lockstep: bool = True
    reverse: bool = False
    late_copies: bool = True


@dataclass(frozen=True)
class Run:
    """What all threads of a run share."""

    program: Program
    grid: tuple[int, int, int]
    block_threads: int
    parameters: bytes
    global_memory: GlobalMemory
    schedule: Schedule
    counters: Counters | None


class Flow:
    """Where each thread is. Of threads apart, those furthest behind go first, until they meet."""

    def __init__(self, count: int) -> None:
        self._common = 0
        self._apart: Array | None = None
        # The barrier that each thread waits at, if it does.
        self._barriers = np.full(count, NO_BARRIER, np.int64)

    def current(self) -> tuple[int, Array | None]:
        """The next instruction, and the mask of the threads that take it; None for all.

        It is :data:`WAITING` or beyond if no thread can go on.
        """
        if self._apart is None:
            return self._common, None
        first = int(self._apart.min())
        active = self._apart == first
        if not active.all():
            return first, active
        self._common, self._apart = first, None
        return first, None

    def advance(self, counter: int, active: Array | None) -> None:
        """Send the active threads, which are all at ``counter``, to the next instruction."""
        if self._apart is None:
            self._common = counter + 1
        else:
            self._apart[active] = counter + 1

    def jump(self, counter: int, active: Array | None, taken: Array | None, target: int) -> None:
        """Send the threads of ``taken``, or all active ones if None, elsewhere."""
        self.advance(counter, active)
        if taken is None and self._apart is None:
            self._common = target
        elif self._apart is not None:
            self._apart[active if taken is None else taken] = target
        elif taken is not None and taken.any():
            self._apart = np.where(taken, np.int64(target), np.int64(counter + 1))

    def wait(self, counter: int, active: Array | None, taken: Array | None) -> None:
        """Let the threads of ``taken``, or all active ones if None, wait at a barrier."""
        self.jump(counter, active, taken, WAITING)
        who = active if taken is None else taken
        self._barriers[slice(None) if who is None else who] = counter

    def barriers(self) -> Array:
        """The barrier that each thread waits at; :data:`NO_BARRIER` if it has returned."""
        places = self._common if self._apart is None else self._apart
        return np.where(places == WAITING, self._barriers, NO_BARRIER)

    def release(self) -> None:
        """Send every thread that waits past its barrier."""
        barriers = self.barriers()
        waits = barriers != NO_BARRIER
        self._apart = np.where(waits, barriers + 1, np.int64(EXITED))


class Threads:
    """Threads in lockstep: those of one or more blocks, or one warp of each of them.

    Attributes:
        run: What they share with all others.
        count: How many they are.
        ids: uint32, each thread's index in its block.
        blocks: int64 ``[blocks, 3]``, the coordinates of the blocks that they belong to.
        block: int64, for each thread the row of ``blocks``.
        owners: Whose memory each thread uses, by space; None if it is the only one.
        memories: Memory by space.
        registers: One array for each register.
        copies: ``cp.async`` copies that have not landed.
        carry: bool, each thread's carry flag.
        flow: Where each thread is.
        executed: Instructions so far, counted once for each warp.
    """

    def __init__(
        self,
        run: Run,
        blocks: Array,
        shared: BlockMemory,
        ids: Array,
        copies: PendingCopies,
    ) -> None:
        self.run = run
        self.ids = np.tile(ids.astype(np.uint32), len(blocks))
        self.count = len(self.ids)
        self.blocks = blocks
        self.block = np.repeat(np.arange(len(blocks)), len(ids))
        self.owners: Mapping[str, Array | None] = {
            "shared": self.block if len(blocks) > 1 else None,
            "local": np.arange(self.count),
        }
        self.memories: dict[str, Memory] = {"global": run.global_memory, "shared": shared}
        if run.program.local_bytes:
            self.memories["local"] = BlockMemory("local", run.program.local_bytes, self.count)
        self.registers = [self._garbage(bits) for bits in run.program.register_bits]
        self.copies = copies
        self.carry = np.zeros(self.count, bool)
        self.flow = Flow(self.count)
        self.executed = 0

    @property
    def warps(self) -> int:
        """How many warps they are."""
        return self.count // WARP

    def _garbage(self, bits: int) -> Array:
        if bits == 1:
            return self.ids % 3 == 1
        if bits == 128:
            return np.zeros(0, np.uint64)
        return np.full(self.count, _GARBAGE & ((1 << bits) - 1), UNSIGNED[bits])

    def each(self, values: Array) -> Array:
        """One value for each thread, of values that may be one for all."""
        return np.broadcast_to(values, (self.count,))

    def by_warp(self, values: Array) -> Array:
        """The same as ``[warps, 32]``."""
        return self.each(values).reshape(-1, WARP)

    def active(self, mask: Array | None) -> Array:
        """A mask as an array, ``[warps, 32]``."""
        if mask is None:
            return np.ones((self.warps, WARP), bool)
        return mask.reshape(-1, WARP)

    def describe(self, thread: int) -> str:
        """A thread in words."""
        coordinates = tuple(int(axis) for axis in self.blocks[self.block[thread]])
        return f"thread {int(self.ids[thread])} of block {coordinates}"
