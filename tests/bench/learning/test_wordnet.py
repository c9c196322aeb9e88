from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.learning.tasks.nlu import nlu_task
from bench.learning.tasks.wordnet import NOUN_CLASSES, find_wordnet, read_nouns
from ladder_kernels.errors import DataError, MissingFileError

CAT = (
    "02121620 05 n 02 cat 0 true_cat 0 003 @ 02120997 n 0000 ~ 02121808 n 0000 ~ 02124272 n 0000 | "
)


@pytest.mark.parametrize(
    ("gloss", "definition"),
    [
        ("a small furry animal  ", "a small furry animal"),
        ('an odd fellow; "he is a cat"; "what a cat!"  ', "an odd fellow"),
        ('living things; of any kind: "all of life"', "living things; of any kind"),
        (
            "the art (or science) of cats (`cat' is short)",
            "the art (or science) of cats (`cat' is short)",
        ),
        ('a so-called "cat" of old; "an example"', 'a so-called "cat" of old'),
        ('dates and - dashes | bars; "A quotation"- Shakespeare', "dates and - dashes | bars"),
    ],
)
def test_a_synset_is_read(
    tmp_path: Path, write_nouns: Callable[..., Path], gloss: str, definition: str
) -> None:
    (noun,) = read_nouns(write_nouns(tmp_path, [f"{CAT}{gloss}\n"]))
    assert (noun.offset, noun.file, noun.words) == (2121620, 5, ("cat", "true cat"))
    assert noun.definition == definition


def test_the_number_of_words_is_hexadecimal(
    tmp_path: Path, write_nouns: Callable[..., Path]
) -> None:
    words = " ".join(f"w{number} 0" for number in range(16))
    (noun,) = read_nouns(write_nouns(tmp_path, [f"00000001 04 n 10 {words} 000 | many words\n"]))
    assert noun.words == tuple(f"w{number}" for number in range(16))


@pytest.mark.parametrize(
    "line",
    [CAT.removesuffix(" | "), "one 05 n 01 cat 0 000 | a cat", "00000001 29 v 01 run 0 000 | go"],
)
def test_a_broken_line_is_named(
    tmp_path: Path, write_nouns: Callable[..., Path], line: str
) -> None:
    folder = write_nouns(tmp_path, [f"{CAT}a cat\n", f"{line}\n"])
    with pytest.raises(DataError, match=r"data\.noun, line 3: found '") as error:
        list(read_nouns(folder))
    assert "\n" not in str(error.value)


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"data\.noun: found no such file"):
        list(read_nouns(tmp_path))


def script(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\nset -e\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stand-ins of Debian's programs, which are looked for there first."""
    folder = tmp_path / "programs"
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_the_package_is_fetched_once(tmp_path: Path, programs: Path) -> None:
    script(programs, "apt-get", f'test "$*" = "download wordnet-base"\necho >> {tmp_path}/fetched\n'
           "touch wordnet-base_1%3a3.0-37_all.deb")  # fmt: skip
    script(programs, "dpkg-deb", 'test "$1" = -x\ntest -f "$2"\nmkdir -p "$3/usr/share/wordnet"\n'
           'touch "$3/usr/share/wordnet/data.noun"')  # fmt: skip
    cache, nowhere = tmp_path / "a" / "cache", tmp_path / "nowhere"
    for _ in range(2):
        folder = find_wordnet(cache, system=nowhere)
        assert folder == cache / "usr" / "share" / "wordnet"
        assert (folder / "data.noun").is_file()
    assert (tmp_path / "fetched").read_text() == "\n"
    assert [path.name for path in cache.iterdir()] == ["usr"]


def test_the_system_comes_first(tmp_path: Path, wordnet: Path, programs: Path) -> None:
    script(programs, "apt-get", "exit 1")
    assert find_wordnet(tmp_path / "cache", system=wordnet) == wordnet
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("apt_get", "why"),
    [
        ("echo first >&2; echo 'E: Unable to locate package' >&2; exit 100", "says: E: Unable to"),
        ("exit 3", "says: exit code 3"),
        ("true", "left no file"),
    ],
)
def test_what_apt_get_says_is_told(tmp_path: Path, programs: Path, apt_get: str, why: str) -> None:
    script(programs, "apt-get", apt_get)
    with pytest.raises(MissingFileError, match=f"WordNet: .*{why}.*apt-get install") as error:
        find_wordnet(tmp_path / "cache", system=tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_system_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingFileError, match="there is no apt-get"):
        find_wordnet(tmp_path / "cache", system=tmp_path / "nowhere")


@pytest.mark.slow
def test_the_real_database(tmp_path: Path) -> None:
    """Fetches Debian's package, 6 MB."""
    folder = find_wordnet(tmp_path, system=tmp_path / "nowhere")
    nouns = list(read_nouns(folder))
    assert len(nouns) == 82115
    by_offset = {noun.offset: noun for noun in nouns}
    cat = by_offset[2121620]
    assert (cat.file, cat.words) == (5, ("cat", "true cat"))
    assert cat.definition.startswith("feline mammal usually having thick soft fur")
    task = nlu_task(wordnet=folder)
    assert (len(task.train), len(task.held_out)) == (6000, 500)
    for examples, rare in ((task.train, 35), (task.held_out, 5)):
        counts = dict.fromkeys(NOUN_CLASSES.values(), 0)
        for example in examples:
            counts[example.details["class"]] += 1
        assert counts.pop("motive") == rare
        assert max(counts.values()) - min(counts.values()) <= 1
