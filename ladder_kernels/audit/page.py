"""The page with the audit's tables, in Markdown: what was compiled, executed and modelled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ladder_kernels.audit.audit import Finding
from ladder_kernels.audit.launches import Launch
from ladder_kernels.audit.ptx import Counters
from ladder_kernels.audit.rows import Row, bits_in_words, rows
from ladder_kernels.audit.targets import DEVICES, TARGETS
from ladder_kernels.audit.traffic import Execution

__all__ = ["page"]

_TOKENS = 2048
# Consumer GPUs in detail, all targets in short.
_DETAILED = ("sm_86", "sm_89", "sm_120")
_COMMAND = "ladder-kernels audit --markdown ladder_kernels/audit/README.md"
# In short: what a training step is made of.
_MAIN = (
    "nf4_linear q M=2048",
    "nf4_linear down M=2048",
    "nf4_linear_transposed down M=2048",
    "nf4_swiglu M=2048",
    "nf4_linear_int8 down M=2048",
    "nf4_swiglu_int8 M=2048",
    "nf4 dequantize 18944 x 3584",
    "rung_merge gate, two taps",
    "rung_merge_backward gate, two taps",
    "side_mlp d=224",
    "side_mlp_backward d=224",
    "linear_cross_entropy, NF4 head",
    "rms_norm with residual",
    "rotary",
)
_NOT_ALL = "†"

Code = tuple[str, tuple[Any, ...]]
"""A target and a launch's key."""

_INTRODUCTION = """# The GPU kernels: what the compilers make of them, and what they do

Every launch of a 7B model's training step (Qwen2.5-7B's shapes, 2,048 tokens, a ladder at a
sixteenth of its width, bfloat16) was **compiled** for every target below, without a GPU, and its
machine code read. A few programs of every kernel were **executed**: the PTX compiled for {host}
ran on a CPU, in numpy, which counts what a hardware profiler counts. Times are **modelled**.
Nothing on this page was measured on a GPU. Written by `{command}`,
which takes about a minute a target on two busy cores; `ladder-kernels audit --json` and
`ladder-kernels audit --execute --json` give the same as data.

{faults}

**The model** (`model.py`): four parts of a multiprocessor work at the same time and the busiest of
them sets the pace: *matrix* (tensor cores, at the rate that the maker publishes), *issue*
(instructions of all warps, four a clock), *shared* (passes over shared memory, one a clock, no
bank conflicts) and *memory* (bytes that must cross the GPU's memory bus at least once). As many
programs as fit run at once, and a last turn that is not full costs as much as a full one. There are
no latencies, caches or falling clocks in it: a time is a lower bound, good for saying what bounds a
kernel and for ranking configurations.

**To measure** on a GPU, `make bench` there verifies and times the same calls.
"""


def page(findings: Sequence[Finding], executions: Sequence[Execution]) -> str:
    """Write the page.

    Args:
        findings: Of every case for every target.
        executions: Of every sample for one of the detailed targets.
    """
    traffic: dict[Code, Counters] = {
        (execution.target, execution.launch.key): execution.counters for execution in executions
    }
    host = ", ".join(sorted({execution.target for execution in executions}))
    large = [row for row in rows(findings) if _tokens(row.case) >= _TOKENS]
    detailed = [row for row in large if row.target in _DETAILED]
    parts = [
        _INTRODUCTION.format(host=host, command=_COMMAND, faults=_faults(findings)),
        "## In short\n\nModelled microseconds of a call with 2,048 tokens, and what bounds it.\n",
        _summary(large),
        _times_heading(),
        _times(large),
        _code_heading(host),
        _code(detailed, traffic),
        _remarks(executions),
        "## Every target\n\nRegisters of a thread / KiB of shared memory of a program, the most of "
        "all cases (1 to 2,048 tokens); a dash where the operation runs otherwise.\n",
        _targets(findings),
    ]
    return "\n".join(parts)


def _tokens(case: str) -> int:
    """Of a case; those that do not say have all of them."""
    found = re.search(r"M=(\d+)$", case)
    return int(found[1]) if found else _TOKENS


def _faults(findings: Sequence[Finding]) -> str:
    faults = [finding for finding in findings if finding.faults]
    if faults:
        lines = [f"- {f.target}: {f.case}, `{f.kernel}`: {'; '.join(f.faults)}" for f in faults]
        return "Faults:\n\n" + "\n".join(lines)
    return (
        f"Of {len(findings):,} launches for {len({f.target for f in findings})} targets, none "
        "spills a register or uses stack, none needs more shared memory than its target has, and "
        "every matrix product is made of matrix instructions where the target has them."
    )


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines), ""])


def _by_case(found: Iterable[Row]) -> Mapping[str, Mapping[str, list[Row]]]:
    """Rows by case, then by kernel."""
    cases: dict[str, dict[str, list[Row]]] = {}
    for row in found:
        cases.setdefault(row.case, {}).setdefault(row.kernel, []).append(row)
    return cases


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def _on(device: str, found: Iterable[Row]) -> tuple[float, str, bool]:
    """Modelled time on a device, what bounds the longest part of it, and whether that is all."""
    there = [row for row in found if device in row.devices]
    if not there:
        return 0.0, "", True
    longest = max(there, key=lambda row: row.seconds(device))
    alone = {row.kernel for row in there}
    unpacks = "_nf4_dequantize_kernel" in alone
    multiplies = any(b.whole.matrix for row in there for b in row.binaries)
    whole = multiplies or not unpacks or there[0].case.startswith("nf4 dequantize")
    return sum(row.seconds(device) for row in there), longest.bound(device), whole


def _summary(large: Sequence[Row]) -> str:
    cases = _by_case(large)
    lines = []
    for case in _MAIN:
        found = [row for group in cases.get(case, {}).values() for row in group]
        cells = []
        for device in DEVICES:
            seconds, bound, whole = _on(device.name, found)
            mark = "" if whole else f" {_NOT_ALL}"
            cells.append(f"{_microseconds(seconds)}, {bound}{mark}" if seconds else "")
        lines.append((case, *cells))
    header = ("call", *(device.name for device in DEVICES))
    return _table(header, lines) + _DAGGER


_DAGGER = f"""
{_NOT_ALL} *Unpacked*: the weight is dequantised into a workspace, which is what is counted, and
multiplied by PyTorch, which is not.
"""


def _times_heading() -> str:
    return (
        "## Modelled times\n\nMicroseconds of all launches of a kernel in a call with 2,048 "
        "tokens. *Bound* is what the busiest part is, by device where devices differ.\n"
    )


def _times(large: Sequence[Row]) -> str:
    lines = []
    for case, by_kernel in _by_case(large).items():
        for kernel, group in by_kernel.items():
            of_device = {device: row for row in group for device in row.devices}
            if not of_device:
                continue
            cells = [
                _microseconds(of_device[d.name].seconds(d.name)) if d.name in of_device else ""
                for d in DEVICES
            ]
            launches = _joined([str(len(row.findings)) for row in of_device.values()])
            bounds = _joined([row.bound(device) for device, row in of_device.items()])
            lines.append((case, f"`{kernel}`", launches, bounds, *cells))
    return _table(("call", "kernel", "launches", "bound", *(d.name for d in DEVICES)), lines)


def _joined(values: Sequence[str]) -> str:
    """Distinct values in their order."""
    return ", ".join(dict.fromkeys(values))


def _code_heading(host: str) -> str:
    limit = TARGETS[host].shared_limit // 1024 if host in TARGETS else 0
    return (
        f"## Machine code of {', '.join(_DETAILED)}\n\nOne line a code that calls with 2,048 "
        "tokens launch, the numbers of the three targets "
        "where they differ, in this order. "
        f"*Shared*: KiB of a program, of {limit} that there are. *Occupancy*: resident warps of "
        "those that a multiprocessor can hold. *Matrix instructions*: of the whole code, by kind. "
        "*Loads*: global loads of a thread in the main loop, by their width in bits. *Loop*: "
        "instructions of the main loop for each matrix instruction. Executed for "
        f"{host}: *coalescing*, 32-byte sectors that hold the bytes of a request of a warp, of "
        "those that it touches (loads / stores; what a later request touches again counts again, "
        "though a cache holds it); *bank conflicts*, passes over shared memory for each that the "
        "bytes need.\n"
    )


def _code(detailed: Sequence[Row], traffic: Mapping[Code, Counters]) -> str:
    """One line a kernel and configuration."""
    groups: dict[tuple[str, str], dict[str, list[Finding]]] = {}
    for row in detailed:
        for finding in row.findings:
            group = groups.setdefault((row.kernel, _configuration(finding.launch)), {})
            group.setdefault(row.target, []).append(finding)
    lines = []
    for (kernel, configuration), by_target in sorted(groups.items()):
        found = [
            Row(target=target, case="", kernel=kernel, findings=by_target[target])
            for target in _DETAILED
            if target in by_target
        ]
        targets = "" if len(found) == len(_DETAILED) else _joined([row.target for row in found])
        executed = [
            traffic[finding.target, finding.launch.key]
            for row in found
            for finding in row.findings
            if (finding.target, finding.launch.key) in traffic
        ]
        lines.append(
            (
                f"`{kernel}`",
                f"{configuration}{f' ({targets})' if targets else ''}",
                _each(found, lambda row: str(row.most(lambda binary: binary.registers))),
                _each(found, lambda row: f"{row.most(lambda b: b.shared) / 1024:.0f}"),
                _each(found, lambda row: f"{row.occupancy:.0%}"),
                _each(found, _kinds),
                _each(found, lambda row: bits_in_words(row.load_bits)),
                _each(found, _per_matrix),
                *_counted(executed),
            )
        )
    header = (
        "kernel", "configuration", "registers", "shared", "occupancy", "matrix instructions",
        "loads", "loop", "coalescing", "bank conflicts",
    )  # fmt: skip
    return _table(header, lines)


def _remarks(executions: Sequence[Execution]) -> str:
    lines = dict.fromkeys(
        f"- `{each.kernel}`: {remark}" for each in executions for remark in each.remarks
    )
    if not lines:
        return (
            "No argument that makes up a tenth of a kernel's traffic takes twice the sectors that "
            "its bytes need, and no kernel twice the passes over shared memory.\n"
        )
    return "Worse than half of the ideal:\n\n" + "\n".join(lines) + "\n"


def _configuration(launch: Launch) -> str:
    """A launch's tile and options: numbers among its constants, warps, stages."""
    tile = [
        f"{name} {value}"
        for name, value in launch.constants.items()
        if name.isupper() and type(value) is int and not name.endswith("BLOCKSIZE")
    ]
    options = [
        f"{launch.options[option]} {name}"
        for option, name in (("num_warps", "warps"), ("num_stages", "stages"))
        if option in launch.options
    ]
    return ", ".join([*tile, *options])


def _each(found: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """A cell of each target, or one if all are alike."""
    cells = [cell(row) for row in found]
    return cells[0] if len(set(cells)) == 1 else " / ".join(each or "none" for each in cells)


def _kinds(row: Row) -> str:
    most: dict[str, int] = {}
    for binary in row.binaries:
        for name, count in binary.whole.matrix_kinds.items():
            most[name] = max(most.get(name, 0), count)
    return ", ".join(f"{count} x {name}" for name, count in sorted(most.items()))


def _per_matrix(row: Row) -> str:
    value = row.instructions_per_matrix
    return "" if value is None else f"{value:.1f}"


def _counted(executed: Sequence[Counters]) -> tuple[str, str]:
    """Coalescing and bank conflicts of all executions of a code."""
    if not executed:
        return "", ""
    total = Counters()
    for counters in executed:
        total.add(counters)
    cells = [
        f"{traffic.coalescing:.0%}" if traffic.requests else "-"
        for traffic in (total.loads, total.stores)
    ]
    return " / ".join(cells), f"{total.shared.slowdown:.2f}" if total.shared.requests else ""


def _targets(findings: Sequence[Finding]) -> str:
    """One line a kernel, one column a target."""
    most: dict[str, dict[str, Row]] = {}
    for finding in findings:
        by_target = most.setdefault(finding.kernel, {})
        known = by_target.get(finding.target)
        group = [*([] if known is None else known.findings), finding]
        by_target[finding.target] = Row(
            target=finding.target, case="", kernel=finding.kernel, findings=group
        )
    names = list(dict.fromkeys(finding.target for finding in findings))
    lines = [
        (f"`{kernel}`", *(_need(by_target.get(name)) for name in names))
        for kernel, by_target in sorted(most.items())
    ]
    return _table(("kernel", *names), lines)


def _need(row: Row | None) -> str:
    if row is None:
        return "-"
    registers = row.most(lambda binary: binary.registers)
    mark = " **fault**" if any(finding.faults for finding in row.findings) else ""
    return f"{registers} / {row.most(lambda binary: binary.shared) / 1024:.0f}{mark}"
