"""Running a kernel: blocks, warps and barriers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ladder_kernels.audit.ptx.arguments import Binding, bind
from ladder_kernels.audit.ptx.asynchronous import PendingCopies
from ladder_kernels.audit.ptx.counters import Counters
from ladder_kernels.audit.ptx.errors import BarrierError, PTXError
from ladder_kernels.audit.ptx.instructions import Control, Step, lower
from ladder_kernels.audit.ptx.memory import BlockMemory
from ladder_kernels.audit.ptx.parser import Instruction, Program, parse
from ladder_kernels.audit.ptx.state import NO_BARRIER, WARP, Run, Schedule, Threads
from ladder_kernels.audit.ptx.types import Array

__all__ = ["Kernel", "execute"]

_THREADS_TOGETHER = 2048
_MOST_STEPS = 10_000_000
# Marks of code in which one block waits for another.
_WAITING = ("cas", "exch", "acquire", "volatile", "relaxed", "mmio")


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to run.

    Attributes:
        program: As parsed.
        steps: Its instructions' actions.
    """

    program: Program
    steps: Sequence[Step]

    @property
    def name(self) -> str:
        """The entry's name."""
        return self.program.name

    @classmethod
    def parse(cls, ptx: str, name: str | None = None) -> Kernel:
        """Parse one entry of a PTX module.

        Args:
            ptx: The module's text.
            name: The entry's name; the first if None.

        Raises:
            PTXError: The text has no such entry, or is malformed.
        """
        program = parse(ptx, name)
        return cls(program, lower(program))


def execute(
    kernel: Kernel,
    arguments: Sequence[Any] | Mapping[str, Any],
    grid: Sequence[int],
    *,
    warps: int,
    shared_bytes: int,
    schedule: Schedule | None = None,
    counters: Counters | None = None,
) -> int:
    """Run a kernel on a grid. Arrays and tensors are changed in place.

    Args:
        kernel: What :meth:`Kernel.parse` made.
        arguments: In the order of the kernel's parameters: numpy arrays or CPU tensors for
            pointers, numbers for the rest. A mapping names them for errors. Pointers that are
            missing at the end are null.
        grid: How many blocks, up to three numbers.
        warps: Warps of a block.
        shared_bytes: Dynamic shared memory of a block.
        schedule: In which order things happen; :class:`Schedule`'s defaults if None.
        counters: Where to count, or None not to.

    Returns:
        Executed instructions, counted once for each warp.

    Raises:
        PTXError: The kernel did what it must not do, or what is not modelled.
    """
    sizes = tuple(int(size) for size in grid)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 0:
        raise PTXError(f"a grid is one to three numbers that are not negative, not {sizes}")
    if kernel.program.block_threads not in (None, WARP * warps):
        raise PTXError(
            f"{kernel.name} was compiled for {kernel.program.block_threads} threads a block, "
            f"not {WARP * warps}"
        )
    binding = bind(kernel.program, arguments)
    run = Run(
        program=kernel.program,
        grid=_three(sizes),
        block_threads=WARP * warps,
        parameters=binding.parameters,
        global_memory=binding.memory,
        schedule=schedule or Schedule(),
        counters=counters,
    )
    return _run(kernel, run, shared_bytes, binding)


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    columns, rows, layers = (*sizes, 1, 1)[:3]
    return columns, rows, layers


def _run(kernel: Kernel, run: Run, shared_bytes: int, binding: Binding) -> int:
    executed = 0
    # Overflow and NaN are for the kernel to care about.
    with np.errstate(all="ignore"):
        for blocks in _batches(run):
            groups = _groups(run, blocks, shared_bytes)
            _run_groups(groups, kernel)
            executed += sum(group.executed for group in groups)
    binding.write_back()
    return executed


def _batches(run: Run) -> Iterator[Array]:
    """Coordinates of the blocks that run together, for speed alone: they share no more for it.

    A block that waits for another could wait for ever if both ran in step: where code may do so,
    one block runs after the other.
    """
    columns, rows, layers = run.grid
    order = [(x, y, z) for z, y, x in itertools.product(range(layers), range(rows), range(columns))]
    if run.schedule.reverse:
        order.reverse()
    waits = any(_may_wait(instruction) for instruction in run.program.instructions)
    size = 1 if waits else max(1, _THREADS_TOGETHER // run.block_threads)
    for first in range(0, len(order), size):
        yield np.array(order[first : first + size], np.int64)


def _may_wait(instruction: Instruction) -> bool:
    return instruction.opcode in ("atom", "ld") and instruction.has(*_WAITING)


def _groups(run: Run, blocks: Array, shared_bytes: int) -> list[Threads]:
    """The threads of these blocks as groups that step together, in the order in which they run.

    In lockstep there is one group. Otherwise there is one for each warp of a block, which holds
    that warp of every block.
    """
    shared = BlockMemory("shared", run.program.shared_bytes + shared_bytes, len(blocks))
    together = run.block_threads if run.schedule.lockstep else WARP
    groups = []
    for first in range(0, run.block_threads, together):
        ids = np.arange(first, first + together)
        copies = PendingCopies(len(ids) * len(blocks))
        groups.append(Threads(run, blocks, shared, ids, copies))
    return groups[::-1] if run.schedule.reverse else groups


def _run_groups(groups: Sequence[Threads], kernel: Kernel) -> None:
    """Run from barrier to barrier, one group after the other."""
    while True:
        for group in groups:
            _run_to_barrier(group, kernel)
        # One row for each group: where its threads wait, a number for each block.
        waiting = np.array(
            [group.flow.barriers().reshape(len(group.blocks), -1)[:, 0] for group in groups]
        )
        if (waiting != waiting[0]).any():
            raise _apart(groups, waiting, kernel)
        if (waiting == NO_BARRIER).all():
            return
        for group in groups:
            group.flow.release()


def _apart(groups: Sequence[Threads], waiting: Array, kernel: Kernel) -> PTXError:
    """The error for warps of a block that wait at different barriers, or not at all."""
    block = int(np.flatnonzero((waiting != waiting[0]).any(axis=0))[0])
    places = waiting[:, block].tolist()
    first = next(index for index, place in enumerate(places) if place != NO_BARRIER)
    other = next(index for index, place in enumerate(places) if place != places[first])
    does = "has returned" if places[other] == NO_BARRIER else "waits at another"
    one, another = (
        groups[index].describe(block * groups[index].count // len(groups[index].blocks))
        for index in (first, other)
    )
    error = BarrierError(f"the warp of {one} waits at a barrier while the warp of {another} {does}")
    instruction = kernel.steps[places[first]].instruction
    error.locate(kernel.name, instruction.source, instruction.text)
    return error


def _run_to_barrier(threads: Threads, kernel: Kernel) -> None:
    """Run until every thread has returned or waits at a barrier that others must reach too."""
    steps, flow = kernel.steps, threads.flow
    counters = threads.run.counters
    for _ in range(_MOST_STEPS):
        place, active = flow.current()
        if place >= len(steps):
            return
        step = steps[place]
        count = threads.warps if active is None else _active_warps(active)
        threads.executed += count
        if counters is not None:
            counters.instructions[step.category] += count
        try:
            _take(threads, step, place, active)
        except PTXError as error:
            error.locate(kernel.name, step.instruction.source, step.instruction.text)
            raise
    raise PTXError(f"{kernel.name} ran {_MOST_STEPS} instructions without an end or a barrier")


def _take(threads: Threads, step: Step, place: int, active: Array | None) -> None:
    """Take one step."""
    flow = threads.flow
    mask = _mask(threads, step, active)
    if step.control is Control.JUMP:
        flow.jump(place, active, mask, step.target)
    elif mask is not None and step.instruction.guard is not None and not mask.any():
        # Only a guard can leave nobody.
        flow.advance(place, active)
    elif step.control is Control.BARRIER:
        _check_whole_blocks(threads, mask)
        # In lockstep the whole block is here and goes on.
        if threads.run.schedule.lockstep:
            flow.advance(place, active)
        else:
            flow.wait(place, active, mask)
    else:
        flow.advance(place, active)
        step.action(threads, mask)


def _mask(threads: Threads, step: Step, active: Array | None) -> Array | None:
    """Who does the step: the active threads whose guard allows it; None if that is everyone."""
    guard = step.instruction.guard
    if guard is None:
        return active
    allowed = threads.registers[guard.index]
    if guard.negated:
        allowed = ~allowed
    if active is not None:
        return allowed & active
    # A copy: the step may write to its own guard.
    return None if allowed.all() else allowed.copy()


def _active_warps(active: Array) -> int:
    return int(active.reshape(-1, WARP).any(axis=1).sum())


def _check_whole_blocks(threads: Threads, mask: Array | None) -> None:
    """Refuse a barrier that some of a block's threads have reached and others of the group not."""
    if mask is None:
        return
    by_block = mask.reshape(len(threads.blocks), -1)
    some, every = by_block.any(axis=1), by_block.all(axis=1)
    if (some != every).any():
        missing = int(np.flatnonzero(~by_block & (some != every)[:, None])[0])
        raise BarrierError(
            f"a barrier reached by part of the threads, not by {threads.describe(missing)}"
        )
