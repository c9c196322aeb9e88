"""What a task of the study is: examples to learn from, examples held out, and how to judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Answers", "ClassesTask", "Example", "Metric", "Task"]

Metric = Literal["accuracy", "exact_match", "perplexity"]
"""What counts."""

Answers = Literal["classes", "generated", "text"]
"""How a model is asked."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and what shall follow it.

    Attributes:
        prompt: Plain text, without a chat template; the answer follows it immediately.
        answer: What is learned. The caller adds the end-of-sequence token.
        details: What a table of results may be split by, such as depth or class.
    """

    prompt: str
    answer: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Examples and the way in which answers to them are judged.

    What is held out, and its order, is the same for every seed, so that figures of several seeds
    can be compared. What is trained on is never held out.

    Attributes:
        name: As in :data:`bench.learning.tasks.TASKS`.
        metric: The key of :meth:`score` that counts ("accuracy", "exact_match"), or "perplexity",
            which needs the model itself.
        answers: How a model is asked: which of the ``classes`` is likeliest ("classes"), what it
            generates ("generated"), or how likely the answer is ("text").
        train: What to learn from, shuffled once, in the order in which it is taken.
        held_out: What to judge by. Every beginning of it is about as balanced as the whole.
        classes: With "classes", every answer that there is; no two share their first token.
        max_new_tokens: With "generated", enough for the longest answer and the end of sequence.
    """

    name: str
    metric: Metric
    answers: Answers
    train: Sequence[Example] = field(repr=False)
    held_out: Sequence[Example] = field(repr=False)
    classes: tuple[str, ...] = ()
    max_new_tokens: int = 0

    @abstractmethod
    def score(self, example: Example, output: str) -> dict[str, float]:
        """Judge one answer.

        Args:
            example: What was asked.
            output: What the model answered, without the end-of-sequence token.

        Returns:
            Figures by name; means over examples make sense of each.
        """


@dataclass(frozen=True, kw_only=True)
class ClassesTask(Task):
    """A task whose answers are classes of one word each; its metric is accuracy."""

    metric: Metric = "accuracy"
    answers: Answers = "classes"

    def score(self, example: Example, output: str) -> dict[str, float]:
        """Whether the first word of ``output`` is the class; see :meth:`Task.score`."""
        return {"accuracy": float(output.split()[:1] == example.answer.split())}
