"""Markdown tables of rows, each a small declaration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.report.select import Selection, Source, Where, provenance
from bench.rows import Row, table
from ladder_kernels.errors import ConfigError

__all__ = [
    "BACKENDS",
    "DID_NOT_FIT",
    "NOT_RUN",
    "Against",
    "Blank",
    "Cell",
    "Column",
    "Filled",
    "Line",
    "Range",
    "Ratio",
    "Table",
    "duration",
    "gigabytes",
    "megabytes",
    "millions",
    "percent",
    "seconds",
    "times",
    "whole",
]

DID_NOT_FIT = "bytes: limit that did not suffice"
"""Metric of a run that did not fit, of which the limit is known."""

NOT_RUN = "not run"
"""Metric of a run that cannot be made there."""

BACKENDS = {
    "cpu": "our native kernels",
    "triton": "our Triton kernels",
    "reference": "our reference",
    "exact products": "our exact products",
}
"""What to call what this library computes."""

Text = Callable[[Row], str]
"""What a cell says of a row."""


def seconds(row: Row) -> str:
    return f"{row.median:.2f} s"


def duration(row: Row) -> str:
    """Three digits, in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if row.median >= size:
            return f"{row.median / size:.3g} {unit}"
    return f"{row.median * 1e6:.3g} µs"


def megabytes(row: Row) -> str:
    return f"{row.median / 1e6:,.0f} MB"


def gigabytes(row: Row) -> str:
    return f"{row.median / 1e9:.2f} GB"


def millions(row: Row) -> str:
    return f"{row.median / 1e6:.2f} M"


def whole(row: Row) -> str:
    return f"{row.median:,.0f}"


def percent(row: Row) -> str:
    return f"{row.median:.0%}".replace("%", " %")


def times(ratio: float) -> str:
    """Two digits, or more where there are more before the point; not rounded to 1 if it is less."""
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.{1 if ratio >= 1.5 else 2}f}x"


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A cell's text and what it was made of.

    Attributes:
        text: "" where a row is missing.
        rows: That were used.
        missing: Whether a row that should be there is not.
    """

    text: str
    rows: Sequence[Row] = ()
    missing: bool = False


_MISSING = Filled(text="", missing=True)


class Cell(Protocol):
    """A column's cells, or a cell of its own."""

    @property
    def header(self) -> str:
        """Above the column, and what a citation calls it."""
        ...

    def fill(self, selection: Selection, line: Where) -> Filled:
        """The text for a line, of which ``line`` are the fields that its rows have."""
        ...


@dataclass(frozen=True, kw_only=True)
class Column:
    """Figures of the line's candidate.

    Attributes:
        header: Above it.
        metrics: One figure of each, with " / " between them.
        text: Of a row.
        where: Fields of the rows, which go before those of the line.
        note: What stands behind the candidate's name in these rows.
        elsewhere: Whether other machines' rows do: bytes of tensors are the same on all.
        unit: Behind the figures.
        optional: Whether not all lines have such a row.
    """

    header: str
    metrics: tuple[str, ...] = ("seconds",)
    text: Text
    where: Where = field(default_factory=dict)
    note: str = ""
    elsewhere: bool = False
    unit: str = ""
    optional: bool = False

    def fill(self, selection: Selection, line: Where) -> Filled:
        fields = {**line, **self.where}
        named = {**fields, "candidate": f"{fields['candidate']}{self.note}"}
        found = [
            selection.one({**named, "metric": metric}, elsewhere=self.elsewhere)
            for metric in self.metrics
        ]
        rows = [row for row in found if row is not None]
        if len(rows) < len(found):
            failed = _failure(selection, fields)
            return failed or (Filled(text="") if self.optional else _MISSING)
        return Filled(text=" / ".join(map(self.text, rows)) + self.unit, rows=rows)


def _failure(selection: Selection, fields: Where) -> Filled | None:
    """Why a candidate has no figures: its run did not fit, or could not be."""
    about = {name: value for name, value in fields.items() if name != "metric"}
    for metric, text in (
        (DID_NOT_FIT, lambda row: f"over {row.median / 1e9:.3g} GB"),
        (NOT_RUN, lambda row: "not run"),
    ):
        row = selection.one({**about, "metric": metric})
        if row is not None:
            return Filled(text=text(row), rows=[row])
    return None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times less the line's candidate takes than the best of others: more is better.

    Attributes:
        header: Above it.
        to: The other candidates; those that have no row are left out.
        metric: Seconds or bytes.
        where: Fields of the rows, which go before those of the line.
        note: What stands behind the candidates' names.
    """

    header: str
    to: tuple[str, ...]
    metric: str = "seconds"
    where: Where = field(default_factory=dict)
    note: str = ""

    def fill(self, selection: Selection, line: Where) -> Filled:
        fields = {**line, **self.where, "metric": self.metric}
        mine = selection.one({**fields, "candidate": f"{fields['candidate']}{self.note}"})
        found = (selection.one({**fields, "candidate": name + self.note}) for name in self.to)
        others = [row for row in found if row is not None]
        if mine is None and _failure(selection, {**line, **self.where}):
            return Filled(text="")
        if mine is None or not others:
            return _MISSING
        best = min(others, key=lambda row: row.median)
        return Filled(text=times(best.median / mine.median), rows=[mine, best])


@dataclass(frozen=True, kw_only=True)
class Against:
    """Who did the same work as the line's candidate, and how many times as long each took.

    Where the line is of several works: the least of these ratios and the largest.

    Attributes:
        header: Above it.
        rivals: These only, not named in the cells, which are empty where none of them did the work;
            with none, all are named.
        where: Fields of the rows, which go before those of the line.
    """

    header: str
    rivals: tuple[str, ...] = ()
    where: Where = field(default_factory=dict)

    def fill(self, selection: Selection, line: Where) -> Filled:
        fields = {**line, **self.where, "metric": "seconds"}
        candidate = fields.pop("candidate")
        rows = selection.all(fields)
        mine = {(row.model, row.shape): row for row in rows if row.candidate == candidate}
        if not mine:
            return _MISSING
        if self.rivals:
            rows = [*mine.values(), *(row for row in rows if row.candidate in self.rivals)]
        ratios: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            own = mine.get((row.model, row.shape))
            if own is not None and row.candidate != candidate:
                ratios[row.candidate].append(row.median / own.median)
        if self.rivals:
            found = [ratio for each in ratios.values() for ratio in each]
            return Filled(text=_times_range(found), rows=rows) if found else Filled(text="")
        parts = [
            f"{_times_range(found)} {BACKENDS.get(name, name)}"
            for name, found in sorted(ratios.items(), key=lambda pair: min(pair[1]))
        ]
        return Filled(text=", ".join(parts), rows=rows)


def _times_range(ratios: Sequence[float]) -> str:
    return _range(times(min(ratios)), times(max(ratios)))


@dataclass(frozen=True, kw_only=True)
class Range:
    """The least and the largest figure of the line's candidate.

    Attributes:
        header: Above it.
        metric: Of the figures.
        text: Of a row.
        where: Fields of the rows, which go before those of the line.
        optional: Whether not all lines have such rows.
    """

    header: str
    metric: str
    text: Text
    where: Where = field(default_factory=dict)
    optional: bool = False

    def fill(self, selection: Selection, line: Where) -> Filled:
        rows = selection.all({**line, **self.where, "metric": self.metric})
        if not rows:
            return Filled(text="") if self.optional else _MISSING
        least, most = (best(rows, key=lambda row: row.median) for best in (min, max))
        return Filled(text=_range(self.text(least), self.text(most)), rows=rows)


def _range(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


@dataclass(frozen=True, kw_only=True)
class Blank:
    """No figure: nothing was measured, on purpose.

    Attributes:
        header: Above it.
        text: Words, if any.
    """

    header: str
    text: str = ""

    def fill(self, selection: Selection, line: Where) -> Filled:
        return Filled(text=self.text)


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        labels: In the first columns.
        where: Fields that the line's rows have, the candidate among them.
        cells: Instead of the table's.
    """

    labels: tuple[str, ...]
    where: Where
    cells: Sequence[Cell] | None = None

    @property
    def name(self) -> str:
        """What a citation calls it."""
        return ", ".join(label for label in self.labels if label)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        name: Of its block.
        source: Of its rows.
        heads: Above the labels.
        lines: In order, or made of the rows.
        columns: In order.
        sparse: Whether lines that have no row at all are left out of the text.
    """

    name: str
    source: Source
    heads: tuple[str, ...] = ("",)
    lines: Sequence[Line] | Callable[[Sequence[Row]], Sequence[Line]]
    columns: Sequence[Cell]
    sparse: bool = False

    def filled(self) -> list[tuple[Line, list[Filled]]]:
        """The lines and their cells."""
        selection = self.source.select()
        lines = self.lines(selection.rows) if callable(self.lines) else self.lines
        return [
            (line, [cell.fill(selection, line.where) for cell in line.cells or self.columns])
            for line in lines
        ]

    def text(self) -> str:
        """The table and where it comes from, in Markdown."""
        filled = [
            (line, cells)
            for line, cells in self.filled()
            if not self.sparse or any(cell.rows for cell in cells)
        ]
        header = [*self.heads, *(column.header for column in self.columns)]
        body = [[*line.labels, *(cell.text for cell in cells)] for line, cells in filled]
        used = dict.fromkeys(row for _, cells in filled for cell in cells for row in cell.rows)
        said = provenance(self.source.command, list(used))
        return f"{table(header, body)}\n\n<sub>{said}</sub>"

    def missing(self) -> list[str]:
        """A sentence for each line that lacks rows."""
        filled = self.filled()
        if not filled:
            return [f"table {self.name}: {self.source.file} has no rows for it."]
        sentences = []
        for line, cells in filled:
            lacks = [
                column.header
                for column, cell in zip(line.cells or self.columns, cells, strict=True)
                if cell.missing
            ]
            if lacks:
                sentences.append(
                    f"table {self.name}: {self.source.file} has no row for {line.name}: "
                    f"{'; '.join(lacks)}."
                )
        return sentences

    def cited(self, line: str, column: str) -> str:
        """The text of one cell.

        Raises:
            ConfigError: There is no such line or column, or its row is missing.
        """
        filled = {each.name: (each, cells) for each, cells in self.filled()}
        if line not in filled:
            raise ConfigError(
                f"table {self.name} has no line {line!r}; it has {', '.join(map(repr, filled))}"
            )
        found, texts = filled[line]
        cells = {
            cell.header: text for cell, text in zip(found.cells or self.columns, texts, strict=True)
        }
        if column not in cells:
            raise ConfigError(
                f"table {self.name} has no column {column!r}; it has {', '.join(map(repr, cells))}"
            )
        if not cells[column].text:
            raise ConfigError(
                f"table {self.name} has no row for {line}, {column}; measure it first"
            )
        return cells[column].text
