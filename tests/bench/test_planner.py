"""The planner's study compares what it says it does."""

from __future__ import annotations

import csv

from bench.planner import COMBINATIONS
from bench.rows import RESULTS
from ladder_kernels.models.shapes import KNOWN


def test_twelve_that_differ():
    assert len(COMBINATIONS) >= 12
    assert len({(each.model, each.words()) for each in COMBINATIONS}) == len(COMBINATIONS)
    for name in ("model", "context", "weights", "taps", "recompute", "recommended"):
        assert len({getattr(each, name) for each in COMBINATIONS}) > 1, name
    assert {each.model for each in COMBINATIONS} <= KNOWN.keys()


def test_the_results_are_of_these_and_within_bounds():
    with (RESULTS / "planner.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figures = {(row["model"], row["shape"], row["candidate"]): float(row["median"]) for row in rows}
    for each in COMBINATIONS:
        counted, planned = (
            figures[each.model, each.words(), name] for name in ("counted", "planned")
        )
        assert counted <= 1.00001 * planned  # six digits are written
        assert planned <= 1.03 * counted
    assert {row["evidence"] for row in rows} == {"modelled"}
