"""Which trials answer which question.

Steps at equal time come from :data:`COST`, which ``python -m bench.learning cost`` measures:
seconds of a step, of the methods in turns, on two cores that do nothing else. QLoRA counts twice:
as PEFT runs it on bitsandbytes, and as this library runs it, with the same code as its ladders and
adapters on every layer, which is the harder race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.learning.trial import Trial

__all__ = ["COST", "PEFT", "QLORA_STEPS", "STUDIES", "equal_time"]

_SEEDS = (0, 1, 2)
_STEPS = 40
_TASK_STEPS = 60
QLORA_STEPS = {
    "docstrings": _STEPS,
    "nlu": _TASK_STEPS,
    "maths": _TASK_STEPS,
    "critic": _TASK_STEPS,
}
"""Steps of QLoRA whose time others are given, by task."""

PEFT = "qlora by PEFT on bitsandbytes"
"""QLoRA as its users run it; what it learns is what "qlora" learns."""

_WINNER = "re-entry 1/2 + r16"
_NEARER = "re-entry 3/4 + r16"


def equal_time(method: str, steps: int, qlora: str = "qlora") -> int:
    """Steps of ``method`` in the time of ``steps`` steps of QLoRA, run as ``qlora``."""
    return round(steps * COST[qlora] / COST[method])


COST = {
    "qlora": 3.58,
    "re-entry 1/2 + r16": 2.05,
    "re-entry 1/2": 2.03,
    "re-entry 1/4": 1.43,
    "ladder": 0.79,
}
"""Seconds of a step of 2,048 packed tokens, 400 of them with a label, by method."""


def _docstrings() -> Iterator[Trial]:
    def trial(method: str, base: str = "calibrated", **options: Any) -> Trial:
        return Trial(study="docstrings", task="docstrings", base=base, method=method, **options)

    for base in ("calibrated", "nearest", "float"):
        yield trial("untrained", base, steps=0)
    for seed in _SEEDS:
        yield trial("qlora", steps=_STEPS, seed=seed)
        yield trial(_WINNER, steps=equal_time(_WINNER, _STEPS), seed=seed)
        yield trial(_WINNER, steps=_STEPS, seed=seed)
        if seed == 0:
            yield trial("qlora", steps=_STEPS, rate=0.5)
            yield trial("ladder", steps=_STEPS)
            yield trial("ladder", steps=equal_time("ladder", _STEPS))
            yield trial("re-entry 1/2", steps=_STEPS)
            yield trial("re-entry 1/4", steps=_STEPS)
            yield trial("re-entry 1/4", steps=equal_time("re-entry 1/4", _STEPS))
            yield trial("ladder, attention", steps=_STEPS)
            yield trial("probe", steps=_STEPS)
            yield trial("adapters 1/2", steps=_STEPS)
            yield trial("qlora", "nearest", steps=_STEPS)
            yield trial("ladder, attention", "nearest", steps=_STEPS)


def _tasks() -> Iterator[Trial]:
    for seed in _SEEDS:
        for task, examples in (("nlu", 500), ("maths", 100), ("critic", 200)):
            for method, steps in (
                ("qlora", _TASK_STEPS),
                (_WINNER, equal_time(_WINNER, _TASK_STEPS)),
                *([(_WINNER, _TASK_STEPS)] if seed == 0 else []),
                *([("ladder", equal_time("ladder", _TASK_STEPS))] if seed == 0 else []),
            ):
                yield Trial(
                    study="tasks", task=task, base="calibrated", method=method, seed=seed,
                    steps=steps, examples=examples,
                )  # fmt: skip


def _xladder() -> Iterator[Trial]:
    for seed in _SEEDS:
        for method in ("lst of 8", "xladder 4+4"):
            yield Trial(
                study="xladder", task="maths", base="calibrated", method=method, seed=seed,
                steps=2 * _TASK_STEPS, examples=100,
            )  # fmt: skip


def _scaling() -> Iterator[Trial]:
    for method in ("qlora r1", "re-entry 1/2 d18", "qlora r4", "re-entry 1/2 d288", "qlora r64"):
        yield Trial(
            study="scaling", task="docstrings", base="calibrated", method=method, steps=_STEPS
        )


STUDIES: Mapping[str, Callable[[], Iterator[Trial]]] = {
    "docstrings": _docstrings,
    "tasks": _tasks,
    "xladder": _xladder,
    "scaling": _scaling,
}
"""The trials of each study, the most telling first."""
