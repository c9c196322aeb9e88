"""One trial: a method learns a task on a base from a seed, and is judged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from bench.learning.bases import load_base
from bench.learning.data import Batch, batches, rows_of
from bench.learning.full import FULL, FULL_BASE, FULL_RATE, FullModel
from bench.learning.judge import judge
from bench.learning.methods import method_of
from bench.learning.tasks import load_task
from bench.rows import commit, device_name, versions
from ladder_kernels import LadderForCausalLM
from ladder_kernels.demo import find_weights
from ladder_kernels.training.data import load_tokenizer

if TYPE_CHECKING:
    from ladder_kernels.models.backbone import Backbone

__all__ = ["Result", "Trial", "groups_of", "run_trial", "train"]

_WARM_UP = 0.1
_LARGEST_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried; equal trials are run once.

    Attributes:
        study: Which question it belongs to.
        task: A name of :data:`bench.learning.tasks.TASKS`.
        base: A name of :data:`bench.learning.bases.BASES`.
        method: A name of :data:`bench.learning.methods.METHODS`, or "untrained".
        seed: Of the initial weights and of what is trained on.
        steps: Of one row each.
        rows: How many different rows; they are gone through again when they end.
        rate: Factor on the method's learning rates.
        examples: Held out, to judge by.
    """

    study: str
    task: str
    base: str
    method: str
    seed: int = 0
    steps: int = 40
    rows: int = 0
    rate: float = 1.0
    examples: int = 250

    @property
    def key(self) -> str:
        """What tells it from others, whatever study it belongs to."""
        return json.dumps({k: v for k, v in asdict(self).items() if k != "study"})


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row of results.

    Attributes:
        trial: What was tried.
        tokens: Trained on, prompts included.
        trained_parameters: How many.
        seconds_per_step: Median, on ``threads`` threads, whatever else the machine did.
        threads: Of this process.
        first_loss: Mean over the first tenth of the steps, in nats a token.
        last_loss: Mean over the last tenth.
        figures: Of the task, by name.
        device: Processor.
        versions: Of what matters.
        commit: Of this repository.
    """

    trial: Trial
    tokens: int
    trained_parameters: int
    seconds_per_step: float
    threads: int
    first_loss: float
    last_loss: float
    figures: dict[str, float]
    device: str = field(default_factory=device_name)
    versions: str = field(default_factory=lambda: versions("transformers"))
    commit: str = field(default_factory=commit)


def groups_of(model: LadderForCausalLM, method: str, rate: float) -> list[dict[str, Any]]:
    """The parameters of a ladder with their learning rates, as optimizers take them.

    Args:
        model: Whose.
        method: Whose learning rates to take.
        rate: Factor on those.
    """
    chosen = method_of(method)
    adapters = list(model.ladder.adapters.parameters())
    known = {id(parameter) for parameter in adapters}
    rungs = [p for p in model.parameters() if id(p) not in known]
    return [
        {"params": parameters, "lr": rate * highest}
        for parameters, highest in ((rungs, chosen.rate), (adapters, chosen.adapter_rate))
        if parameters
    ]


def train(
    model: LadderForCausalLM | FullModel,
    rows: list[Batch],
    groups: list[dict[str, Any]],
    *,
    steps: int,
) -> Iterator[tuple[float, float]]:
    """Take steps of one row each with AdamW: a short rise of the rate, then half a cosine.

    Args:
        model: Is trained.
        rows: Gone through again when they end.
        groups: Its parameters, with the highest of their learning rates.
        steps: How many.

    Yields:
        Loss in nats a token, and seconds, of each step.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    model.train()
    for step in range(steps):
        start = time.perf_counter()
        loss: Any = model(**rows[step % len(rows)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield float(loss.detach()), time.perf_counter() - start


def _prepared(
    trial: Trial, backbone: Backbone | None
) -> tuple[LadderForCausalLM | FullModel, list[dict[str, Any]]]:
    """What a trial trains, and its parameters with their learning rates."""
    if trial.method == FULL:
        if trial.base != FULL_BASE:
            raise ValueError(f"{FULL} begins with the base {FULL_BASE!r}, not {trial.base!r}")
        whole = FullModel()
        rate = trial.rate * FULL_RATE
        return whole, [{"params": list(whole.parameters()), "lr": rate}]
    backbone = load_base(trial.base) if backbone is None else backbone
    method = method_of(trial.method)
    config = method.config(backbone.num_layers, trial.seed)
    model = LadderForCausalLM.from_backbone(backbone, config, tap_dtype=method.tap_dtype)
    return model, groups_of(model, trial.method, trial.rate)


def run_trial(trial: Trial, backbone: Backbone | None = None) -> Result:
    """Run one trial.

    Args:
        trial: What to do.
        backbone: Its base, if it is in memory.
    """
    tokenizer = load_tokenizer(find_weights())
    task = load_task(trial.task, trial.seed)
    untrained = trial.method == "untrained"
    name = "probe" if untrained else trial.method
    model, groups = _prepared(replace(trial, method=name), backbone)
    steps: list[tuple[float, float]] = []
    tokens = 0
    if not untrained:
        wanted = trial.rows or trial.steps
        rows = batches(rows_of(task, task.train, tokenizer, wanted), tokenizer)
        # Rows are the same for every seed of docstrings: the seed turns their order.
        rows = rows[trial.seed :] + rows[: trial.seed]
        steps = list(train(model, rows, groups, steps=trial.steps))
        tokens = sum(rows[s % len(rows)]["input_ids"].numel() for s in range(trial.steps))
    figures = judge(model, tokenizer, task, examples=trial.examples)
    tenth = max(1, len(steps) // 10)
    losses = [loss for loss, _ in steps] or [math.nan]
    seconds = sorted(second for _, second in steps) or [math.nan]
    return Result(
        trial=trial,
        tokens=tokens,
        trained_parameters=0 if untrained else model.num_parameters(only_trainable=True),
        seconds_per_step=seconds[len(seconds) // 2],
        threads=torch.get_num_threads(),
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        figures=figures,
    )
