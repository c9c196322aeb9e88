"""``ladder-kernels audit``: compile every Triton kernel for every GPU and say what came out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ladder_kernels.cli.console import Verbose, print_json, say, table
from ladder_kernels.errors import BackendError

if TYPE_CHECKING:
    from ladder_kernels.audit.audit import Finding

__all__ = ["command"]

_FAULTS = 1


def command(
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU to compile for, such as sm_86 or gfx942 (may be given several times); "
            "default: all.",
            metavar="NAME",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compile: cases whose name begins so, such as nf4_linear (may be given "
            "several times); default: all.",
            metavar="NAME",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compile the GPU kernels, without a GPU, and check registers, memory and instructions.

    Every launch of a 7B model's training step at 2K tokens is compiled for every target, which
    takes about a minute each. Times are modelled from the machine code and published rates of
    devices, not measured. Exit code 1: a kernel spills registers, needs more shared memory than
    there is, multiplies matrices without matrix instructions, does not compile or is not in the
    catalogue.
    """
    from ladder_kernels.launch import missing

    reason = missing()
    if reason is not None:
        raise BackendError(f"audit: {reason}")
    from ladder_kernels.audit.audit import audit, unaudited
    from ladder_kernels.audit.catalogue import cases
    from ladder_kernels.audit.targets import TARGETS, target_of

    targets = [target_of(name) for name in target] if target else list(TARGETS.values())
    chosen = [case for case in cases() if not only or case.name.startswith(tuple(only))]
    findings: list[Finding] = []
    for finding in audit(targets, chosen):
        if not findings or findings[-1].target != finding.target:
            say(f"compiling for {finding.target}")
        findings.append(finding)
    # Some kernels are not for every GPU: only all of them together can show what is forgotten.
    forgotten = [] if only or target else unaudited(findings)
    if as_json:
        print_json({"launches": list(map(_record, findings)), "unaudited": forgotten})
    else:
        _show(findings)
    faults = [f"{f.target}: {f.case}, {f.kernel}: {fault}" for f in findings for fault in f.faults]
    faults += [f"{name}: no case of the catalogue launches it" for name in forgotten]
    for fault in faults:
        say(f"fault: {fault}")
    say(f"{len(findings)} launches, {len(targets)} targets, {len(faults)} faults")
    if faults:
        raise typer.Exit(_FAULTS)


def _record(finding: Finding) -> dict[str, Any]:
    binary, launch = finding.binary, finding.launch
    record: dict[str, Any] = {
        "target": finding.target,
        "case": finding.case,
        "kernel": finding.kernel,
        "grid": launch.grid,
        "constants": {name: str(value) for name, value in launch.constants.items()},
        "options": dict(launch.options),
        "faults": finding.faults,
    }
    if binary is not None:
        record |= {
            "registers": binary.registers,
            "spilled": binary.spilled,
            "stack": binary.stack,
            "shared": binary.shared,
            "instructions": dict(binary.whole.classes),
            "loop": None if binary.loop is None else dict(binary.loop.classes),
            "modelled_seconds": {name: dict(parts) for name, parts in finding.seconds.items()},
        }
    return record


def _show(findings: Sequence[Finding]) -> None:
    header = (
        "target", "case", "kernel", "registers", "shared", "loop", "matrix", "bound", "modelled",
    )  # fmt: skip
    table(header, _lines(findings))


def _lines(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """A line a case, kernel and target; what several launches of it take is added up."""
    lines: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        lines.setdefault((finding.target, finding.case, finding.kernel), []).append(finding)
    return [(*key, *_cells(group)) for key, group in lines.items()]


def _cells(group: Sequence[Finding]) -> tuple[str, ...]:
    binaries = [finding.binary for finding in group if finding.binary is not None]
    if not binaries:
        return ("does not compile", "", "", "", "", "")
    loops = [binary.loop for binary in binaries if binary.loop is not None]
    devices = [
        f"{device}: {max(parts.values()) * len(group) * 1e6:,.0f} us"
        for device, parts in group[0].seconds.items()
    ]
    bounds = {max(parts, key=parts.__getitem__) for parts in group[0].seconds.values()}
    return (
        str(max(binary.registers for binary in binaries)),
        f"{max(binary.shared for binary in binaries) / 1024:.0f} KiB",
        str(max((loop.total for loop in loops), default="")),
        str(max((loop.matrix for loop in loops), default="")),
        ", ".join(sorted(bounds)),
        ", ".join(devices),
    )
