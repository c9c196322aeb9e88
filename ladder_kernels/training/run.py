"""A whole training run: from options to a saved ladder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ladder_kernels.training.options import TrainOptions

if TYPE_CHECKING:
    from ladder_kernels.training.evaluation import Perplexity

__all__ = ["TrainOptions", "TrainResult", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did.

    Attributes:
        steps: Optimizer steps, those before a resume included.
        tokens: Real tokens trained on in this process's run, over all processes.
        tokens_per_second: Of those, evaluation and saving not counted.
        peak_memory_bytes: See :func:`ladder_kernels.memory.peak.peak_memory_bytes`.
        train_loss: Mean loss a step.
        base: Held-out perplexity of the base model; ``None`` without held-out data.
        tuned: Held-out perplexity with the trained ladder; ``None`` without held-out data.
        output: Where the ladder was saved.
    """

    steps: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    train_loss: float
    base: Perplexity | None
    tuned: Perplexity | None
    output: Path
