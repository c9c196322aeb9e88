"""Every kernel in every configuration that ships, compiled for every target, and what is wrong.

What is compiled is what the launchers launch: each case of
:mod:`~ladder_kernels.audit.catalogue` is called with tensors that have shapes and no memory, for
each target, and its launches are recorded.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ladder_kernels import nf4, ops
from ladder_kernels.audit.binary import Binary, compile_kernel
from ladder_kernels.audit.catalogue import CASES, Case, work_of
from ladder_kernels.audit.launches import Launch, recording
from ladder_kernels.audit.model import Work, modelled_seconds
from ladder_kernels.audit.targets import DEVICES, Target
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


def audit(targets: Sequence[Target], cases: Sequence[Case] = CASES) -> Iterator[Finding]:
    """Compile what ``cases`` launch for ``targets``.

    Args:
        targets: Of :data:`~ladder_kernels.audit.targets.TARGETS`.
        cases: What to call.

    Yields:
        A finding a launch and target. Launches of the same code are compiled once.
    """
    for target in targets:
        known: dict[object, Binary] = {}
        for case in cases:
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
    programs, warps = _programs(launch), launch.options.get("num_warps", 4)
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
    """Every Triton kernel of the library, by module and name."""
    from triton.runtime.jit import JITFunction

    names = [f"{nf4.__name__}.gpu"]
    names += [
        f"{ops.__name__}.{module.name}.gpu"
        for module in pkgutil.iter_modules(ops.__path__)
        if module.ispkg
    ]
    found = {}
    for name in names:
        if importlib.util.find_spec(name) is None:
            continue
        for attribute, value in vars(importlib.import_module(name)).items():
            if isinstance(value, JITFunction) and attribute.endswith("_kernel"):
                found[f"{value.__module__}.{attribute}"] = value
    return found


def unaudited(findings: Sequence[Finding]) -> list[str]:
    """Kernels of the library that none of the findings is about, by module and name."""
    seen = {finding.launch.kernel for finding in findings}
    return sorted(name for name, kernel in kernels().items() if kernel not in seen)
