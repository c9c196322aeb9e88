"""One method of the train-step bench in a process of its own: ``python -m bench.train_worker``.

Reads a task in JSON from standard input and writes what it found in JSON to the file that the task
names. The process may map so much memory for itself and no more (Linux): a method that needs more
fails by itself, and says so, before the machine is in trouble.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.memory import AnonymousMemory, process_bytes
from bench.methods import METHODS, Trainee, Work
from bench.qlora import UnavailableError
from bench.timing import check_losses
from ladder_kernels.memory.allocation import return_freed_memory
from ladder_kernels.memory.ledger import CATEGORIES, Moment, Usage
from ladder_kernels.memory.meter import Meter

__all__ = ["MOMENTS", "Found", "Task", "random_batch", "run", "take_step"]

MOMENTS = 60
"""Into so many parts the timeline of a step is cut."""

_FEW_TOKENS = 64
# A loss that has not fallen after so many steps will not.
_STEPS_TO_LEARN = 5


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to run.

    Attributes:
        method: Name of one of :data:`~bench.methods.METHODS`.
        base: Folder of the base.
        dtype: To compute in, by name.
        device: Where.
        rank: Of QLoRA's adapters, which sets how many parameters each method trains.
        batch: Rows a step.
        context: Tokens a row.
        answers: The loss is on one token in so many; one measurement for each.
        seconds: Steps are timed for about so long, for each of ``answers``.
        at_least: So many steps are timed, however long they are.
        memory: Whether to measure that instead, with the first of ``answers``.
        limit: Bytes that the process may map for itself beyond what it has before the model is
            loaded; ``None`` for no limit.
        threads: Of a CPU; ``None`` for PyTorch's choice.
    """

    method: str
    base: str
    dtype: str
    device: str = "cpu"
    rank: int = 8
    batch: int = 1
    context: int = 2048
    answers: Sequence[int] = (1,)
    seconds: float = 5.0
    at_least: int = 1
    memory: bool = False
    limit: int | None = None
    threads: int | None = None


@dataclass(kw_only=True)
class Found:
    """What was found.

    Attributes:
        trained: Number of trained parameters.
        steps: Seconds of the timed steps, for each of the task's ``answers``: forward, backward and
            optimizer of each.
        losses: Of all steps in order, for each of ``answers``.
        memory: Bytes by what they are, if they were measured.
        timeline: Live bytes by category at ``MOMENTS`` + 1 moments of a step, evenly spaced.
        refused: Why it did not run, in one line; empty if it did.
        fits: Whether the memory sufficed.
    """

    trained: int = 0
    steps: list[list[list[float]]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    timeline: dict[str, list[int]] = field(default_factory=dict)
    refused: str = ""
    fits: bool = True


class _Clock:
    """Marks moments of a step: by a GPU's events where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Now."""
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbouring marks."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._gpu:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def run(task: Task) -> Found:
    """Do a task in this process, which should be a fresh one.

    Raises:
        RuntimeError: The method does not learn.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    found = Found()
    with _limited(task.limit):
        try:
            _measure(task, found)
        except UnavailableError as error:
            found.refused = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            found.fits = False
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            found.fits = False
    return found


def _measure(task: Task, found: Found) -> None:
    device = torch.device(task.device)
    work = Work(
        base=Path(task.base), dtype=getattr(torch, task.dtype), rank=task.rank, device=device
    )
    before = process_bytes("RssAnon")
    trainee = METHODS[task.method](work)
    found.trained = trainee.trained
    with trainee.resources:
        for answers in task.answers[:1] if task.memory else task.answers:
            batch = random_batch(
                work.sizes.vocabulary,
                task.context,
                device,
                rows=task.batch,
                answers=answers,
            )
            losses: list[torch.Tensor] = []
            if task.memory:
                found.memory, found.timeline = _memory(trainee, batch, losses, device, before)
            else:
                take_step(trainee, batch, losses)
                found.steps.append(_timed(trainee, batch, losses, task, device))
            found.losses.append([loss.item() for loss in losses])
        if not task.memory:  # whose two steps may be too few to tell
            check_losses(*found.losses)


def random_batch(
    vocabulary: int, context: int, device: torch.device, *, rows: int = 1, answers: int = 1
) -> dict[str, torch.Tensor]:
    """Random tokens, the same ones each time: ``input_ids`` and ``labels``, int64 ``[B, S]``.

    Args:
        vocabulary: Number of tokens to choose from.
        context: Tokens a row.
        device: Where the batch goes.
        rows: How many.
        answers: The loss is on one token in so many.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, context), generator=generator)
    labels = ids.masked_fill(torch.arange(context) % answers != 0, -100)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def take_step(
    trainee: Trainee,
    batch: dict[str, torch.Tensor],
    losses: list[torch.Tensor],
    clock: _Clock | None = None,
) -> None:
    """Take a training step, add its loss to ``losses``, and mark its phases.

    Args:
        trainee: Of a method.
        batch: ``input_ids`` and ``labels``, int64 ``[B, S]``.
        losses: Of the steps so far; no number is asked for, which a GPU would have to wait for.
        clock: Marked before the step and after each of its phases.
    """
    mark = (lambda: None) if clock is None else clock.mark
    mark()
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=trainee.autocast):
        loss = trainee.model(**batch).loss
    mark()
    loss.backward()
    mark()
    trainee.optimizer.step()
    trainee.optimizer.zero_grad()
    mark()
    losses.append(loss.detach())


def _timed(
    trainee: Trainee,
    batch: dict[str, torch.Tensor],
    losses: list[torch.Tensor],
    task: Task,
    device: torch.device,
) -> list[list[float]]:
    steps: list[list[float]] = []
    end = time.perf_counter() + task.seconds
    while len(steps) < task.at_least or time.perf_counter() < end or _undecided(losses):
        clock = _Clock(device)
        take_step(trainee, batch, losses, clock)
        steps.append(clock.seconds())
    return steps


def _undecided(losses: Sequence[torch.Tensor]) -> bool:
    """Whether it takes more steps to see if the method learns: LoRA's first hardly count."""
    return len(losses) < _STEPS_TO_LEARN and not losses[-1] < losses[0]


# Memory ---------------------------------------------------------------------------------------


def _memory(
    trainee: Trainee,
    batch: dict[str, torch.Tensor],
    losses: list[torch.Tensor],
    device: torch.device,
    before: int,
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Bytes of two steps: what the process or the GPU's allocator takes, then what lives.

    A short one before them makes the optimizer's states.
    """
    gpu = device.type == "cuda"
    take_step(trainee, {name: each[:, :_FEW_TOKENS] for name, each in batch.items()}, [])
    sampled = AnonymousMemory()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.nullcontext() if gpu else sampled.sampled():
        take_step(trainee, batch, losses)
    found = (
        {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
        if gpu
        else {"resident": sampled.most - before}
    )
    with Meter(trainee.model, trainee.optimizer, device=device) as meter:
        meter.restart()
        start = time.perf_counter()
        take_step(trainee, batch, losses)
        end = time.perf_counter()
    peak = meter.peak.usage
    found["live at the peak"] = peak.total
    found["weights"] = peak.weights
    found["live beyond the weights"] = peak.total - peak.weights
    return found, _at_moments(meter.timeline, start, end)


def _at_moments(timeline: Sequence[Moment], start: float, end: float) -> dict[str, list[int]]:
    """What lives when most does, in each part of a step; in a quiet one, what the last left."""
    parts: list[list[Usage]] = [[] for _ in range(MOMENTS + 1)]
    for moment in timeline:
        part = int((moment.seconds - start) / (end - start) * MOMENTS)
        parts[min(max(part, 0), MOMENTS)].append(moment.usage)
    usage = timeline[0].usage
    found: dict[str, list[int]] = {category: [] for category in CATEGORIES}
    for part in parts:
        most = max(part, key=lambda each: each.total, default=usage)
        for category, numbers in found.items():
            numbers.append(getattr(most, category))
        usage = part[-1] if part else usage
    return found


@contextlib.contextmanager
def _limited(more: int | None) -> Iterator[None]:
    """Within it, the process can map so many bytes more than it has."""
    if more is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (process_bytes("VmData") + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def main() -> None:
    """Do the task that is on standard input; what was found goes to the file in ``argv[1]``."""
    task = Task(**json.load(sys.stdin))
    if task.memory:  # which costs time
        return_freed_memory()
    found = run(task)
    Path(sys.argv[1]).write_text(json.dumps(asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
