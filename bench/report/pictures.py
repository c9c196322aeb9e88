"""Plots of rows, each a small declaration."""

from __future__ import annotations

import hashlib
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from bench import plots
from bench.plots import METHODS, OPERATORS, Label, Theme, mark_of, plain_number
from bench.report.select import Source, provenance, tokens_per_second
from bench.report.tables import BACKENDS, DID_NOT_FIT
from bench.rows import Row

__all__ = ["AgainstContext", "Frontier", "Plot", "Roofline", "Timeline", "block", "is_of", "write"]

_ROWS = "Rows"
_STEPS = re.compile(r"bytes: live (.+) at (\d+)/(\d+) of the step")
_MARKERS = "osD^vPX<>*hp"
_PEAK = "ops/peak"
_FLOPS = "FLOP/s"
_WORK = ("FLOP/byte", _FLOPS)


class Plot(Protocol):
    """A plot."""

    @property
    def name(self) -> str:
        """Of its block and its files."""
        ...

    @property
    def title(self) -> str:
        """Above it, and what stands for it where it cannot be seen."""
        ...

    @property
    def source(self) -> Source:
        """Of its rows."""
        ...

    @property
    def size(self) -> tuple[float, float]:
        """Inches, a hundred pixels each on a page."""
        ...

    def rows(self) -> list[Row]:
        """Those that are drawn; none if too few are there for a plot."""
        ...

    def draw(self, figure: Figure, theme: Theme) -> None:
        """Fill a figure."""
        ...


def write(plot: Plot, folder: Path) -> list[Path]:
    """Draw a plot for both themes; its files remember which rows they are of."""
    about = {_ROWS: _digest(plot.rows())}
    return plots.save(folder / plot.name, plot.size, plot.draw, about=about)


def is_of(plot: Plot, folder: Path) -> bool:
    """Whether a plot's files are there and of the rows that there are now."""
    expected = _digest(plot.rows())
    for theme in plots.THEMES:
        path = folder / f"{plot.name}-{theme.name}.png"
        if not path.is_file():
            return False
        with Image.open(path) as image:
            if image.info.get(_ROWS) != expected:
                return False
    return True


def block(plot: Plot, folder: str) -> str:
    """What a page shows of a plot: itself, and the commands.

    Args:
        plot: The plot.
        folder: Of its files, from the page.
    """
    rows = plot.rows()
    said = provenance(plot.source.command, rows)
    if not rows:
        return f"<sub>{said}</sub>"
    path = f"{folder}/{plot.name}"
    return "\n".join(
        [
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="{path}-dark.png">',
            f'  <img alt="{plot.title}" src="{path}-light.png" width="{plot.size[0] * 100:.0f}">',
            "</picture>",
            "",
            f"<sub>Drawn by `python -m bench.report`. {said}</sub>",
        ]
    )


def _digest(rows: Sequence[Row]) -> str:
    text = "\n".join(sorted(repr((*row.key(), row.median, row.commit)) for row in rows))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _context(row: Row) -> int:
    return int(re.findall(r"\bS=(\d+)", row.shape)[0])


@dataclass(frozen=True, kw_only=True)
class AgainstContext:
    """A figure against the context's length, a line a method.

    Attributes:
        name: Of its block and files.
        title: Above it.
        source: Of its rows.
        methods: Those that are drawn, if there are rows of more than one context.
        metric: Of the rows.
        value: What is drawn of a row.
        label: Of the axis, with the unit.
        loss: The end of the shapes that are meant.
        size: Inches.
    """

    name: str
    title: str
    source: Source
    methods: tuple[str, ...]
    metric: str
    value: Callable[[Row], float]
    label: str
    loss: str = "loss on 1 in 1"
    size: tuple[float, float] = (8.0, 4.8)

    def rows(self) -> list[Row]:
        selection = self.source.select()
        wanted = {"metric": (self.metric, DID_NOT_FIT)}
        found: list[Row] = []
        for method in self.methods:
            rows = selection.all({"candidate": method, **wanted})
            rows = sorted((row for row in rows if row.shape.endswith(self.loss)), key=_context)
            found += rows if len(rows) > 1 else []
        return found

    def draw(self, figure: Figure, theme: Theme) -> None:
        drawn: dict[str, list[Row]] = defaultdict(list)
        failed = []
        for row in self.rows():
            if row.metric == self.metric:
                drawn[row.candidate].append(row)
            else:
                size = f"{row.median / 1e9:.3g} GB"
                failed.append(f"{row.candidate} at {_context(row):,} tokens in {size}")
        said = textwrap.wrap(f"Did not fit: {'; '.join(failed)}", 118) if failed else []
        below = 0.036 * len(said)
        axes: Any = figure.add_axes((0.10, 0.12 + below, 0.55, 0.80 - below))
        axes.set_title(self.title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        labels = []
        for method, rows in drawn.items():
            mark = mark_of(method, METHODS)
            x, y = [_context(row) for row in rows], [self.value(row) for row in rows]
            axes.plot(x, y, color=mark.colour, marker=mark.marker, linestyle=mark.line, ms=5)
            labels.append(Label(x[-1], y[-1], method, mark.colour))
        contexts = sorted({_context(row) for rows in drawn.values() for row in rows})
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.xaxis.minorticks_off()
        _plain_log(axes.yaxis)
        axes.set_xlabel("context, tokens (batch 1)")
        axes.set_ylabel(self.label)
        plots.label_beside(axes, labels)
        figure.text(0.012, 0.012, "\n".join(said), fontsize=9)


def _plain_log(axis: Any, digits: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Ticks at some digits of every power of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Speed against memory, a point a method, and the line of those that none beats in both.

    Attributes:
        name: Of its block and files.
        title: Above it.
        source: Of its rows, which have one shape.
        memory: The metric of memory.
        label: Of its axis.
        size: Inches.
    """

    name: str
    title: str
    source: Source
    memory: str = "bytes: live at the peak"
    label: str = "live bytes of tensors at the peak of the step, GB"
    size: tuple[float, float] = (8.0, 5.2)

    def rows(self) -> list[Row]:
        return [row for pair in self._points().values() for row in pair]

    def _points(self) -> Mapping[str, tuple[Row, Row]]:
        selection = self.source.select()
        pairs = {
            method: tuple(
                selection.one({"candidate": method, "metric": metric})
                for metric in (self.memory, "seconds")
            )
            for method in METHODS
        }
        return {method: pair for method, pair in pairs.items() if all(pair)}  # type: ignore[misc]

    def draw(self, figure: Figure, theme: Theme) -> None:
        points = {
            method: (memory.median / 1e9, tokens_per_second(time))
            for method, (memory, time) in self._points().items()
        }
        axes: Any = figure.add_axes((0.10, 0.11, 0.88, 0.82))
        axes.set_title(self.title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        best = _unbeaten(list(points.values()))
        (stairs,) = axes.plot(
            *zip(*_stairs(best), strict=True), color=theme.ink, lw=0.8, alpha=0.45
        )
        labels = []
        for method, (x, y) in points.items():
            mark = mark_of(method, METHODS)
            axes.plot([x], [y], color=mark.colour, marker=mark.marker, ms=7, linestyle="")
            labels.append(Label(x, y, method, mark.colour))
        for limits, set_limits in (
            ([x for x, _ in points.values()], axes.set_xlim),
            ([y for _, y in points.values()], axes.set_ylim),
        ):
            room = (max(limits) / min(limits)) ** 0.12 * 1.05
            set_limits(min(limits) / room, max(limits) * room)
        _plain_log(axes.xaxis)
        _plain_log(axes.yaxis)
        axes.set_xlabel(self.label)
        axes.set_ylabel("tokens/s")
        plots.label_points(axes, labels, [stairs])


def _unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those with no other that takes no more memory and is no slower; by memory."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the line that goes right and then up from each to the next."""
    corners = list(points[:1])
    for x, y in points[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return corners


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What lives over a step, of two methods on one scale, stacked by what it is for.

    Attributes:
        name: Of its block and files.
        title: Above it.
        source: Of its rows, which have one shape.
        methods: Left and right.
        size: Inches.
    """

    name: str
    title: str
    source: Source
    methods: tuple[str, str] = ("ladder", "QLoRA")
    size: tuple[float, float] = (8.0, 4.4)

    def rows(self) -> list[Row]:
        selection = self.source.select()
        found = [selection.all({"candidate": method}) for method in self.methods]
        return [row for rows in found for row in rows] if all(found) else []

    def draw(self, figure: Figure, theme: Theme) -> None:
        curves = {method: _curves(self.rows(), method) for method in self.methods}
        peaks = {
            method: max(map(sum, zip(*c.values(), strict=True))) for method, c in curves.items()
        }
        top = 1.12 * max(peaks.values())
        panels: Any = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(left=0.09, right=0.97, top=0.84, bottom=0.21, wspace=0.12)
        figure.suptitle(self.title, x=0.09, ha="left", fontsize=11)
        for axes, (method, heights) in zip(panels, curves.items(), strict=True):
            axes.set_title(f"{method}: {_size(peaks[method])} at the peak")
            _stack(axes, heights)
            axes.set_ylim(0, top)
            axes.set_xlabel("share of the step's time, %")
            if peaks[method] < top / 4:
                _magnified(axes, heights, peaks[method], top)
        panels[0].set_ylabel("live bytes of tensors, GB")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="lower center", ncols=len(names), frameon=False, fontsize=9
        )


def _stack(axes: Any, heights: Mapping[str, Sequence[float]]) -> None:
    count = len(next(iter(heights.values())))
    plots.stack(axes, [index / (count - 1) for index in range(count)], heights)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])


def _magnified(axes: Any, heights: Mapping[str, Sequence[float]], peak: float, top: float) -> None:
    """The same once more above itself, on a scale of its own."""
    axes.grid(visible=False)
    low = peak / top + 0.22
    height = 0.91 - low
    inset = axes.inset_axes((0.17, low, 0.79, height))
    _stack(inset, heights)
    inset.set_ylim(0, 1.12 * peak)
    inset.set_title(f"the same, magnified {height * top / (1.12 * peak):.0f}x", fontsize=9)
    inset.set_ylabel("GB", fontsize=8)
    inset.tick_params(labelsize=8)


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB" if gigabytes >= 1 else f"{gigabytes * 1e3:.0f} MB"


def _curves(rows: Sequence[Row], method: str) -> dict[str, list[float]]:
    """GB over the step, by category, without those that nothing is ever in."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    last = 0
    for row in rows:
        match = _STEPS.fullmatch(row.metric)
        if row.candidate == method and match:
            found[match[1]][int(match[2])] = row.median / 1e9
            last = int(match[3])
    every = {
        name: [values.get(index, 0.0) for index in range(last + 1)]
        for name, values in found.items()
    }
    ever = {name for row in rows if row.median for name in _STEPS.findall(row.metric)[0][:1]}
    return {name: values for name, values in every.items() if name in ever}


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Operations under what the machine can do: a mark an operation, and who computes it.

    Attributes:
        name: Of its block and files.
        title: Above it.
        source: Of its rows.
        model: Whose shapes the operations have.
        dtype: Of the operations and of the roof; products in whole numbers have a roof of their
            own.
        size: Inches.
    """

    name: str
    title: str
    source: Source
    model: str
    dtype: str
    size: tuple[float, float] = (8.0, 5.6)

    def rows(self) -> list[Row]:
        rows = self.source.select().rows
        works = [
            row
            for row in rows
            if (row.model, row.dtype) == (self.model, self.dtype) and row.metric in _WORK
        ]
        peaks = [row for row in rows if row.bench == _PEAK and row.metric.startswith("bytes/s")]
        kinds = [self.dtype, *(["int8"] if any(_in_whole_numbers(row) for row in works) else [])]
        peaks += [row for row in rows if row.bench == _PEAK and row.dtype in kinds]
        enough = {(row.metric, row.dtype) for row in peaks} >= {
            ("bytes/s", ""),
            (_FLOPS, self.dtype),
        }
        return [*peaks, *works] if enough and _operations(works) else []

    def draw(self, figure: Figure, theme: Theme) -> None:
        rows = self.rows()
        marks = _operations(rows)
        axes: Any = figure.add_axes((0.10, 0.10, 0.55, 0.83))
        axes.set_title(self.title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        shapes = dict(zip(dict.fromkeys(op for op, *_ in marks), _MARKERS * 9, strict=False))
        colours = {name: mark_of(name, OPERATORS).colour for _, name, *_ in marks}
        by_work: dict[tuple[str, float], list[float]] = defaultdict(list)
        for op, name, x, y in marks:
            axes.plot([x], [y / 1e9], color=colours[name], marker=shapes[op], ms=7, linestyle="",
                      mec=theme.paper, mew=0.5)  # fmt: skip
            by_work[op, x].append(y / 1e9)
        for (_, x), ys in by_work.items():
            axes.plot([x, x], [min(ys), max(ys)], color=theme.ink, lw=0.5, alpha=0.4, zorder=1)
        self._draw_roofs(axes, rows, theme)
        _plain_log(axes.xaxis, (1.0, 3.0))
        _plain_log(axes.yaxis)
        axes.set_xlabel("arithmetic intensity, FLOP/byte")
        axes.set_ylabel("GFLOP/s")
        who = [_handle(BACKENDS.get(name, name), colour, "o") for name, colour in colours.items()]
        what = [_handle(op, theme.ink, marker) for op, marker in shapes.items()]
        place = 1.0
        for title, handles in (("computed by", who), ("operation", what)):
            names = [str(handle.get_label()) for handle in handles]
            legend = Legend(
                axes, handles, names, title=title, bbox_to_anchor=(1.01, place), loc="upper left",
                frameon=False, fontsize=9, title_fontsize=9, alignment="left",
            )  # fmt: skip
            axes.add_artist(legend)
            place -= 0.045 * (len(handles) + 1.8)

    def _draw_roofs(self, axes: Any, rows: Sequence[Row], theme: Theme) -> None:
        peaks = [row for row in rows if row.bench == _PEAK]
        flops = {row.dtype: row.median / 1e9 for row in peaks if row.metric == _FLOPS}
        rates = {row.metric: row.median / 1e9 for row in peaks if row.metric.startswith("bytes/s")}
        roof, rate = flops.pop(self.dtype), rates.pop("bytes/s")
        xs = [x for _, _, x, _ in _operations(rows)]
        left, right = min(roof / rate, *xs) / 2, max(roof / rate, *xs) * 2
        axes.set_xlim(left, right)
        low, high = axes.get_ylim()
        axes.set_ylim(low, max(high, roof, *flops.values()) * 1.6)
        further = max([rate, *rates.values()])
        slopes = {"from memory": (rate, "-"), "from caches": (further, "--")}
        for words, (speed, line) in slopes.items():
            if (words, speed) != ("from caches", rate):
                _slope(axes, speed, roof, f"{speed:,.0f} GB/s {words}", theme, line)
        start = roof / further
        for height, begin, line, kind in (
            (roof, start, "-", ""),
            *((value, value / further, "--", f" {name}") for name, value in flops.items()),
        ):
            axes.plot([begin, right], [height, height], color=theme.ink, lw=1.2, linestyle=line)
            axes.annotate(
                f"{height:,.0f} GFLOP/s{kind}", (right, height), (-2, 4),
                textcoords="offset points", ha="right", fontsize=9,
            )  # fmt: skip


def _slope(axes: Any, rate: float, roof: float, words: str, theme: Theme, line: str) -> None:
    """What memory allows, up to the roof, and words along it."""
    (left, _), (low, _) = axes.get_xlim(), axes.get_ylim()
    ends = [(left, left * rate), (roof / rate, roof)]
    axes.plot(*zip(*ends, strict=True), color=theme.ink, lw=1.2, linestyle=line)
    (x0, y0), (x1, y1) = axes.transData.transform(ends)
    slope = math.atan2(y1 - y0, x1 - x0)
    # The words begin where the line enters the axes.
    begin = max(left, low / rate)
    along, above = 18, 5
    place = (
        along * math.cos(slope) - above * math.sin(slope),
        along * math.sin(slope) + above * math.cos(slope),
    )
    axes.annotate(
        words, (begin, begin * rate), place, textcoords="offset points", fontsize=9,
        rotation=math.degrees(slope), rotation_mode="anchor",
    )  # fmt: skip


def _handle(label: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=label)


def _in_whole_numbers(row: Row) -> bool:
    return row.bench.endswith("int8")


def _operations(rows: Sequence[Row]) -> list[tuple[str, str, float, float]]:
    """Operation, who computes it, FLOP/byte and FLOP/s."""
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.bench != _PEAK:
            found[row.bench, row.candidate, row.model, row.shape][row.metric] = row.median
    return [
        (bench.removeprefix("ops/"), candidate, figures["FLOP/byte"], figures[_FLOPS])
        for (bench, candidate, *_), figures in found.items()
        if figures.keys() >= set(_WORK)
    ]
