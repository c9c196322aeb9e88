"""What holds for every task."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from bench.learning.tasks import TASKS, Task, load_task
from ladder_kernels.docstrings import standard_library
from ladder_kernels.errors import ConfigError

ROOT = Path(__file__).parents[3]

_DIGEST = """
import hashlib
from bench.learning.tasks import load_task
for name in ("maths", "critic"):
    task = load_task(name, 3, train_size=200, held_out_size=50)
    texts = [repr(example) for example in (*task.train, *task.held_out)]
    print(name, hashlib.sha256("".join(texts).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def make(wordnet: Path) -> Callable[..., Task]:
    """``make(name, seed)`` makes a task that is as small as can be."""
    small = {
        "nlu": {"wordnet": wordnet},
        "maths": {"train_size": 300},
        "critic": {"train_size": 300},
        "docstrings": {"root": standard_library() / "asyncio"},
    }
    made: dict[tuple[str, int], Task] = {}

    def make_one(name: str, seed: int = 0, *, anew: bool = False) -> Task:
        if anew or (name, seed) not in made:
            made[name, seed] = load_task(name, seed, **small[name])
        return made[name, seed]

    return make_one


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_deterministic(make: Callable[..., Task], name: str) -> None:
    task, again, other = make(name), make(name, anew=True), make(name, 1)
    assert task.name == name
    assert task is not again
    assert (task.train, task.held_out) == (again.train, again.held_out)
    assert task.train != other.train
    assert task.held_out == other.held_out


@pytest.mark.parametrize("name", TASKS)
def test_nothing_held_out_is_trained_on(make: Callable[..., Task], name: str) -> None:
    for seed in (0, 1):
        task = make(name, seed)
        assert task.train
        assert task.held_out
        prompts = {example.prompt for example in task.train}
        assert not prompts.intersection(example.prompt for example in task.held_out)


def test_no_order_of_sets_or_hashes_matters() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    (digest,) = digests
    assert [line.split()[0] for line in digest.splitlines()] == ["maths", "critic"]


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_follows_the_prompt(
    make: Callable[..., Task], tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Prompt and answer may be encoded apart: together they are the same tokens."""
    task = make(name)
    for example in (*task.train[:200], *task.held_out[:200]):
        prompt, answer, both = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (example.prompt, example.answer, example.prompt + example.answer)
        )
        assert prompt + answer == both, example
        if task.answers == "generated":
            assert len(answer) < task.max_new_tokens


@pytest.mark.parametrize("name", ["nlu", "critic"])
def test_the_first_token_decides(
    make: Callable[..., Task], tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    task = make(name)
    assert task.answers == "classes"
    assert {example.answer for example in task.train} == set(task.classes)
    assert {example.answer for example in task.held_out} <= set(task.classes)
    first = {tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in task.classes}
    assert len(first) == len(task.classes)


def test_the_longest_chain_can_be_generated(
    make: Callable[..., Task], tokenizer: PreTrainedTokenizerBase
) -> None:
    longest = "\n".join(["999 * 999 = 999"] * 6 + ["Answer: 999"])
    tokens = tokenizer(longest, add_special_tokens=False)["input_ids"]
    assert len(tokens) < make("maths").max_new_tokens


def test_an_unknown_task() -> None:
    with pytest.raises(ConfigError, match="task 'chess': found no such task; there are nlu, maths"):
        load_task("chess")
