"""``ladder-kernels audit``: compile every Triton kernel for every GPU and say what came out.

With ``--execute``, execute a few programs of each and say what a profiler would count.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ladder_kernels.cli.console import Verbose, print_json, say, table
from ladder_kernels.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from ladder_kernels.audit.audit import Finding
    from ladder_kernels.audit.catalogue import Case
    from ladder_kernels.audit.ptx import GlobalTraffic
    from ladder_kernels.audit.rows import Row
    from ladder_kernels.audit.targets import Target
    from ladder_kernels.audit.traffic import Execution

__all__ = ["command"]

_FAULTS = 1


def command(
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU to compile for, such as sm_86 or gfx942 (may be given several times); "
            "default: all, or sm_86 with --execute.",
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
    execute: Annotated[
        bool,
        typer.Option(
            "--execute",
            help="Execute a few programs of every kernel on this machine's CPU instead, and count "
            "memory accesses, bank conflicts and instructions.",
        ),
    ] = False,
    markdown: Annotated[
        Path | None,
        typer.Option(
            help="Compile everything for every target, execute every kernel for sm_86, and write "
            "the page with all tables to this file.",
            metavar="FILE",
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
    catalogue; with --execute, a kernel is not among the samples.
    """
    from ladder_kernels.launch import missing

    reason = missing()
    if reason is not None:
        raise BackendError(f"audit: {reason}")
    if markdown is not None:
        if target or only or execute or as_json:
            raise ConfigError("audit: --markdown is about everything and goes with no other option")
        faults = _write(markdown)
    elif execute:
        faults = _execute(target, only, as_json=as_json)
    else:
        faults = _compile(target, only, as_json=as_json)
    if faults:
        raise typer.Exit(_FAULTS)


def _targets(names: Sequence[str]) -> list[Target]:
    from ladder_kernels.audit.targets import target_of

    return [target_of(name) for name in names]


def _chosen(cases: Iterable[Case], only: Sequence[str] | None) -> list[Case]:
    return [case for case in cases if not only or case.name.startswith(tuple(only))]


# Compiled -------------------------------------------------------------------------------------


def _compile(
    target: Sequence[str] | None, only: Sequence[str] | None, *, as_json: bool
) -> list[str]:
    """Show what the compilers made; return the faults."""
    from ladder_kernels.audit.audit import unaudited
    from ladder_kernels.audit.catalogue import cases
    from ladder_kernels.audit.targets import TARGETS

    targets = _targets(target or list(TARGETS))
    findings = _findings(targets, _chosen(cases(), only))
    # Some kernels are not for every GPU: only all of them together can show what is forgotten.
    forgotten = [] if only or target else unaudited(findings)
    if as_json:
        print_json({"launches": list(map(_record, findings)), "unaudited": forgotten})
    else:
        _show(findings)
    faults = _faults(findings, forgotten)
    say(f"{len(findings)} launches, {len(targets)} targets, {len(faults)} faults")
    return faults


def _findings(targets: Sequence[Target], chosen: Sequence[Case]) -> list[Finding]:
    from ladder_kernels.audit.audit import audit

    findings: list[Finding] = []
    for finding in audit(targets, chosen):
        if not findings or findings[-1].target != finding.target:
            say(f"compiling for {finding.target}")
        findings.append(finding)
    return findings


def _faults(findings: Sequence[Finding], forgotten: Sequence[str]) -> list[str]:
    """Say what is wrong."""
    faults = [f"{f.target}: {f.case}, {f.kernel}: {fault}" for f in findings for fault in f.faults]
    faults += [f"{name}: no case of the catalogue launches it" for name in forgotten]
    for fault in faults:
        say(f"fault: {fault}")
    return faults


def _record(finding: Finding) -> dict[str, Any]:
    from ladder_kernels.audit.targets import target_of

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
        loop = binary.loop
        record |= {
            "registers": binary.registers,
            "spilled": binary.spilled,
            "stack": binary.stack,
            "shared": binary.shared,
            "shared_limit": target_of(finding.target).shared_limit,
            "occupancy": finding.occupancy,
            "instructions": dict(binary.whole.classes),
            "matrix_instructions": dict(binary.whole.matrix_kinds),
            "load_bits": dict(binary.whole.load_bits),
            "loop": None if loop is None else dict(loop.classes),
            "loop_load_bits": None if loop is None else dict(loop.load_bits),
            "loop_instructions_per_matrix_instruction": (
                loop.total / loop.matrix if loop is not None and loop.matrix else None
            ),
            "modelled_seconds": {name: dict(parts) for name, parts in finding.seconds.items()},
            "bound": {
                name: max(parts, key=parts.__getitem__) for name, parts in finding.seconds.items()
            },
        }
    return record


def _show(findings: Sequence[Finding]) -> None:
    from ladder_kernels.audit.rows import rows

    header = (
        "target", "case", "kernel", "registers", "spills", "shared", "occupancy", "matrix",
        "loads", "loop", "bound", "modelled",
    )  # fmt: skip
    table(header, [(row.target, row.case, row.kernel, *_cells(row)) for row in rows(findings)])


def _cells(row: Row) -> tuple[str, ...]:
    from ladder_kernels.audit.rows import bits_in_words

    if not row.binaries:
        return ("does not compile", *[""] * 8)
    per_matrix = row.instructions_per_matrix
    return (
        str(row.most(lambda binary: binary.registers)),
        str(row.most(lambda binary: binary.spilled + binary.stack)),
        f"{row.most(lambda binary: binary.shared) / 1024:.0f} KiB",
        f"{row.occupancy:.0%}",
        ", ".join(row.matrix_kinds),
        bits_in_words(row.load_bits),
        "" if per_matrix is None else f"{per_matrix:.1f} a matrix instruction",
        ", ".join(sorted({row.bound(device) for device in row.devices})),
        ", ".join(f"{device}: {row.seconds(device) * 1e6:,.0f} us" for device in row.devices),
    )


# Executed -------------------------------------------------------------------------------------


def _execute(
    target: Sequence[str] | None, only: Sequence[str] | None, *, as_json: bool
) -> list[str]:
    """Show what was counted; return the faults."""
    from ladder_kernels.audit.samples import samples
    from ladder_kernels.audit.traffic import unexecuted
    from ladder_kernels.launch import HOST_TARGET

    executions: list[Execution] = []
    forgotten = []
    for each in _targets(target or [HOST_TARGET]):
        found = _executions(each, _chosen(samples(), only))
        if not only:
            forgotten += [f"{each.name}: {name}" for name in unexecuted(each, found)]
        executions += found
    if as_json:
        print_json({"launches": list(map(_counts, executions)), "unexecuted": forgotten})
    else:
        _show_traffic(executions)
    for execution in executions:
        for remark in execution.remarks:
            say(f"slow: {execution.target}: {execution.case}, {execution.kernel}: {remark}")
    return _not_executed(forgotten)


def _executions(target: Target, chosen: Sequence[Case]) -> list[Execution]:
    from ladder_kernels.audit.traffic import execute_samples

    say(f"executing code for {target.name}")
    return list(execute_samples(target, chosen))


def _not_executed(forgotten: Sequence[str]) -> list[str]:
    """Say what no sample launches."""
    faults = [f"{name}: no sample launches it" for name in forgotten]
    for fault in faults:
        say(f"fault: {fault}")
    return faults


def _counts(execution: Execution) -> dict[str, Any]:
    counters = execution.counters
    return {
        "target": execution.target,
        "sample": execution.case,
        "kernel": execution.kernel,
        "grid": execution.launch.grid,
        "constants": {name: str(value) for name, value in execution.launch.constants.items()},
        "options": dict(execution.launch.options),
        "instructions": {**counters.instructions, "total": counters.total},
        "loads": _traffic(counters.loads, counters.loads_of),
        "stores": _traffic(counters.stores, counters.stores_of),
        "shared": {
            "requests": counters.shared.requests,
            "wavefronts": counters.shared.wavefronts,
            "conflicts": counters.shared.conflicts,
            "slowdown": counters.shared.slowdown,
        },
        "remarks": execution.remarks,
    }


def _traffic(total: GlobalTraffic, of_arguments: dict[str, GlobalTraffic]) -> dict[str, Any]:
    def one(traffic: GlobalTraffic) -> dict[str, Any]:
        return {
            "requests": traffic.requests,
            "sectors": traffic.sectors,
            "ideal_sectors": traffic.ideal_sectors,
            "coalescing": traffic.coalescing,
            "bytes": traffic.bytes,
            "bytes_moved": traffic.bytes_moved,
        }

    return one(total) | {"arguments": {name: one(each) for name, each in of_arguments.items()}}


def _show_traffic(executions: Sequence[Execution]) -> None:
    header = ("target", "sample", "kernel", "loads", "stores", "shared", "moved", "instructions")
    table(
        header,
        [(each.target, each.case, each.kernel, *_traffic_cells(each)) for each in executions],
    )
    say(
        "loads and stores: 32-byte sectors a request / what its bytes need; shared: passes likewise"
    )


def _traffic_cells(execution: Execution) -> tuple[str, ...]:
    counters = execution.counters
    loads, stores, shared = counters.loads, counters.stores, counters.shared
    return (
        _of_ideal(loads.requests, loads.sectors, loads.ideal_sectors),
        _of_ideal(stores.requests, stores.sectors, stores.ideal_sectors),
        _of_ideal(shared.requests, shared.wavefronts, shared.wavefronts - shared.conflicts),
        f"{(loads.bytes_moved + stores.bytes_moved) / 1024:,.0f} KiB",
        f"{counters.total:,}",
    )


def _of_ideal(requests: int, taken: int, needed: int) -> str:
    return f"{taken / requests:.1f} / {needed / requests:.1f}" if requests else ""


# Both -----------------------------------------------------------------------------------------


def _write(path: Path) -> list[str]:
    """Write the page about everything; return the faults."""
    from ladder_kernels.audit.audit import unaudited
    from ladder_kernels.audit.catalogue import cases
    from ladder_kernels.audit.page import page
    from ladder_kernels.audit.samples import samples
    from ladder_kernels.audit.targets import TARGETS
    from ladder_kernels.audit.traffic import unexecuted
    from ladder_kernels.launch import HOST_TARGET

    began = time.monotonic()
    (host,) = _targets([HOST_TARGET])
    executions = _executions(host, list(samples()))
    findings = _findings(list(TARGETS.values()), list(cases()))
    path.write_text(page(findings, executions), encoding="utf-8")
    faults = _faults(findings, unaudited(findings)) + _not_executed(unexecuted(host, executions))
    minutes = (time.monotonic() - began) / 60
    say(f"wrote {path} in {minutes:.0f} minutes; {len(faults)} faults")
    return faults
