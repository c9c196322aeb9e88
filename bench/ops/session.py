"""A run of the benchmark: what pytest's items share, and what becomes of their times."""

from __future__ import annotations

import functools
import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import rows as results
from bench.hold import held_suffix
from bench.ops.cases import Case
from bench.ops.definitions import DEQUANTISED, OURS
from bench.ops.memory import bytes_beyond_apart
from bench.ops.trial import Trial
from bench.peak import KINDS
from bench.roofline import Roofline

__all__ = ["FILE", "Clock", "Finding", "Session"]

FILE = "ops.csv"
"""Where rows are."""

_PACKAGES = ("torch", "bitsandbytes", "numpy", "triton", "liger-kernel")
_PEAKS_EVERY = 60.0


class Clock:
    """Shows recorded times: what pytest-benchmark measures by it is what was recorded."""

    def __init__(self) -> None:
        self._now = 0.0
        self._left: list[float] = []

    def __call__(self) -> float:
        """Seconds."""
        return self._now

    def record(self, seconds: Sequence[float]) -> None:
        """Take what the next calls of :meth:`advance` will seem to take."""
        self._left = list(seconds)

    def advance(self) -> None:
        """Seem to work."""
        if self._left:
            self._now += self._left.pop(0)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one candidate.

    Attributes:
        case: What was measured.
        candidate: Of which.
        seconds: Quantiles of 20, 50 and 80 %.
        between: Bytes that other candidates went through between its calls.
        memory: Bytes beyond inputs and results; ``None`` if they were not measured.
    """

    case: Case
    candidate: str
    seconds: tuple[float, float, float]
    between: float
    memory: int | None


@dataclass(kw_only=True)
class Session:
    """A run.

    Attributes:
        device: Where.
        isa: What the processor is held to.
        seconds: How long the candidates of a case may take together, more or less.
        at_least: Calls of each, however long they are.
        roofline: Of the device.
        findings: So far.
    """

    device: torch.device
    isa: str | None
    seconds: float
    at_least: int
    roofline: Roofline
    findings: list[Finding] = field(default_factory=list)
    _next_peaks: float = 0.0
    _of: Case | None = None
    _times: dict[str, list[float]] = field(default_factory=dict)
    _failures: dict[str, Exception] = field(default_factory=dict)

    @classmethod
    def here(cls, *, isa: str | None, seconds: float, at_least: int) -> Session:
        """On the GPU if there is one, else on this processor."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        roofline = Roofline.of(device, isa)
        return cls(device=device, isa=isa, seconds=seconds, at_least=at_least, roofline=roofline)

    def times(self, case: Case, candidate: str, together: Sequence[str]) -> list[float]:
        """Seconds of each call of a candidate.

        The first that is asked for makes all of the case take turns.

        Args:
            case: What is measured.
            candidate: Which times are wanted.
            together: The candidates that take turns.

        Raises:
            RuntimeError: The candidate's result is wrong; it was not timed.
        """
        if case != self._of:
            self._measure_peaks()
            self._of, self._times, self._failures = case, {}, {}
            trial = Trial(case, self.device)
            trial.run(together, seconds=self.seconds, at_least=self.at_least)
            self._times, self._failures = trial.seconds, trial.failures
        if candidate in self._failures:
            raise self._failures[candidate]
        return self._times[candidate]

    def _measure_peaks(self) -> None:
        """Before the first case, and now and then: the machine may do less at times."""
        if time.monotonic() > self._next_peaks:
            self.roofline.measure()
            self._next_peaks = time.monotonic() + _PEAKS_EVERY

    def note(self, case: Case, candidate: str, seconds: Sequence[float]) -> None:
        """Keep what pytest-benchmark has of a candidate; measure its memory if that is wanted."""
        low, median, high = np.quantile(seconds, (0.2, 0.5, 0.8))
        dense = case.definition.weights(case.sizes) * getattr(torch, case.dtype).itemsize
        memory = None
        if case.memory:
            memory = bytes_beyond_apart(case, candidate, self.device)
        self.findings.append(
            Finding(
                case=case,
                candidate=candidate,
                seconds=(float(low), float(median), float(high)),
                between=dense if DEQUANTISED in self._times else 0.0,
                memory=memory,
            )
        )

    def share(self, finding: Finding) -> tuple[float, float, float]:
        """Of the time that an operation takes at least in the time that it took; quantiles."""
        bound = self.roofline.bound(finding.case.ideal, finding.between)
        low, median, high = finding.seconds
        return bound / high, bound / median, bound / low

    def rows(self) -> list[results.Row]:
        """Everything that was found, and the peaks."""
        return [row for finding in self.findings for row in self._rows_of(finding)] + self._peaks()

    def _rows_of(self, finding: Finding) -> list[results.Row]:
        case, ideal = finding.case, finding.case.ideal

        def row(
            metric: str, figures: tuple[float, float, float], evidence: str = "measured"
        ) -> results.Row:
            return self._row(
                f"ops/{case.op}", finding.candidate, metric, figures, evidence,
                model=case.model, shape=case.shape, dtype=case.dtype,
            )  # fmt: skip

        found = [row("seconds", finding.seconds), row("share of the bound", self.share(finding))]
        low, median, high = finding.seconds
        if ideal.flops:
            rates = (ideal.flops / high, ideal.flops / median, ideal.flops / low)
            found += [
                row("FLOP/byte", _once(ideal.intensity), "modelled"),
                row("FLOP/s", rates),
            ]
        if finding.memory is not None:
            found.append(row("bytes: beyond inputs and results", _once(finding.memory)))
        return found

    def _peaks(self) -> list[results.Row]:
        name = "GPU" if self.device.type == "cuda" else "processor"

        def row(metric: str, rate: float, shape: str = "", dtype: str = "") -> results.Row:
            about = {"model": "", "shape": shape, "dtype": dtype}
            return self._row("ops/peak", name, metric, _once(rate), "measured", **about)

        roofline = self.roofline
        found = [row("FLOP/s", roofline.flops[kind], dtype=kind) for kind in KINDS]
        found.append(row("bytes/s", roofline.memory))
        caches = [size for size in roofline.bytes_read if size < max(roofline.bytes_read)]
        return found + [
            row(f"bytes/s: {size >> 10} KiB again and again", roofline.bytes_read[size])
            for size in caches
        ]

    def _row(
        self,
        bench: str,
        candidate: str,
        metric: str,
        figures: tuple[float, float, float],
        evidence: str,
        **about: Any,
    ) -> results.Row:
        low, median, high = figures
        return results.Row(
            bench=bench,
            candidate=candidate,
            metric=metric,
            low=low,
            median=median,
            high=high,
            evidence=evidence,
            **about,
            **self._run,
        )

    @functools.cached_property
    def _run(self) -> dict[str, Any]:
        """What all rows have in common."""
        return {
            "threads": torch.get_num_threads(),
            "device": results.device_name() + held_suffix(self.isa),
            "versions": results.versions(*filter(_is_installed, _PACKAGES)),
            "commit": results.commit(),
        }

    def write(self, folder: Path | None) -> Path:
        """Write rows, under ``bench/results/`` or into another folder."""
        return results.write(self.rows(), FILE, folder)

    def tables(self) -> str:
        """A Markdown table for each operation: our time, its share of the bound, and rivals'."""
        ops = list(dict.fromkeys(finding.case.op for finding in self.findings))
        return "\n\n".join(f"### {op}\n\n{self._table(op)}" for op in ops)

    def _table(self, op: str) -> str:
        of_case: dict[Case, dict[str, Finding]] = {}
        for finding in self.findings:
            if finding.case.op == op:
                of_case.setdefault(finding.case, {})[finding.candidate] = finding
        found = [name for findings in of_case.values() for name in findings]
        others = [name for name in dict.fromkeys(found) if name not in ("cpu", "triton")]
        memory = any(f.memory is not None for each in of_case.values() for f in each.values())
        header = ["model", "shape", "dtype", "ours", "of the bound"]
        header += [f"{name} / ours" for name in others] + (["memory beyond"] if memory else [])
        lines = []
        for case, findings in of_case.items():
            # The fastest backend comes first; where only rivals were chosen, there is none.
            name = next((name for name in OURS if name in findings), next(iter(findings)))
            ours = findings[name]
            line = [case.model, case.shape, case.dtype]
            line += [f"{_time(ours.seconds[1])} ({name})", f"{100 * self.share(ours)[1]:.0f} %"]
            line += [_ratio(findings.get(other), ours) for other in others]
            if memory:
                line.append(
                    ", ".join(
                        f"{each}: {f.memory / 1e6:,.0f} MB"
                        for each, f in findings.items()
                        if f.memory is not None
                    )
                )
            lines.append(line)
        return results.table(header, lines)


def _once(figure: float) -> tuple[float, float, float]:
    """A figure that has no quantiles."""
    return figure, figure, figure


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _ratio(other: Finding | None, ours: Finding) -> str:
    if other is None:
        return ""
    return f"{other.seconds[1] / ours.seconds[1]:.2f}x"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
