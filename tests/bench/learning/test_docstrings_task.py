from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from bench.learning.tasks.docstrings import DocstringsTask, docstrings_task
from ladder_kernels.demo import packed_rows
from ladder_kernels.docstrings import collect_docstrings
from ladder_kernels.errors import DataError


@pytest.fixture(scope="module")
def task() -> DocstringsTask:
    return docstrings_task()


def test_the_order_is_that_of_the_demo(task: DocstringsTask) -> None:
    examples = collect_docstrings()
    for held_out, found in ((False, task.train), (True, task.held_out)):
        expected = [example for example in examples if example.held_out == held_out]
        random.Random(0).shuffle(expected)
        assert [example.details["function"] for example in found] == expected


def test_examples_are_also_chats(task: DocstringsTask, tokenizer: PreTrainedTokenizerBase) -> None:
    for example in task.held_out[:20]:
        user, assistant = example.details["messages"]
        assert example.prompt == f"{user['content']}\n"
        assert example.answer == assistant["content"]
    functions = [example.details["function"] for example in task.train[:8]]
    rows = packed_rows(functions, tokenizer, 1024, 1)
    learned = [label for label in rows[0]["labels"] if label != -100]
    assert task.train[0].answer in tokenizer.decode(learned)


def test_score(task: DocstringsTask) -> None:
    example = task.held_out[0]
    assert task.score(example, f"{example.answer}\n") == {"exact_match": 1.0}
    assert task.score(example, "Something else.") == {"exact_match": 0.0}


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no functions"):
        docstrings_task(root=tmp_path)
