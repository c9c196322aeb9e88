"""The look of every plot: two themes, the colours of methods, and labels that do not overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

__all__ = [
    "CATEGORIES",
    "METHODS",
    "OPERATORS",
    "THEMES",
    "Label",
    "Mark",
    "Theme",
    "label_beside",
    "label_points",
    "make",
    "mark_of",
    "plain_number",
    "save",
    "stack",
]

# Paul Tol's "vibrant" and "muted" schemes: told apart with any colour vision, on any page.
_BLUE, _CYAN, _TEAL, _ORANGE = "#0077bb", "#33bbee", "#009988", "#ee7733"
_MAGENTA, _OLIVE, _GREY, _ROSE = "#ee3377", "#999933", "#888888", "#aa4499"
_YELLOW, _GREEN, _OTHER = "#ddaa33", "#117733", "#bbbbbb"
_DPI = 200
_FONT = 10.0
_LABEL = 9.0


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a page.

    Attributes:
        name: "light" or "dark"; ends the file's name.
        ink: Of text and axes.
        faint: Of grids.
        paper: Behind everything; GitHub's.
    """

    name: str
    ink: str
    faint: str
    paper: str

    def settings(self) -> Any:
        """Matplotlib's settings."""
        inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        return {
            **dict.fromkeys(inked, self.ink),
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "legend.facecolor": self.paper,
            "legend.edgecolor": self.faint,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": self.faint,
            "grid.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": _FONT + 1,
            "font.size": _FONT,
            "font.family": "DejaVu Sans",
        }


THEMES = (
    Theme(name="light", ink="#1f2328", faint="#d1d9e0", paper="#ffffff"),
    Theme(name="dark", ink="#f0f6fc", faint="#3d444d", paper="#0d1117"),
)
"""Of light pages and of dark ones."""


@dataclass(frozen=True)
class Mark:
    """How a method is drawn, in every plot.

    Attributes:
        colour: Shared by a method and its variants.
        marker: Matplotlib's.
        line: Matplotlib's line style.
    """

    colour: str
    marker: str = "o"
    line: str = "-"


METHODS: Mapping[str, Mark] = {
    "ladder": Mark(_BLUE),
    "ladder, int8 activations": Mark(_BLUE, "s", "--"),
    "ladder, recomputed": Mark(_BLUE, "P", "--"),
    "ladder, streamed": Mark(_BLUE, "v", ":"),
    "ladder at every layer": Mark(_BLUE, "^", "-."),
    "ladder, kept taps": Mark(_CYAN, "D"),
    "recommended ladder": Mark(_TEAL),
    "recommended ladder, recomputed": Mark(_TEAL, "s", "--"),
    "adapters on all layers": Mark(_OLIVE),
    "adapters on all layers, recomputed": Mark(_OLIVE, "s", "--"),
    "QLoRA": Mark(_ORANGE),
    "QLoRA, checkpointed": Mark(_ORANGE, "s", "--"),
    "QLoRA, Liger loss": Mark(_ORANGE, "D", ":"),
    "QLoRA on our kernels": Mark(_MAGENTA),
    "QLoRA on our kernels, checkpointed": Mark(_MAGENTA, "s", "--"),
    "plain LST": Mark(_GREY),
    "plain QST": Mark(_GREY, "^", "--"),
}
"""Methods of training."""

OPERATORS: Mapping[str, Mark] = {
    "cpu": Mark(_BLUE),
    "triton": Mark(_CYAN),
    "reference": Mark(_GREY),
    "bitsandbytes": Mark(_ORANGE),
    "torch on dequantised weights": Mark(_MAGENTA),
    "torch": Mark(_TEAL),
    "torch, recomputing": Mark(_GREEN),
    "Liger": Mark(_OLIVE),
    "NumPy on dequantised weights": Mark(_YELLOW),
    "exact products": Mark(_ROSE),
}
"""Who computes an operation: our backends, and rivals."""

CATEGORIES: Mapping[str, str] = {
    "weights": "#4477aa",
    "taps": "#66ccee",
    "activations": "#aa3377",
    "ladder": "#228833",
    "gradients": "#997700",
    "optimizer": "#ccbb44",
    "transients": "#ee6677",
}
"""Colours of what memory is for, in the order of stacking (Paul Tol's "bright")."""


def mark_of(name: str, marks: Mapping[str, Mark]) -> Mark:
    """The mark of ``name``; one that has none gets a colour that none of ``marks`` has."""
    return marks.get(name, Mark(_OTHER, "P", ":"))


def make(size: tuple[float, float], theme: Theme, draw: Callable[[Figure, Theme], None]) -> Figure:
    """A figure in a theme.

    Args:
        size: Width and height, inches; a hundred pixels each where a page shows it.
        theme: Of the page.
        draw: Fills it.
    """
    with mpl.rc_context(theme.settings()):
        figure = Figure(figsize=size, dpi=_DPI)
        FigureCanvasAgg(figure)
        draw(figure, theme)
    return figure


def save(
    path: Path,
    size: tuple[float, float],
    draw: Callable[[Figure, Theme], None],
    *,
    about: Mapping[str, str] | None = None,
) -> list[Path]:
    """Draw for light pages and for dark ones.

    Args:
        path: Without what follows: ``-light.png`` and ``-dark.png``.
        size: Width and height, inches.
        draw: Fills a figure.
        about: Text that the files carry.

    Returns:
        The files.
    """
    files = []
    for theme in THEMES:
        file = path.with_name(f"{path.name}-{theme.name}.png")
        beside = file.with_suffix(".new")
        with mpl.rc_context(theme.settings()):
            make(size, theme, draw).savefig(beside, format="png", metadata=dict(about or {}))
        beside.replace(file)
        files.append(file)
    return files


def stack(
    axes: Any, x: Sequence[float], heights: Mapping[str, Sequence[float]], *, step: bool = False
) -> None:
    """Draw what lives, stacked by what it is for.

    Args:
        axes: Where.
        x: Of all.
        heights: By category, in the order of :data:`CATEGORIES` and then as they come.
        step: Whether a value holds until the next.
    """
    order = [name for name in CATEGORIES if name in heights]
    order += [name for name in heights if name not in CATEGORIES]
    axes.stackplot(
        x,
        [heights[name] for name in order],
        labels=order,
        colors=[CATEGORIES.get(name, _GREY) for name in order],
        linewidth=0,
        **({"step": "post"} if step else {}),
    )


def plain_number(value: float, position: object = None) -> str:
    """A tick's text without powers of ten, as matplotlib's formatters take it: 0.05, 2, 2,048."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


@dataclass(frozen=True)
class Label:
    """A name to write beside a point.

    Attributes:
        x: Of the point, in the units of the data.
        y: The same.
        text: The name.
        colour: Of the line from the name to the point.
    """

    x: float
    y: float
    text: str
    colour: str


def label_beside(axes: Any, labels: Sequence[Label]) -> None:
    """Write names of lines in a column right of the axes, in the order of the lines' ends.

    Axes' limits and place are those of the end: call this last, and leave the room.
    """
    axes.autoscale_view()
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    gap = 1.35 * _LABEL / height
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((label.x, label.y)) for label in labels]
    order = sorted(range(len(labels)), key=lambda index: ends[index][1])
    places = _spread([ends[index][1] for index in order], gap)
    for index, place in zip(order, places, strict=True):
        label = labels[index]
        axes.annotate(
            label.text,
            xy=ends[index],
            xytext=(1.06, place),
            xycoords="axes fraction",
            fontsize=_LABEL,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": label.colour, "linewidth": 0.8,
                "linestyle": (0, (1, 1)), "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least ``gap`` apart, as close to the ascending ``wanted`` as can be.

    Neighbours that are too close become a group about the mean of what its members want.
    """
    groups: list[tuple[float, int]] = []  # the sum of wanted starts, and how many
    for place in wanted:
        groups.append((place, 1))
        while len(groups) > 1:
            (before, few), (last, many) = groups[-2:]
            if last / many - before / few >= few * gap:
                break
            # A member's wish is counted from the start of its group.
            groups[-2:] = [(before + last - many * few * gap, few + many)]
    places: list[float] = []
    for total, count in groups:
        places += [total / count + index * gap for index in range(count)]
    return places


def label_points(axes: Any, labels: Sequence[Label], avoid: Sequence[Line2D] = ()) -> None:
    """Write names beside points, where they cover neither points, nor names, nor the edge.

    Axes' limits and place are those of the end: call this last.

    Args:
        axes: Where.
        labels: The names.
        avoid: Lines that they had better not cover.
    """
    axes.autoscale_view()
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    unit = axes.figure.dpi / 72
    dots = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken = [Bbox.from_bounds(x - 5 * unit, y - 5 * unit, 10 * unit, 10 * unit) for x, y in dots]
    for line in avoid:
        ends = axes.transData.transform(line.get_xydata())
        for start, end in itertools.pairwise(ends):
            # A slanted line is a row of small boxes.
            pieces = np.linspace(start, end, 1 + max(1, round(np.ptp([start, end], 0).min() / 8)))
            for one, other in itertools.pairwise(pieces):
                low, high = np.minimum(one, other), np.maximum(one, other)
                taken.append(Bbox([low, high]).padded(unit))
    for label, dot in sorted(zip(labels, dots, strict=True), key=lambda pair: -pair[1][1]):
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", fontsize=_LABEL
        )
        size = text.get_window_extent(renderer)
        place = _free_place(dot, (size.width, size.height), taken, inside, unit)
        text.remove()
        taken.append(place.padded(unit))
        nearest = (
            min(max((dot[0] - place.x0) / place.width, 0.0), 1.0),
            min(max((dot[1] - place.y0) / place.height, 0.0), 1.0),
        )
        axes.annotate(
            label.text,
            (label.x, label.y),
            ((place.x0 - dot[0]) / unit, (place.y0 - dot[1]) / unit),
            textcoords="offset points",
            fontsize=_LABEL,
            va="bottom",
            arrowprops={
                "arrowstyle": "-", "color": label.colour, "linewidth": 0.8, "shrinkA": 0,
                "shrinkB": 4, "relpos": nearest,
            },
        )  # fmt: skip


def _free_place(
    dot: Any, size: tuple[float, float], taken: Sequence[Bbox], inside: Bbox, unit: float
) -> Bbox:
    """Where a text may stand: the free place nearest to its point, or the one covering least."""
    width, height = size
    least, best = math.inf, Bbox.null()
    for distance, angle in itertools.product((8, 14, 20, 28, 40, 60, 85, 115), range(0, 360, 15)):
        across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        x = dot[0] + distance * unit * across - (width if across < -0.2 else 0)
        y = dot[1] + distance * unit * up - height / 2
        if abs(across) <= 0.2:
            x -= width / 2
        place = Bbox.from_bounds(x, y, width, height)
        outside = width * height - _overlap(place, inside)
        covered = round(9 * outside + sum(_overlap(place, other) for other in taken))
        if covered < least:
            least, best = covered, place
        if covered == 0:
            break
    return best


def _overlap(one: Bbox, other: Bbox) -> float:
    """The area that two boxes share."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(wide, 0.0) * max(high, 0.0)
