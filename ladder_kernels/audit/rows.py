"""Findings of the audit in rows: one for each case, kernel and target, its launches added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ladder_kernels.audit.audit import Finding
from ladder_kernels.audit.binary import Binary, Instructions

__all__ = ["Row", "bits_in_words", "rows"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a case launches of one kernel. Where launches differ in code, the worst is given.

    Attributes:
        target: What for.
        case: What was called.
        kernel: Name.
        findings: One a launch, at least one.
    """

    target: str
    case: str
    kernel: str
    findings: Sequence[Finding]

    @property
    def binaries(self) -> Sequence[Binary]:
        """The machine codes; none if nothing compiles."""
        return [each.binary for each in self.findings if each.binary is not None]

    @property
    def loops(self) -> Sequence[Instructions]:
        """The main loop of each, or all of a code that has no loop."""
        return [binary.loop or binary.whole for binary in self.binaries]

    def most(self, of: Callable[[Binary], int]) -> int:
        """The largest of what the codes have of something."""
        return max(map(of, self.binaries), default=0)

    @property
    def occupancy(self) -> float:
        """The lowest, from 0 to 1."""
        return min(finding.occupancy for finding in self.findings)

    @property
    def matrix_kinds(self) -> Sequence[str]:
        """Names of the instructions that multiply matrices."""
        return sorted({name for binary in self.binaries for name in binary.whole.matrix_kinds})

    @property
    def load_bits(self) -> Mapping[int, int]:
        """Global loads of the main loop by their width, or of all code if it has none there."""
        found: dict[int, int] = {}
        for binary, loop in zip(self.binaries, self.loops, strict=True):
            for bits, count in (loop.load_bits or binary.whole.load_bits).items():
                found[bits] = max(found.get(bits, 0), count)
        return dict(sorted(found.items(), reverse=True))

    @property
    def instructions_per_matrix(self) -> float | None:
        """Instructions of the main loop for each that multiplies matrices; None without any."""
        return max((loop.total / loop.matrix for loop in self.loops if loop.matrix), default=None)

    @property
    def devices(self) -> Sequence[str]:
        """Devices of the target that times are modelled for."""
        return list(self.findings[0].seconds)

    def parts(self, device: str) -> Mapping[str, float]:
        """Seconds that all launches keep each part of a device busy."""
        found: dict[str, float] = {}
        for finding in self.findings:
            for part, seconds in finding.seconds.get(device, {}).items():
                found[part] = found.get(part, 0.0) + seconds
        return found

    def seconds(self, device: str) -> float:
        """Modelled time of all launches."""
        return sum(max(f.seconds[device].values()) for f in self.findings if device in f.seconds)

    def bound(self, device: str) -> str:
        """The part of a device that is busy for longest."""
        parts = self.parts(device)
        return max(parts, key=parts.__getitem__, default="")


def rows(findings: Iterable[Finding]) -> list[Row]:
    """Put findings into rows, in the order in which cases and kernels first come."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.target, finding.case, finding.kernel), []).append(finding)
    return [
        Row(target=target, case=case, kernel=kernel, findings=group)
        for (target, case, kernel), group in groups.items()
    ]


def bits_in_words(bits: Mapping[int, int]) -> str:
    """How many loads of which width: ``"8 x 128, 2 x 8"``."""
    return ", ".join(f"{count} x {width}" for width, count in bits.items())
