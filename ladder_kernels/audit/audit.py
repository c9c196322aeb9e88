"""Every kernel in every configuration that ships, compiled for every target, and what is wrong.

What is compiled is what the launchers launch: each case of
:mod:`~ladder_kernels.audit.catalogue` is called with tensors that have shapes and no memory, for
each target, and its launches are recorded.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ladder_kernels import nf4, ops
from ladder_kernels.audit.binary import Binary, compile_kernel
from ladder_kernels.audit.catalogue import Case, cases, work_of
from ladder_kernels.audit.launches import Launch, recording
from ladder_kernels.audit.model import Work, modelled_seconds
from ladder_kernels.audit.targets import DEVICES, Target, target_of
from ladder_kernels.errors import BackendError

__all__ = ["Finding", "audit", "kernels", "unaudited"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One launch, compiled for one target.

    Attributes:
        case: What was called.
        kernel: Name.
        target: What for.
        launch: The launch.
        binary: What came out; ``None`` if it did not compile.
        seconds: Modelled, by device and part; see :mod:`~ladder_kernels.audit.model`.
        faults: What is wrong, in words; empty if nothing is.
    """

    case: str
    kernel: str
    target: str
    launch: Launch
    binary: Binary | None
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def occupancy(self) -> float:
        """Warps of it that a multiprocessor holds at once, of those that it could hold at most."""
        if self.binary is None:
            return 0.0
        target = target_of(self.target)
        return self.binary.resident_warps(target, _warps(self.launch)) / target.most_warps


def audit(targets: Sequence[Target], chosen: Sequence[Case] | None = None) -> Iterator[Finding]:
    """Compile what cases launch for targets.

    Args:
        targets: Of :data:`~ladder_kernels.audit.targets.TARGETS`.
        chosen: What to call; default: everything.

    Yields:
        A finding a launch and target. Launches of the same code are compiled once.
    """
    called = tuple(cases()) if chosen is None else chosen
    for target in targets:
        known: dict[object, Binary] = {}
        for case in called:
            with recording(target.name) as launches:
                case.call()
            for launch in launches:
                yield _finding(case, launch, target, known)


def _finding(case: Case, launch: Launch, target: Target, known: dict[object, Binary]) -> Finding:
    if launch.key not in known:
        try:
            known[launch.key] = compile_kernel(
                launch.kernel,
                launch.signature,
                launch.constants,
                target,
                attributes=launch.attributes,
                options=launch.options,
            )
        except BackendError as error:
            return Finding(
                case=case.name, kernel=launch.name, target=target.name, launch=launch,
                binary=None, faults=(str(error),),
            )  # fmt: skip
    binary = known[launch.key]
    work = work_of(launch)
    if work is None:
        return Finding(
            case=case.name, kernel=launch.name, target=target.name, launch=launch,
            binary=binary, faults=("a kernel that the catalogue does not know",),
        )  # fmt: skip
    programs, warps = _programs(launch), _warps(launch)
    seconds = {
        device.name: modelled_seconds(binary, work, device, programs=programs, warps=warps)
        for device in DEVICES
        if device.target == target.name
    }
    return Finding(
        case=case.name,
        kernel=launch.name,
        target=target.name,
        launch=launch,
        binary=binary,
        seconds=seconds,
        faults=tuple(_faults(binary, work, target)),
    )


def _warps(launch: Launch) -> int:
    return launch.options.get("num_warps", 4)


def _programs(launch: Launch) -> int:
    programs = 1
    for size in launch.grid:
        programs *= size
    return programs


def _faults(binary: Binary, work: Work, target: Target) -> Iterator[str]:
    if binary.spilled or binary.stack:
        yield f"{binary.spilled} spilled registers, {binary.stack} bytes of stack"
    if binary.shared > target.shared_limit:
        yield f"{binary.shared} bytes of shared memory, more than {target.shared_limit}"
    if work.operations and target.matrix_units and not binary.whole.matrix:
        yield "a matrix product without matrix instructions"


def kernels() -> dict[str, object]:
    """Every Triton kernel of the library, by module and name.

    They are in the modules ``gpu`` and ``gpu_...`` of the format and of each operation.
    """
    packages: list[Any] = [nf4]
    packages += [
        importlib.import_module(f"{ops.__name__}.{module.name}")
        for module in pkgutil.iter_modules(ops.__path__)
        if module.ispkg
    ]
    return {name: kernel for package in packages for name, kernel in _kernels_of(package)}


def _kernels_of(package: Any) -> Iterator[tuple[str, object]]:
    from triton.runtime.jit import JITFunction

    for module in pkgutil.iter_modules(package.__path__):
        if module.name == "gpu" or module.name.startswith("gpu_"):
            found = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
            for attribute, value in found.items():
                if isinstance(value, JITFunction) and attribute.endswith("_kernel"):
                    yield f"{value.__module__}.{attribute}", value


def unaudited(findings: Sequence[Finding]) -> list[str]:
    """Kernels of the library that none of the findings is about, by module and name."""
    seen = {finding.launch.kernel for finding in findings}
    return sorted(name for name, kernel in kernels().items() if kernel not in seen)
