"""From a task to rows of tokens: what is trained on, and what is held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from bench.learning.tasks.base import Example, Task
from ladder_kernels.demo import packed_rows
from ladder_kernels.training.data import pad_token_id_of
from ladder_kernels.training.formats import IGNORE, encode_rows
from ladder_kernels.training.packing import LadderCollator, pack_rows

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["CONTEXT", "Batch", "batches", "first_answer_tokens", "rows_of"]

Batch = dict[str, torch.Tensor]
"""What a model takes: ``input_ids``, ``labels``, ``position_ids``, ``attention_mask``."""

CONTEXT = {"docstrings": 2048, "nlu": 1024, "maths": 1024, "critic": 1024}
"""Tokens a row, by task; a step is one row."""

_AT_A_TIME = 400


def rows_of(
    task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, rows: int
) -> datasets.Dataset:
    """At most ``rows`` packed rows of the first examples that fill them, in a mixed order.

    Packing puts examples of like lengths together; the rows are mixed again, by a fixed draw.

    Args:
        task: Whose examples these are.
        examples: In the order in which they are taken.
        tokenizer: The model's.
        rows: How many.
    """
    import datasets

    context = CONTEXT[task.name]
    if task.name == "docstrings":
        functions = [example.details["function"] for example in examples]
        packed = packed_rows(functions, tokenizer, context, len(functions))
    else:
        count, packed = _AT_A_TIME, None
        while packed is None or (len(packed) <= rows and count < 2 * len(examples)):
            pairs = [{"prompt": e.prompt, "completion": e.answer} for e in examples[:count]]
            encoded = encode_rows(datasets.Dataset.from_list(pairs), tokenizer, format="completion")
            packed = pack_rows(encoded, context, pad_token_id=pad_token_id_of(tokenizer))
            count *= 2
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(1))
    return packed.select(order[:rows].tolist())


def batches(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Each row as a batch of one."""
    collate = LadderCollator(pad_token_id_of(tokenizer))
    return [collate([row]) for row in rows]


def first_answer_tokens(batch: Batch) -> Iterable[tuple[int, int]]:
    """Place of the token before each answer in a packed row, and the answer's first token."""
    labels = batch["labels"][0].tolist()
    for place in range(1, len(labels)):
        if labels[place] != IGNORE and labels[place - 1] == IGNORE:
            yield place - 1, labels[place]
