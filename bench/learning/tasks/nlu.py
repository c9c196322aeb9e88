"""Understanding: which kind of thing does a dictionary's definition define?

Definitions of WordNet's nouns; the word itself is not given. The 25 classes are the files that its
lexicographers sorted nouns into.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bench.learning.tasks.base import ClassesTask, Example
from bench.learning.tasks.wordnet import CACHE, NOUN_CLASSES, Noun, find_wordnet, read_nouns
from ladder_kernels.errors import DataError

__all__ = ["nlu_examples", "nlu_task"]

_DEFINITION_CHARACTERS = range(16, 241)
_HELD_OUT_ONE_IN = 8


def nlu_task(
    seed: int = 0,
    *,
    train_size: int = 6000,
    held_out_size: int = 500,
    wordnet: Path | None = None,
    cache: Path = CACHE,
) -> ClassesTask:
    """The task, balanced over classes as far as the rare ones reach.

    Args:
        seed: Of the order of training.
        train_size: Examples to train on, at most.
        held_out_size: Examples held out, at most.
        wordnet: Folder of the database; default: :func:`~.wordnet.find_wordnet`.
        cache: Where that unpacks it.

    Returns:
        The task; its classes are words with a space before them.

    Raises:
        MissingFileError: If WordNet is not to be had.
        DataError: If it cannot be read, or holds nothing to train on or hold out.
    """
    folder = find_wordnet(cache) if wordnet is None else wordnet
    train, held_out = nlu_examples(read_nouns(folder))
    if not train or not held_out:
        raise DataError(f"{folder}: found no definitions to train on or none to hold out")
    train = train[:train_size]
    random.Random(seed).shuffle(train)
    return ClassesTask(
        name="nlu",
        train=tuple(train),
        held_out=tuple(held_out[:held_out_size]),
        classes=tuple(f" {name}" for name in NOUN_CLASSES.values()),
    )


def nlu_examples(nouns: Iterable[Noun]) -> tuple[list[Example], list[Example]]:
    """Every usable definition, to train on and held out.

    Definitions that are very short or very long are left out, and so are those that several classes
    share; of equal ones in a class the first is kept. The split is by a hash of the definition,
    not of the synset's number, which differs between editions. Classes take turns in the order of
    that hash, so every beginning of a list is as balanced as can be.

    Args:
        nouns: See :func:`~.wordnet.read_nouns`.

    Returns:
        Those to train on, and those held out.
    """
    found: dict[str, list[Noun]] = defaultdict(list)
    for noun in nouns:
        if noun.file in NOUN_CLASSES and len(noun.definition) in _DEFINITION_CHARACTERS:
            found[noun.definition.casefold()].append(noun)
    by_class: dict[bool, dict[int, list[tuple[int, Noun]]]] = {
        held_out: {file: [] for file in NOUN_CLASSES} for held_out in (False, True)
    }
    for definition, same in found.items():
        if len({noun.file for noun in same}) == 1:
            value = int(hashlib.sha256(definition.encode()).hexdigest(), 16)
            held_out = value % _HELD_OUT_ONE_IN == 0
            by_class[held_out][same[0].file].append((value, same[0]))
    return _in_turns(by_class[False].values()), _in_turns(by_class[True].values())


def _in_turns(classes: Iterable[list[tuple[int, Noun]]]) -> list[Example]:
    """First of each class, second of each class, and so on."""
    queue = [
        (turn, value, noun)
        for members in classes
        for turn, (value, noun) in enumerate(sorted(members, key=lambda member: member[0]))
    ]
    # Within a turn the hash decides, so that classes do not always follow in the same order.
    queue.sort(key=lambda entry: entry[:2])
    return [_example(noun) for _, _, noun in queue]


def _example(noun: Noun) -> Example:
    name = NOUN_CLASSES[noun.file]
    return Example(
        prompt=f"Definition: {noun.definition}\nClass:",
        answer=f" {name}",
        details={"class": name, "words": noun.words, "offset": noun.offset},
    )
