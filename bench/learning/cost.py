"""What a step costs: seconds of the methods in turns, and the memory of each beyond its base.

A step is one row of 2,048 packed tokens of the docstrings task, in the compute dtype of the study.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import rows as results
from bench.learning.bases import load_base
from bench.learning.data import batches, rows_of
from bench.learning.methods import method_of
from bench.learning.studies import PEFT
from bench.learning.tasks import load_task
from bench.memory import bytes_beyond
from bench.qlora import peft_qlora
from bench.timing import alternate
from ladder_kernels import LadderForCausalLM
from ladder_kernels.demo import find_weights
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.training.data import load_tokenizer

__all__ = ["measure"]

_RECOMPUTED = ", recomputed"
_RANK = 16


def _model(name: str, backbone: Backbone) -> Any:
    recomputed = name.endswith(_RECOMPUTED)
    name = name.removesuffix(_RECOMPUTED)
    if name == PEFT:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base"
            backbone.save_pretrained(base)
            return peft_qlora(base, dtype=backbone.dtype, rank=_RANK, checkpointing=recomputed)
    config = method_of(name).config(backbone.num_layers, 0)
    model = LadderForCausalLM.from_backbone(backbone, config).train()
    model.gradient_checkpointing = recomputed
    return model


def _step(name: str, backbone: Backbone) -> tuple[Callable[[], None], int]:
    """A training step of a method, and how many parameters it trains."""
    tokenizer = load_tokenizer(find_weights())
    task = load_task("docstrings")
    batch = batches(rows_of(task, task.train[:400], tokenizer, 1), tokenizer)[0]
    model = _model(name, backbone)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def _bytes(name: str) -> int:
    """In a process of its own: the most memory of two steps beyond what is there before them."""
    step, _ = _step(name, load_base("nearest"))

    def two_steps() -> list[torch.Tensor]:
        step()
        step()
        return []

    return bytes_beyond(two_steps)


def measure(methods: Sequence[str], *, seconds: float = 90.0) -> None:
    """Measure, print, and write ``learning_cost.csv``.

    Args:
        methods: Names of :data:`bench.learning.methods.METHODS`; with ", recomputed" behind it, the
            layers above the re-entry keep nothing but their inputs.
        seconds: For all turns.
    """
    about = {
        "bench": "learning_cost",
        "model": "SmolLM2-135M-Instruct",
        "shape": "B=1 S=2048 packed",
        "dtype": "bfloat16",
    }
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(methods, pool.map(_bytes, methods, chunksize=1), strict=True))
    backbone = load_base("nearest")
    steps = {name: _step(name, backbone) for name in methods}
    calls = {name: step for name, (step, _) in steps.items()}
    timed = alternate(calls, seconds=seconds, at_least=3)
    lines = [
        [
            name,
            f"{steps[name][1] / 1e6:.2f} M",
            f"{quantiles.median:.2f} s",
            f"{2048 / quantiles.median:,.0f}",
            f"{quantiles.median / timed['qlora'].median:.2f}",
            f"{memory[name] / 1e6:,.0f} MB",
        ]
        for name, quantiles in timed.items()
    ]
    found = results.seconds(
        timed, "transformers", "peft", "bitsandbytes", **about
    ) + results.bytes_of(memory, **about)
    header = [
        "method",
        "trained",
        "a step",
        "tokens/s",
        "time, QLoRA = 1",
        "memory beyond the base",
    ]
    results.report(found, "learning_cost.csv", header, lines)
