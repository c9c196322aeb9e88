"""Whole training steps, this library's and its rivals', side by side: time and memory.

    python -m bench.train_step                            SmolLM2-135M, fp32, 2,048 tokens
    python -m bench.train_step --dtype float32 bfloat16 --answers 1 10
    python -m bench.train_step --model Qwen2.5-1.5B --dtype bfloat16 --only ladder QLoRA
    python -m bench.train_step --context 512 1024 2048 4096 8192 --only ladder QLoRA "plain LST"

Methods are those of :mod:`bench.methods`: same base, same tokens, as many trained parameters within
10 %. Each runs in a process of its own, a fresh one in every turn, and they take turns, so that a
machine's drift hits all alike. Each must lower its loss before its time counts. Measured are the
seconds of a step and of its forward pass, backward pass and optimizer; and, in a turn before that,
the bytes of live tensors (``ladder_kernels.memory.meter``), in all and beyond the frozen weights,
and what the process took (anonymous resident memory, sampled) beyond what it had before it loaded
the model; on a GPU, what PyTorch's allocator gave out and held instead.

The base of SmolLM2-135M has real weights; other names are shapes with random ones, which change
neither time nor memory. A method that needs more memory than is free is stopped and has a row that
says so. With ``--isa avx2`` all kernels are held to AVX2, as on a processor without AVX-512.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bench import rows as results
from bench.hold import ISAS, held, held_suffix
from bench.methods import METHODS
from bench.smallest import random_base
from bench.train_worker import MOMENTS, Found, Task

__all__ = ["Measured", "compare", "main"]

_FILE = "train_step.csv"
_TIMELINE = "timeline.csv"
_REAL = "SmolLM2-135M-Instruct"
_PACKAGES = ("transformers", "peft", "bitsandbytes")
_PHASES = ("forward", "backward", "optimizer")
# Left to the system, and to what a process maps and does not touch.
_SPARE = 1 << 30


@dataclass(kw_only=True)
class Measured:
    """What all turns of a method found.

    Attributes:
        trained: Number of trained parameters.
        steps: Seconds of timed steps, by ``answers``: forward, backward and optimizer of each.
        losses: First and last loss, by ``answers``.
        memory: Bytes by what they are.
        timeline: See :class:`~bench.train_worker.Found`.
        refused: Why it does not run here; empty if it does.
        failed: Whether its process failed.
        limit: Bytes that did not suffice; ``None`` if they did.
    """

    trained: int = 0
    steps: dict[int, list[list[float]]] = field(default_factory=dict)
    losses: dict[int, tuple[float, float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    timeline: dict[str, list[int]] = field(default_factory=dict)
    refused: str = ""
    failed: bool = False
    limit: int | None = None

    def add(self, task: Task, found: Found | None) -> None:
        """Add what one turn found; ``None`` if its process failed."""
        if found is None:
            self.failed = True
            return
        if not found.fits:
            self.limit = task.limit
        self.refused = found.refused
        if found.refused or not found.fits:
            return
        self.trained = found.trained
        self.memory = found.memory or self.memory
        self.timeline = found.timeline or self.timeline
        if task.memory:
            return
        for answers, steps, losses in zip(task.answers, found.steps, found.losses, strict=True):
            self.steps.setdefault(answers, []).extend(steps)
            self.losses[answers] = (losses[0], losses[-1])

    @property
    def runs(self) -> bool:
        """Whether it can be run again."""
        return self.limit is None and not self.refused and not self.failed

    def seconds(self, answers: int) -> float:
        """Median of a step."""
        return statistics.median(map(sum, self.steps[answers]))


def compare(
    tasks: Mapping[str, Task],
    *,
    turns: int,
    environment: Mapping[str, str] | None = None,
    after_each: Callable[[str, Measured], object] = lambda name, found: None,
) -> dict[str, Measured]:
    """Run tasks in turns, each in a process of its own.

    Args:
        tasks: By the method's name. Memory, if it is to be measured, is in a turn of its own.
        turns: How many are timed.
        environment: Variables that the processes have besides this one's.
        after_each: Called after each process with a method's name and what was found of it so far,
            so that none of it is lost.

    Returns:
        What was found, by name. Of a process that failed the error is on standard error.
    """
    measured = {name: Measured() for name in tasks}
    memory = any(task.memory for task in tasks.values())
    for turn in range(0 if memory else 1, turns + 1):
        for name, task in tasks.items():
            if not measured[name].runs:
                continue
            task = replace(task, memory=turn == 0)
            measured[name].add(task, _in_own_process(task, environment or {}))
            what = "memory" if task.memory else f"turn {turn}"
            print(f"  {what}: {_in_words(name, measured[name])}", flush=True)
            after_each(name, measured[name])
    return measured


def _in_own_process(task: Task, environment: Mapping[str, str]) -> Found | None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        done = subprocess.run(
            [sys.executable, "-m", "bench.train_worker", str(file)],
            input=json.dumps(asdict(task)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
        if file.exists():
            return Found(**json.loads(file.read_text(encoding="utf-8")))
    if done.returncode == -signal.SIGKILL and task.limit is not None:  # as out of memory
        return Found(fits=False)
    print(done.stderr, file=sys.stderr)
    return None


def _in_words(name: str, measured: Measured) -> str:
    if measured.limit is not None:
        return f"{name}: does not fit into {measured.limit / 1e9:.1f} GB"
    if measured.failed:
        return f"{name}: failed"
    if measured.refused:
        return f"{name}: not run: {measured.refused}"
    found = [f"{measured.seconds(answers):.2f} s" for answers in measured.steps]
    if not found:
        found = [f"{measured.memory['live beyond the weights'] / 1e6:,.0f} MB beyond the weights"]
    return f"{name}: {', '.join(found)}"


# Rows -----------------------------------------------------------------------------------------


def rows_of(
    name: str, task: Task, measured: Measured, *, model: str, suffix: str = ""
) -> Iterator[results.Row]:
    """Rows of what was measured.

    Args:
        name: Of the method.
        task: What was run.
        measured: What was found.
        model: The model's name.
        suffix: Of the device's name.
    """
    for answers in task.answers:
        figures = dict(_figures(measured, answers))
        for metric, quantiles in figures.items():
            yield from results.figures_of(
                metric,
                {name: quantiles},
                *_PACKAGES,
                bench="train_step",
                model=model,
                shape=f"B={task.batch} S={task.context} loss on 1 in {answers}",
                dtype=task.dtype,
                suffix=suffix,
            )


def _figures(measured: Measured, answers: int) -> Iterator[tuple[str, tuple[float, float, float]]]:
    if measured.failed:
        return
    if measured.limit is not None:
        yield "bytes: limit that did not suffice", (measured.limit,) * 3
        return
    if measured.refused:
        yield "not run", (0.0,) * 3
        return
    steps = measured.steps.get(answers)
    if steps:
        yield "seconds", _quantiles([sum(step) for step in steps])
        for phase, times in zip(_PHASES, zip(*steps, strict=True), strict=True):
            yield f"seconds: {phase}", _quantiles(times)
        for when, loss in zip(("first", "last"), measured.losses[answers], strict=True):
            yield f"loss: {when}", (loss,) * 3
    yield "parameters: trained", (measured.trained,) * 3
    if answers == min(measured.steps, default=answers):
        for what, number in measured.memory.items():
            yield f"bytes: {what}", (number,) * 3


def _quantiles(seconds: Iterable[float]) -> tuple[float, float, float]:
    low, median, high = np.quantile(list(seconds), (0.2, 0.5, 0.8))
    return float(low), float(median), float(high)


def timeline_rows(
    name: str, task: Task, measured: Measured, *, model: str, suffix: str = ""
) -> Iterator[results.Row]:
    """Rows of the bytes that lived, by category, over one step."""
    for category, numbers in measured.timeline.items():
        if not any(numbers):
            continue
        figures = {
            f"bytes: live {category} at {moment}/{MOMENTS} of the step": number
            for moment, number in enumerate(numbers)
        }
        for metric, number in figures.items():
            yield from results.figures_of(
                metric,
                {name: (number, number, number)},
                *_PACKAGES,
                bench="train_step_timeline",
                model=model,
                shape=f"B={task.batch} S={task.context} loss on 1 in {task.answers[0]}",
                dtype=task.dtype,
                suffix=suffix,
            )


def table_of(task: Task, measured: Mapping[str, Measured]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table of all methods."""
    header = ["method", "trained"]
    header += [f"tokens/s, loss on 1 in {answers}" for answers in task.answers]
    header += ["forward, backward, optimizer", "live beyond the weights", "resident"]
    lines = []
    for name, each in measured.items():
        if not each.runs:
            lines.append([_in_words(name, each), *[""] * (len(header) - 1)])
            continue
        tokens = task.batch * task.context
        rates = [
            f"{tokens / each.seconds(answers):,.0f}" if each.steps else ""
            for answers in task.answers
        ]
        phases = zip(*each.steps.get(task.answers[0], ()), strict=True)
        memory = each.memory
        if "allocated" in memory:  # on a GPU
            memory = {**memory, "resident": memory["allocated"]}
        lines.append(
            [
                name,
                f"{each.trained / 1e6:.2f} M",
                *rates,
                ", ".join(f"{statistics.median(phase):.2f} s" for phase in phases),
                *(
                    f"{memory[what] / 1e6:,.0f} MB" if what in memory else ""
                    for what in ("live beyond the weights", "resident")
                ),
            ]
        )
    return header, lines


# The command line -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns how many methods failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=_REAL, help="SmolLM2-135M-Instruct, or a shape by name")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--context", type=int, nargs="+", default=[2048], help="tokens a row")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows a step")
    parser.add_argument(
        "--answers", type=int, nargs="+", default=[1], help="loss on one token in so many"
    )
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; sets what all methods train")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--turns", type=int, default=2, help="that are timed; with 0, memory alone is measured"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="timed in each turn")
    parser.add_argument("--no-memory", action="store_true", help="measure seconds alone")
    parser.add_argument("--timeline", nargs="*", default=[], help="methods whose step is drawn")
    parser.add_argument("--isa", choices=ISAS, help="hold all kernels to it")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bases = {dtype: _base(given.model, dtype, Path(folder)) for dtype in given.dtype}
        for dtype, context, batch in itertools.product(given.dtype, given.context, given.batch):
            base, model = bases[dtype]
            task = Task(
                method="",
                base=str(base),
                dtype=dtype,
                device=device,
                rank=given.rank,
                batch=batch,
                context=context,
                answers=given.answers,
                seconds=given.seconds,
                memory=not given.no_memory,
                limit=_free_memory() if device == "cpu" else None,
                threads=torch.get_num_threads(),
            )
            print(f"\n{model}, {dtype}, {batch} x {context:,} tokens", flush=True)
            failed += _report(given, task, model)
    return failed


def _report(given: Any, task: Task, model: str) -> int:
    """Measure, print, write rows; returns how many methods failed."""
    about = {"model": model, "suffix": held_suffix(given.isa)}

    def write(name: str, found: Measured) -> list[results.Row]:
        taken = list(rows_of(name, task, found, **about))
        results.write(taken, _FILE)
        if name in given.timeline:
            results.write(list(timeline_rows(name, task, found, **about)), _TIMELINE)
        return taken

    measured = compare(
        {name: replace(task, method=name) for name in given.only},
        turns=given.turns,
        environment=held(given.isa),
        after_each=write,
    )
    taken = [row for name, found in measured.items() for row in write(name, found)]
    results.report(taken, _FILE, *table_of(task, measured))
    return sum(each.failed for each in measured.values())


def _base(name: str, dtype: str, folder: Path) -> tuple[Path, str]:
    """A base in NF4, made in a dtype, in which transformers then loads it; what rows call it."""
    made_in = getattr(torch, dtype)
    if name != _REAL:
        kept = Path("build/bases").absolute()
        base = random_base(name, kept, quantize_head=False, dtype=made_in)
        return base, f"{name}, random weights"
    from ladder_kernels.demo import find_weights
    from ladder_kernels.models.loading import load_backbone

    base = folder / dtype
    load_backbone(find_weights(), dtype=made_in).save_pretrained(base)
    return base, name


def _free_memory() -> int:
    return psutil.virtual_memory().available - _SPARE


if __name__ == "__main__":
    sys.exit(min(main(), 1))
