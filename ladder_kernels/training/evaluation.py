"""Perplexity of a model on held-out rows."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ladder_kernels.errors import DataError
from ladder_kernels.training.packing import LadderCollator

if TYPE_CHECKING:
    import datasets

    from ladder_kernels.models.modeling import LadderForCausalLM

__all__ = ["Perplexity", "evaluate_perplexity", "sum_of_losses"]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts held-out tokens.

    Attributes:
        loss: Mean cross-entropy of a predicted token, in nats.
        perplexity: ``exp(loss)``.
        tokens: Tokens that were predicted: those with a label, the first of each row left out.
        seconds: What the evaluation took.
    """

    loss: float
    perplexity: float
    tokens: int
    seconds: float

    @classmethod
    def of(cls, total: float, tokens: int, seconds: float) -> Perplexity:
        """From the sum of the losses of ``tokens`` tokens.

        Raises:
            DataError: If there are none.
        """
        if tokens == 0:
            raise DataError("evaluation: found no token to predict; rows need labels")
        loss = total / tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return cls(loss=loss, perplexity=perplexity, tokens=tokens, seconds=seconds)


def evaluate_perplexity(
    model: LadderForCausalLM,
    rows: datasets.Dataset,
    *,
    batch_size: int = 1,
    base: bool = False,
    progress: bool = False,
) -> Perplexity:
    """Perplexity over all tokens with a label: the mean is over tokens, not over rows.

    Args:
        model: Its mode (training or evaluation) is restored afterwards.
        rows: As :func:`~.data.prepare_data` makes them.
        batch_size: Rows at a time.
        base: Evaluate the base model, without the ladder.
        progress: Show a progress bar.

    Returns:
        Loss and perplexity.

    Raises:
        DataError: If no token has a label.
    """
    start = time.perf_counter()
    total, tokens = sum_of_losses(model, rows, batch_size=batch_size, base=base, progress=progress)
    return Perplexity.of(total, tokens, time.perf_counter() - start)


def sum_of_losses(
    model: LadderForCausalLM,
    rows: datasets.Dataset,
    *,
    batch_size: int = 1,
    base: bool = False,
    progress: bool = False,
) -> tuple[float, int]:
    """The sum of the losses of all predicted tokens of ``rows``, and how many those are.

    Arguments are those of :func:`evaluate_perplexity`.
    """
    import torch

    collate = LadderCollator()
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_ladder() if base else contextlib.nullcontext():
            for start in _steps(len(rows), batch_size, progress):
                end = min(start + batch_size, len(rows))
                batch = collate([rows[index] for index in range(start, end)])
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                loss = model(**batch, num_items_in_batch=1, return_logits=False).loss
                total += float(loss)
                tokens += int((batch["labels"][:, 1:] != -100).sum())
    finally:
        model.train(training)
    return total, tokens


def _steps(rows: int, batch_size: int, progress: bool) -> Iterator[int]:
    starts = range(0, rows, batch_size)
    if not progress:
        yield from starts
        return
    from rich.progress import track

    yield from track(starts, description="Evaluating")
