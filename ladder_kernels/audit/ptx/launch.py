"""Triton kernels, compiled for an NVIDIA GPU and executed here.

Within :func:`executing`, ``kernel[grid](...)`` on CPU tensors compiles the kernel as it would be
for the GPU and runs the PTX on the CPU, in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ladder_kernels.audit.launches import Launch, launch_of
from ladder_kernels.audit.ptx.counters import Counters
from ladder_kernels.audit.ptx.execution import Kernel, execute
from ladder_kernels.audit.ptx.memory import GARBAGE
from ladder_kernels.audit.ptx.state import Schedule
from ladder_kernels.backend import use_backend
from ladder_kernels.errors import BackendError
from ladder_kernels.launch import missing, on_host

__all__ = ["LaunchRecord", "executing"]


@dataclass(frozen=True)
class LaunchRecord:
    """One launch that was executed.

    Attributes:
        name: The kernel's name.
        launch: What was launched.
        grid: How many blocks.
        executed: Instructions, counted once for each warp.
        counters: What was counted, or None if nothing was.
        compiled: What Triton compiled: ``compiled.asm["ptx"]``, ``compiled.metadata.shared``.
    """

    name: str
    launch: Launch = field(repr=False)
    grid: tuple[int, ...]
    executed: int
    counters: Counters | None
    compiled: Any = field(repr=False)


@contextmanager
def executing(
    target: int = 86,
    *,
    lockstep: bool = True,
    reverse: bool = False,
    late_copies: bool = True,
    counting: bool = False,
) -> Iterator[list[LaunchRecord]]:
    """Within it, Triton kernels launched on CPU tensors run as PTX of a GPU, here and in place.

    The library's operations on CPU tensors run their Triton kernels, too. An autotuner takes its
    first configuration. Not for several threads at once; may be nested.

    Args:
        target: The GPU's compute capability times ten: 75, 80, 86, 89 or 120.
        lockstep: As in :class:`~ladder_kernels.audit.ptx.Schedule`.
        reverse: As there.
        late_copies: As there.
        counting: Whether launches are counted, which takes time.

    Yields:
        A list to which every launch adds its record.

    Raises:
        BackendError: Triton is not installed.
    """
    reason = missing()
    if reason is not None:
        raise BackendError(reason)
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    records: list[LaunchRecord] = []
    launcher = _Launcher(target, Schedule(lockstep, reverse, late_copies), counting, records)

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        return launcher.run(launch_of(self, grid, args, options), compile_only=warmup)

    def run_first(self: Any, *args: Any, **options: Any) -> Any:
        return self.fn.run(*args, **{**options, **self.configs[0].all_kwargs()})

    before = JITFunction.run, Autotuner.run
    JITFunction.run, Autotuner.run = run, run_first
    try:
        with on_host("executor", f"sm_{target}"), use_backend("triton"):
            yield records
    finally:
        JITFunction.run, Autotuner.run = before


class _Launcher:
    """Compiles and runs launches, and remembers what it compiled."""

    def __init__(
        self, target: int, schedule: Schedule, counting: bool, records: list[LaunchRecord]
    ) -> None:
        self._target = target
        self._schedule = schedule
        self._counting = counting
        self._records = records
        self._compiled: dict[tuple[Any, ...], tuple[Any, Kernel]] = {}

    def run(self, launch: Launch, *, compile_only: bool) -> Any:
        """Compile a launch, unless that was done before, execute it, and give what was compiled."""
        if launch.key not in self._compiled:
            compiled = _compile(launch, self._target)
            kernel = Kernel.parse(compiled.asm["ptx"], compiled.metadata.name)
            self._compiled[launch.key] = compiled, kernel
        compiled, kernel = self._compiled[launch.key]
        if not compile_only:
            self._execute(launch, compiled, kernel)
        return compiled

    def _execute(self, launch: Launch, compiled: Any, kernel: Kernel) -> None:
        metadata = compiled.metadata
        arguments = dict(launch.values)
        grid = tuple(int(size) for size in launch.grid)
        scratch = getattr(metadata, "global_scratch_size", 0) * int(np.prod(grid))
        if scratch:
            arguments["(scratch memory)"] = np.full(scratch, GARBAGE, np.uint8)
        counters = Counters() if self._counting else None
        executed = execute(
            kernel,
            arguments,
            grid,
            warps=metadata.num_warps,
            shared_bytes=metadata.shared,
            schedule=self._schedule,
            counters=counters,
        )
        self._records.append(LaunchRecord(kernel.name, launch, grid, executed, counters, compiled))


def _compile(launch: Launch, target: int) -> Any:
    """Compile for an NVIDIA GPU, which need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes: dict[Any, Any] = dict(launch.attributes)
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", target, 32), options=dict(launch.options)
    )
