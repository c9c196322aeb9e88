"""What the learning study found, as rows, and cells of it: means over seeds with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from bench.learning import results as learning
from bench.learning.trial import Result
from bench.plots import Theme
from bench.report.select import Selection, Source, Where
from bench.report.tables import Filled
from bench.rows import Row

__all__ = ["LEARNING", "Mean", "StudyPlot", "base_of", "learned_rows", "shape_of"]


def base_of(base: str) -> str:
    """What rows call a base of the study."""
    return f"SmolLM2-135M-Instruct, {base}"


def shape_of(steps: int, rate: float = 1.0) -> str:
    """What rows call a length of training, at a multiple of the method's learning rate."""
    return f"{steps} steps, rates x {rate:g}"


def learned_rows(file: str) -> list[Row]:
    """A row a trial and figure of the study; the file is the study's own."""
    rows = []
    for result in learning.read():
        trial = result.trial
        figures = {**result.figures, "parameters: trained": float(result.trained_parameters)}
        rows += [
            Row(
                bench=f"learning/{trial.study}/{trial.task}",
                candidate=trial.method,
                model=base_of(trial.base),
                shape=shape_of(trial.steps, trial.rate),
                dtype="bfloat16",
                metric=metric,
                low=value,
                median=value,
                high=value,
                threads=result.threads,
                device=result.device,
                evidence="measured",
                versions=result.versions,
                commit=result.commit,
            )
            for metric, value in figures.items()
        ]
    return rows


LEARNING = Source(
    file="learning.csv",
    command="python -m bench.learning run",
    everywhere=True,
    read=learned_rows,
)
"""All trials: what they found depends on no machine."""


@dataclass(frozen=True, kw_only=True)
class StudyPlot:
    """A plot of the study's trials on docstrings.

    Attributes:
        name: Of its block and files.
        title: What stands for it.
        fill: Draws trials into a figure.
        size: Inches.
        source: Of its rows.
    """

    name: str
    title: str
    fill: Callable[[Sequence[Result], Figure, Theme], None]
    size: tuple[float, float]
    source: Source = LEARNING

    def rows(self) -> list[Row]:
        return [row for row in self.source.select().rows if row.bench.endswith("/docstrings")]

    def draw(self, figure: Figure, theme: Theme) -> None:
        self.fill(learning.read(), figure, theme)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds, and its standard deviation where there are several.

    Attributes:
        header: Above it.
        where: Fields of the rows, which differ in their seeds alone.
        metric: Of the rows.
        text: Of the mean; of the deviation, without its unit.
        besides: A further metric whose mean follows in brackets, with three digits.
        seeds: Whether to say where there is one seed only.
        optional: Whether not all lines have such rows.
    """

    header: str
    where: Where = field(default_factory=dict)
    metric: str
    text: Callable[[float], str]
    besides: str = ""
    seeds: bool = True
    optional: bool = False

    def fill(self, selection: Selection, line: Where) -> Filled:
        rows = selection.all({**line, **self.where, "metric": self.metric})
        if not rows:
            return Filled(text="", missing=not self.optional)
        mean, spread = _mean(rows)
        further = selection.all({**line, **self.where, "metric": self.besides})
        text = self.text(mean)
        if spread is not None:
            text += f" ± {self.text(spread).removesuffix(' %')}"
        text += f" ({_mean(further)[0]:.3f})" if further else ""
        if self.seeds and len(rows) == 1:
            text += " (one seed)"
        return Filled(text=text, rows=[*rows, *further])


def _mean(rows: Sequence[Row]) -> tuple[float, float | None]:
    values = [row.median for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
