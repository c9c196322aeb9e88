"""How well a model does a task: on examples that were held out."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from bench.learning.data import Batch, batches, first_answer_tokens, rows_of
from bench.learning.tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bench.learning.full import FullModel
    from ladder_kernels import LadderForCausalLM

__all__ = ["judge", "mean_loss"]

_GENERATED_AT_ONCE = 32


@torch.no_grad()
def mean_loss(model: LadderForCausalLM | FullModel, held_out: list[Batch]) -> float:
    """Cross-entropy of the answers' tokens, in nats a token."""
    total, count = 0.0, 0
    for batch in held_out:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


def judge(
    model: LadderForCausalLM | FullModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    examples: int,
) -> dict[str, float]:
    """Figures of the task over the first ``examples`` that were held out.

    Args:
        model: In any mode; it is left in evaluation mode.
        tokenizer: The model's.
        task: The task.
        examples: At most so many.

    Returns:
        ``loss`` in nats a token of the answers, ``perplexity``, and what the task scores.
    """
    model.eval()
    held_out = task.held_out[:examples]
    rows = batches(rows_of(task, held_out, tokenizer, len(held_out)), tokenizer)
    loss = mean_loss(model, rows)
    found = {"loss": loss, "perplexity": math.exp(loss)}
    if task.answers == "classes":
        found["accuracy"] = _accuracy(model, tokenizer, task, rows)
    elif task.answers == "generated":
        found |= _generated(model, tokenizer, task, held_out)
    return found


@torch.no_grad()
def _accuracy(
    model: LadderForCausalLM | FullModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: list[Batch],
) -> float:
    """Share of examples whose class is the likeliest of all, by its first token."""
    firsts = torch.tensor(
        [tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in task.classes]
    )
    right, asked = 0, 0
    for batch in rows:
        places, wanted = zip(*first_answer_tokens(batch), strict=True)
        given = {name: value for name, value in batch.items() if name != "labels"}
        logits: Any = model(**given, logits_to_keep=torch.tensor(places)).logits
        chosen = firsts[logits[0][:, firsts].argmax(-1)]
        right += int((chosen == torch.tensor(wanted)).sum())
        asked += len(places)
    return right / asked


@torch.no_grad()
def _generated(
    model: LadderForCausalLM | FullModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    held_out: list[Example] | Any,
) -> dict[str, float]:
    """Means of what the task scores over answers generated greedily."""
    speaker: Any = model
    totals: dict[str, float] = defaultdict(float)
    tokenizer.padding_side = "left"
    for start in range(0, len(held_out), _GENERATED_AT_ONCE):
        part = held_out[start : start + _GENERATED_AT_ONCE]
        given = tokenizer(
            [example.prompt for example in part],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        answers = speaker.generate(**given, max_new_tokens=task.max_new_tokens, do_sample=False)
        for example, answer in zip(part, answers, strict=True):
            new = answer[given["input_ids"].shape[1] :]
            for name, value in task.score(
                example, tokenizer.decode(new, skip_special_tokens=True)
            ).items():
                totals[name] += value
            totals["answer_tokens"] += float((new != tokenizer.pad_token_id).sum())
    return {name: total / len(held_out) for name, total in totals.items()}
