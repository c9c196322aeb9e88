"""The compiled code of every kernel, executed once: what a hardware profiler would count of it.

Coalescing compares the 32-byte sectors that each request of a warp touches with the fewest that
could hold its bytes; sectors that a later request touches again, and a cache may still hold, count
again. Bank conflicts compare the passes over shared memory with what the bytes need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import torch

from ladder_kernels.audit.audit import kernels
from ladder_kernels.audit.catalogue import Case, cases
from ladder_kernels.audit.launches import Launch, recording
from ladder_kernels.audit.ptx import Counters, executing
from ladder_kernels.audit.samples import samples
from ladder_kernels.audit.targets import TARGETS, Target
from ladder_kernels.errors import ConfigError

__all__ = ["EXECUTABLE", "Execution", "execute_samples", "unexecuted"]

EXECUTABLE = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120")
"""Targets whose code the executor runs."""

# What is worth a remark: below this share of ideal, of an argument with this share of all sectors
# and too many numbers for a table that a cache keeps.
_POOR, _LARGE, _TABLE = 0.5, 0.1, 1024
_CONFLICTS = 2.0


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One launch, executed.

    Attributes:
        case: The sample.
        kernel: Name.
        target: What for.
        launch: The launch, whose ``key`` is that of the same code in a finding of the audit.
        counters: What was counted, of all its programs.
    """

    case: str
    kernel: str
    target: str
    launch: Launch
    counters: Counters

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is slow about its accesses, in words; empty if nothing is."""
        tables = {
            name
            for name, value in self.launch.values.items()
            if isinstance(value, torch.Tensor) and value.numel() <= _TABLE
        }
        return tuple(_remarks(self.counters, tables))


def _remarks(counters: Counters, tables: Set[str]) -> Iterator[str]:
    least = _LARGE * (counters.loads.sectors + counters.stores.sectors)
    for what, of_arguments in (("read", counters.loads_of), ("written", counters.stores_of)):
        for name, traffic in of_arguments.items():
            if name not in tables and traffic.coalescing < _POOR and traffic.sectors >= least:
                yield (
                    f"{name} is {what} in {traffic.sectors / traffic.requests:.1f} sectors a "
                    f"request where {traffic.ideal_sectors / traffic.requests:.1f} hold its bytes"
                )
    if counters.shared.slowdown > _CONFLICTS:
        yield f"bank conflicts: {counters.shared.slowdown:.1f}x the passes over shared memory"


def execute_samples(target: Target, chosen: Sequence[Case] | None = None) -> Iterator[Execution]:
    """Execute what samples launch, for one target.

    Args:
        target: Of :data:`EXECUTABLE`.
        chosen: What to call; default: everything.

    Yields:
        An execution a launch.

    Raises:
        ConfigError: The executor does not run the target's code.
        PTXError: A kernel did what it must not do.
    """
    if target.name not in EXECUTABLE:
        raise ConfigError(
            f"target '{target.name}': its code cannot be executed here; that of "
            f"{', '.join(EXECUTABLE)} can"
        )
    for case in tuple(samples()) if chosen is None else chosen:
        with executing(int(target.name.removeprefix("sm_")), counting=True) as records:
            case.call()
        for record in records:
            assert record.counters is not None
            yield Execution(
                case=case.name,
                kernel=record.launch.name,
                target=target.name,
                launch=record.launch,
                counters=record.counters,
            )


def unexecuted(target: Target, executions: Sequence[Execution]) -> list[str]:
    """Kernels of the library that run on a target and of which no execution is, by module and name.

    A kernel that the catalogue launches for other targets alone does not run on this one.
    """
    seen = {execution.launch.kernel for execution in executions}
    missing = {name: kernel for name, kernel in kernels().items() if kernel not in seen}
    if not missing:
        return []
    launched = {name: _launched(name) for name in TARGETS}
    anywhere = set().union(*launched.values())
    return sorted(
        name
        for name, kernel in missing.items()
        if kernel in launched[target.name] or kernel not in anywhere
    )


def _launched(target: str) -> set[object]:
    """The kernels that the catalogue launches for a target."""
    with recording(target) as launches:
        for case in cases():
            case.call()
    return {launch.kernel for launch in launches}
