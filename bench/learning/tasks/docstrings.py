"""Writing: the docstring of a function of Python's standard library, as in ``make demo``."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.learning.tasks.base import Answers, Example, Metric, Task
from ladder_kernels.docstrings import DocstringExample, collect_docstrings, standard_library
from ladder_kernels.errors import DataError

__all__ = ["DocstringsTask", "docstrings_task"]


@dataclass(frozen=True, kw_only=True)
class DocstringsTask(Task):
    """Functions as prompts, their docstrings as answers; its metric is their perplexity.

    In the details of an example, ``messages`` is the same as a chat, and ``function`` is what
    :func:`ladder_kernels.demo.packed_rows` takes.
    """

    name: str = "docstrings"
    metric: Metric = "perplexity"
    answers: Answers = "text"

    def score(self, example: Example, output: str) -> dict[str, float]:
        """Whether ``output`` is the docstring itself; perplexity needs the model."""
        return {"exact_match": float(output.strip() == example.answer)}


def docstrings_task(seed: int = 0, *, root: Path | None = None) -> DocstringsTask:
    """The task, split by module, and with seed 0 in the order of the demo.

    Args:
        seed: Of the order of training.
        root: A folder of Python files; default: the running interpreter's standard library.

    Raises:
        DataError: If there is no function to train on or none to hold out.
    """
    root = standard_library() if root is None else root
    found = collect_docstrings(root)
    train = [function for function in found if not function.held_out]
    held_out = [function for function in found if function.held_out]
    if not train or not held_out:
        raise DataError(f"{root}: found no functions with docstrings to train on or none held out")
    random.Random(seed).shuffle(train)
    random.Random(0).shuffle(held_out)
    return DocstringsTask(train=_examples(train), held_out=_examples(held_out))


def _examples(functions: Iterable[DocstringExample]) -> tuple[Example, ...]:
    return tuple(
        Example(
            # One newline: of two, which are one token, the second would be split off by the answer.
            prompt=f"{function.prompt}\n",
            answer=function.docstring,
            details={
                "module": function.module,
                "name": function.name,
                "messages": function.messages(),
                "function": function,
            },
        )
        for function in functions
    )
