"""The model's own tokenizer, and a WordNet small enough to write down."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from ladder_kernels.demo import find_weights
from ladder_kernels.training.data import load_tokenizer

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by Princeton\n"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(find_weights())


def synset(offset: int, file: int, words: str, gloss: str) -> str:
    """A line of data.noun as of wndb(5), with a pointer to another synset."""
    names = words.split()
    head = " ".join(f"{name} 0" for name in names)
    return f"{offset:08d} {file:02d} n {len(names):02x} {head} 001 @ 00001740 n 0000 | {gloss}  \n"


@pytest.fixture(scope="session")
def write_nouns() -> Callable[..., Path]:
    """``write_nouns(folder, lines)`` makes a database's folder of these synsets."""

    def write(folder: Path, lines: list[str]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data.noun").write_text(LICENCE + "".join(lines), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory: pytest.TempPathFactory, write_nouns: Callable[..., Path]) -> Path:
    """A database of 30 synsets in each file but noun.motive, which has 4, and noun.Tops, 5."""
    rng = random.Random(0)
    words = (
        "round",
        "small",
        "heavy",
        "old",
        "wet",
        "loud",
        "green",
        "sharp",
        "tall",
        "soft",
        "warm",
    )
    lines = []
    for file in range(3, 29):
        for number in range({3: 5, 16: 4}.get(file, 30)):
            gloss = f"number {number} of kind {file}, {' and '.join(rng.sample(words, 3))}"
            example = f'; "example {number} of it"' if number % 2 else ""
            lines.append(synset(1000 * file + number, file, f"word_{number}", gloss + example))
    return write_nouns(tmp_path_factory.mktemp("wordnet"), lines)
