"""Which rows a table or a plot is made of, and what is said about where they come from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench import rows as results
from bench.rows import Row
from ladder_kernels.errors import ConfigError

__all__ = [
    "GPU",
    "HELD_TO_AVX2",
    "PROCESSOR",
    "Machine",
    "Selection",
    "Source",
    "Where",
    "provenance",
    "tokens",
    "tokens_per_second",
]

Where = Mapping[str, str | tuple[str, ...]]
"""Fields of :class:`bench.rows.Row`: the value that they have, or those of which they have one."""

_GPUS = re.compile(r"NVIDIA|GeForce|Tesla|AMD (Instinct|Radeon)")

Machine = Callable[[str], bool]
"""Tells of a device's name whether its rows are meant."""


def PROCESSOR(name: str) -> bool:  # noqa: N802  a constant to those who use it
    """A processor, with all its instructions."""
    return not GPU(name) and "held to" not in name


def HELD_TO_AVX2(name: str) -> bool:  # noqa: N802
    """A processor whose kernels were held to AVX2."""
    return name.endswith("held to AVX2")


def GPU(name: str) -> bool:  # noqa: N802
    """A GPU."""
    return _GPUS.match(name) is not None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows of one file.

    Attributes:
        file: Under ``bench/results/``.
        command: That measures them.
        where: Fields that all of them have.
        evidence: How they came to be.
        machine: The devices that are meant; rows of one of them are taken, see :meth:`select`.
        everywhere: Whether all machines' rows go together: what was found depends on none.
        read: Reads the file.
    """

    file: str
    command: str
    where: Where = field(default_factory=dict)
    evidence: tuple[str, ...] = ("measured",)
    machine: Machine = PROCESSOR
    everywhere: bool = False
    read: Callable[[str], list[Row]] = results.read

    def select(self) -> Selection:
        """The rows, those of one machine together.

        No table mixes machines: of several, the one with the most rows is taken, and the later of
        two with equally many.
        """
        where = {**self.where, "evidence": self.evidence}
        every = [row for row in self.read(self.file) if _matches(row, where)]
        if self.everywhere:
            return Selection(source=self, rows=every, elsewhere=[])
        count = Counter((row.device, row.threads) for row in every if self.machine(row.device))
        # Of equals, max takes the first: the last in the file comes first here.
        chosen = max(reversed(count), key=lambda machine: count[machine], default=("", 0))
        return Selection(
            source=self,
            rows=[row for row in every if (row.device, row.threads) == chosen],
            elsewhere=[row for row in every if (row.device, row.threads) != chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows of one machine.

    Attributes:
        source: What they were selected by.
        rows: Theirs.
        elsewhere: Such rows of all other machines.
    """

    source: Source
    rows: Sequence[Row]
    elsewhere: Sequence[Row]

    def all(self, where: Where, *, elsewhere: bool = False) -> list[Row]:
        """The rows with these fields.

        Args:
            where: See :data:`Where`.
            elsewhere: Whether another machine's rows do if this one has none.
        """
        found = [row for row in self.rows if _matches(row, where)]
        if elsewhere and not found:
            found = [row for row in self.elsewhere if _matches(row, where)]
        return found

    def one(self, where: Where, *, elsewhere: bool = False) -> Row | None:
        """The row with these fields, or ``None``; arguments as of :meth:`all`.

        Raises:
            ConfigError: If there are several.
        """
        found = self.all(where, elsewhere=elsewhere)
        if len(found) > 1:
            raise ConfigError(
                f"{self.source.file}: {len(found)} rows have {dict(where)}, and one cell shows one"
            )
        return found[0] if found else None


def _matches(row: Row, where: Where) -> bool:
    return all(
        getattr(row, name) in ((value,) if isinstance(value, str) else value)
        for name, value in where.items()
    )


def tokens(row: Row) -> int:
    """Tokens of a step, from a shape such as ``"B=1 S=2048 loss on 1 in 1"``.

    Raises:
        ConfigError: If the shape does not say.
    """
    sizes = dict(re.findall(r"\b([BS])=(\d+)\b", row.shape))
    if "S" not in sizes:
        raise ConfigError(
            f"the shape {row.shape!r} does not say how many tokens a step has (S=...)"
        )
    return int(sizes.get("B", 1)) * int(sizes["S"])


def tokens_per_second(row: Row) -> float:
    """Of a row of seconds a step."""
    return tokens(row) / row.median


def provenance(command: str, rows: Sequence[Row]) -> str:
    """A sentence: how rows came to be, by which command, on what, from which commits."""
    if not rows:
        return f"No rows yet: `{command}` measures them."
    evidence = " and ".join(dict.fromkeys(row.evidence for row in rows))
    machines = dict.fromkeys(
        row.device
        if GPU(row.device)
        else f"{row.device}, {row.threads} thread{'s'[: row.threads > 1]}"
        for row in rows
    )
    commits = sorted({row.commit for row in rows if row.commit})
    named = f"; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}" if commits else ""
    return f"{evidence.capitalize()} by `{command}` on {' and '.join(machines)}{named}."
