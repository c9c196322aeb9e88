"""Tables of the study's results, beside them in ``bench/results/``, and what its plots show."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.learning.compute import LAYERS, operations
from bench.learning.results import Result
from bench.learning.studies import COST, PEFT, QLORA_STEPS, SIZES
from bench.plots import METHODS, Label, Mark, Theme, label_points, mark_of, plain_number
from bench.rows import RESULTS

__all__ = ["draw_frontier", "draw_scaling", "frontier", "markdown", "scaling", "slope", "write"]

_METRIC = {"docstrings": "perplexity", "nlu": "accuracy", "critic": "accuracy"}
_MATHS = "exact_match"
_BACKBONES = {base: f"{layers} layers" for base, layers in LAYERS.items()}
_TICKS = (1, 2, 2.5, 3, 3.5, 4, 5, 7)
_UNITS = {"trained parameters": (1e6, "millions"), "floating-point operations": (1e12, "10¹²")}
# Methods of the study by the names that other plots give them.
_NAMES = {
    PEFT: ("QLoRA by PEFT on bitsandbytes", METHODS["QLoRA"]),
    "qlora": ("QLoRA on our kernels", METHODS["QLoRA on our kernels"]),
    "ladder": ("plain ladder", METHODS["ladder"]),
    "re-entry 1/2 + r16": (
        "recommended ladder: re-entry 1/2 + r16", METHODS["recommended ladder"],
    ),
    "re-entry 3/4 + r16": ("re-entry 3/4 + r16", METHODS["adapters on all layers"]),
    "re-entry 1/2": ("re-entry 1/2", METHODS["plain LST"]),
    "re-entry 1/4": ("re-entry 1/4", METHODS["plain QST"]),
}  # fmt: skip
_QLORA, _LADDER = METHODS["QLoRA on our kernels"].colour, METHODS["recommended ladder"].colour
# Of the lines of :func:`scaling`, in their order.
_MARKS = [Mark(colour, marker, line) for marker, line in (("o", "-"), ("s", "--"))
          for colour in (_QLORA, _LADDER)]  # fmt: skip
_AXES: Mapping[str, Callable[[Result], float]] = {
    "trained parameters": lambda result: float(result.trained_parameters),
    "floating-point operations": operations,
}


def write(results: Sequence[Result], folder: Path = RESULTS) -> None:
    """Write ``learning.md``; ``bench.report`` draws the plots.

    Args:
        results: Of :func:`bench.learning.results.read`.
        folder: Where to.
    """
    (folder / "learning.md").write_text(markdown(results), encoding="utf-8")


def metric_of(task: str) -> str:
    """What counts in a task."""
    return _METRIC.get(task, _MATHS)


def markdown(results: Sequence[Result]) -> str:
    """Every result in tables, one a task: means over seeds, with their spread."""
    parts = ["# Results of the learning study", ""]
    for task in dict.fromkeys(result.trial.task for result in results):
        metric = metric_of(task)
        extra = ["steps", "answer_tokens"] if task == "maths" else []
        header = [
            "study", "base", "method", "trained", "steps", "time, QLoRA = 1",
            "time, PEFT's QLoRA = 1", "seeds", metric, "loss", *extra,
        ]  # fmt: skip
        parts += [f"## {task}", "", _line(header), _line(["---"] * len(header))]
        for group in _groups(r for r in results if r.trial.task == task):
            parts.append(_line(_cells(group, metric, extra)))
        parts.append("")
    return "\n".join([*parts, *_slopes(results)])


def _groups(results: Any) -> list[list[Result]]:
    """Results that differ in nothing but their seed."""
    groups: dict[Any, list[Result]] = defaultdict(list)
    for result in results:
        trial = result.trial
        groups[trial.study, trial.base, trial.method, trial.steps, trial.rows, trial.rate].append(
            result
        )
    return list(groups.values())


def _cells(group: list[Result], metric: str, extra: Sequence[str]) -> list[str]:
    trial = group[0].trial
    name = trial.method + (f", rates x {trial.rate:g}" if trial.rate != 1 else "")
    # Costs are those of the whole model.
    spent = trial.steps * COST.get(trial.method, 0) * (trial.base != "cut")
    times = [
        f"{spent / (QLORA_STEPS[trial.task] * COST[qlora]):.2f}" if spent else ""
        for qlora in ("qlora", PEFT)
    ]
    return [
        trial.study,
        trial.base,
        name,
        f"{group[0].trained_parameters / 1e6:.2f} M",
        str(trial.steps),
        *times,
        str(len(group)),
        *(_spread([result.figures[key] for result in group]) for key in (metric, "loss", *extra)),
    ]


def _spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope of ``log(loss)`` against ``log(compute)`` and its standard error (least squares).

    Args:
        points: Compute and loss; at least three.
    """
    x, y = np.log(np.array(points, dtype=float)).T
    centred = x - x.mean()
    spread = float((centred**2).sum())
    found = float((centred * y).sum()) / spread
    residual = y - y.mean() - found * centred
    error = float((residual**2).sum() / (len(points) - 2) / spread) ** 0.5
    return found, error


def frontier(results: Sequence[Result]) -> dict[str, list[tuple[float, float]]]:
    """Time, in steps of QLoRA, and mean perplexity of docstrings, by method; least time first."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for group in _groups(
        r
        for r in results
        if r.trial.task == "docstrings" and r.trial.base == "calibrated" and r.trial.rate == 1
    ):
        trial = group[0].trial
        if trial.method in COST:
            time = trial.steps * COST[trial.method] / COST["qlora"]
            mean = statistics.fmean(result.figures["perplexity"] for result in group)
            lines[trial.method].append((time, mean))
            if trial.method == "qlora":
                lines[PEFT].append((trial.steps * COST[PEFT] / COST["qlora"], mean))
    return {method: sorted(points) for method, points in lines.items()}


def draw_frontier(results: Sequence[Result], figure: Figure, theme: Theme) -> None:
    """Draw perplexity against time, a line a method, into a figure."""
    axes = figure.add_axes((0.09, 0.12, 0.88, 0.80))
    labels = []
    for method, points in frontier(results).items():
        name, mark = _NAMES.get(method, (method, mark_of(method, METHODS)))
        axes.plot(
            *zip(*points, strict=True), color=mark.colour, marker=mark.marker, linestyle=mark.line
        )
        labels.append(Label(*points[0], name, mark.colour))
    axes.set_title("Docstrings: what training time buys")
    axes.set_xlabel("time, in steps of QLoRA on the same kernels")
    axes.set_ylabel("held-out perplexity of the answers")
    axes.margins(0.09)
    label_points(axes, labels, axes.lines)


def scaling(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of the sizes of a method, smallest first, by method and base."""
    found = {}
    for base, name in _BACKBONES.items():
        for family, rates in SIZES.items():
            sizes = {
                r.trained_parameters: r
                for r in results
                if (r.trial.task, r.trial.base) == ("docstrings", base)
                and (r.trial.steps, r.trial.seed) == (QLORA_STEPS["docstrings"], 0)
                and rates.get(r.trial.method) == r.trial.rate
            }
            if len(sizes) > 2:
                found[f"{family}, {name}"] = [sizes[size] for size in sorted(sizes)]
    return found


def _against(axis: str, sizes: Sequence[Result]) -> list[tuple[float, float]]:
    return [(_AXES[axis](result), result.figures["loss"]) for result in sizes]


def _slopes(results: Sequence[Result]) -> list[str]:
    """The fitted slopes in a table; no lines without sizes."""
    drawn = scaling(results)
    if not drawn:
        return []
    parts = ["## Slopes of log(loss), at equal tokens", "", _line(["sizes", "losses", *_AXES])]
    parts.append(_line(["---"] * (2 + len(_AXES))))
    for label, sizes in drawn.items():
        losses = ", ".join(f"{result.figures['loss']:.3f}" for result in sizes)
        fits = (slope(_against(axis, sizes)) for axis in _AXES)
        parts.append(_line([label, losses, *(f"{fit:.4f} ± {error:.4f}" for fit, error in fits)]))
    return [*parts, ""]


def draw_scaling(results: Sequence[Result], figure: Figure, theme: Theme) -> None:
    """Draw loss against trained parameters and against compute, with fitted slopes."""
    panels = figure.subplots(1, len(_AXES), sharey=True)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.92, bottom=0.38, wspace=0.08)
    for axes, (axis, (unit, words)) in zip(panels, _UNITS.items(), strict=True):
        for (label, sizes), mark in zip(scaling(results).items(), _MARKS, strict=False):
            points = _against(axis, sizes)
            found, error = slope(points)
            axes.loglog(
                *zip(*((x / unit, loss) for x, loss in points), strict=True),
                color=mark.colour,
                marker=mark.marker,
                linestyle=mark.line,
                label=f"{label}: slope {found:.3f} ± {error:.3f}",
            )
        axes.set_xlabel(f"{axis}, {words}")
        axes.xaxis.set_major_formatter(plain_number)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=_TICKS))
        axes.yaxis.set_major_formatter("{x:.1f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
    panels[1].xaxis.set_major_locator(LogLocator(subs=_TICKS))
    panels[0].set_title("Docstrings: sizes at equal tokens")
    panels[0].set_ylabel("loss, nats")
