from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.learning.tasks.nlu import nlu_examples, nlu_task
from bench.learning.tasks.wordnet import NOUN_CLASSES, Noun, read_nouns
from ladder_kernels.errors import DataError


def noun(definition: str, *, file: int = 5, offset: int = 1) -> Noun:
    return Noun(offset=offset, file=file, words=("word",), definition=definition)


def all_examples(*nouns: Noun) -> list[str]:
    train, held_out = nlu_examples(nouns)
    return sorted(example.prompt for example in (*train, *held_out))


def test_the_split_is_fixed_and_complete(wordnet: Path) -> None:
    train, held_out = nlu_examples(read_nouns(wordnet))
    again = nlu_examples(reversed(list(read_nouns(wordnet))))
    assert (train, held_out) == again
    assert len(train) + len(held_out) == 30 * 24 + 4
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    assert 0.05 < len(held_out) / len(train) < 0.25
    by_offset = {noun.offset: noun for noun in read_nouns(wordnet)}
    for example in (*train, *held_out):
        source = by_offset[example.details["offset"]]
        assert example.prompt == f"Definition: {source.definition}\nClass:"
        assert example.answer == f" {NOUN_CLASSES[source.file]}"
        assert '"' not in example.prompt


def test_every_beginning_is_balanced(wordnet: Path) -> None:
    task = nlu_task(wordnet=wordnet, train_size=250, held_out_size=30)
    assert (len(task.train), len(task.held_out)) == (250, 30)
    counts = Counter(example.answer for example in task.train)
    assert set(counts) == set(task.classes)
    assert counts.pop(" motive") <= 4
    assert max(counts.values()) - min(counts.values()) <= 1


def test_what_is_left_out() -> None:
    assert all_examples(noun("long enough to read"), noun("too short"), noun("x" * 241)) == [
        "Definition: long enough to read\nClass:"
    ]
    assert not all_examples(noun("an entity that is at the top", file=3))


def test_equal_definitions() -> None:
    same = [noun("a city in Germany", offset=offset, file=15) for offset in (1, 2)]
    assert len(all_examples(*same, noun("A City in Germany", offset=3, file=15))) == 1
    train, held_out = nlu_examples(same)
    assert [example.details["offset"] for example in (*train, *held_out)] == [1]
    # Of two classes, neither would be right.
    assert not all_examples(*same, noun("a city in germany", offset=3, file=14))


def test_score(wordnet: Path) -> None:
    task = nlu_task(wordnet=wordnet)
    example = next(example for example in task.train if example.answer == " plant")
    for output, right in {
        " plant": 1.0,
        "plant\nDefinition: more": 1.0,
        " plants": 0.0,
        " animal": 0.0,
        " animal plant": 0.0,
        "": 0.0,
    }.items():
        assert task.score(example, output) == {"accuracy": right}, output


def test_nothing_to_hold_out(tmp_path: Path, write_nouns: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="found no definitions"):
        nlu_task(wordnet=write_nouns(tmp_path, []))
