"""Princeton's WordNet 3.0: where its files come from, and the nouns in them.

Debian's package ``wordnet-base`` holds the database. It is unpacked into a cache without being
installed, so neither root nor a hub is needed. The format is that of the manual page wndb(5).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ladder_kernels.errors import DataError, MissingFileError

__all__ = ["CACHE", "NOUN_CLASSES", "SYSTEM", "Noun", "find_wordnet", "read_nouns"]

CACHE = Path("build/learning/wordnet")
"""Where the database is unpacked, from the repository's root."""

SYSTEM = Path("/usr/share/wordnet")
"""Where Debian's package installs it."""

NOUN_CLASSES = {
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    11: "event",
    12: "feeling",
    13: "food",
    14: "group",
    15: "location",
    16: "motive",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
    21: "possession",
    22: "process",
    23: "quantity",
    24: "relation",
    25: "shape",
    26: "state",
    27: "substance",
    28: "time",
}
"""The lexicographers' files of nouns by number, as of lexnames(5), without the 51 of noun.Tops."""

_PACKAGE = "wordnet-base"
_FOLDER = SYSTEM.relative_to("/")
_FILE = "data.noun"
_SECONDS = 300
# A definition ends where the first example begins; quotation marks within a definition are kept.
_FIRST_EXAMPLE = re.compile(r'[;:,]\s*"')


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A synset of nouns.

    Attributes:
        offset: Its place in the file, which is its name.
        file: Number of the lexicographer's file, see :data:`NOUN_CLASSES`.
        words: Its words, with spaces.
        definition: Its gloss without the examples.
    """

    offset: int
    file: int
    words: tuple[str, ...]
    definition: str


def find_wordnet(cache: Path = CACHE, *, system: Path = SYSTEM) -> Path:
    """Folder of WordNet's database: the system's, or the one in ``cache``, fetched if need be.

    Args:
        cache: Folder for the unpacked package; made if it does not exist.
        system: Folder of the database where it is installed.

    Raises:
        MissingFileError: If WordNet is not installed and Debian's package cannot be fetched.
    """
    for folder in (system, cache / _FOLDER):
        if (folder / _FILE).is_file():
            return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that another process never sees half of it.
    with tempfile.TemporaryDirectory(dir=cache) as name:
        fetched = Path(name)
        _run("apt-get", "download", _PACKAGE, folder=fetched)
        archive = next(iter(fetched.glob(f"{_PACKAGE}_*.deb")), None)
        if archive is None:
            raise _missing("apt-get left no file")
        _run("dpkg-deb", "-x", archive.name, "unpacked", folder=fetched)
        if not (fetched / "unpacked" / _FOLDER / _FILE).is_file():
            raise _missing(f"{archive.name} holds no {_FOLDER / _FILE}")
        try:
            (fetched / "unpacked" / "usr").rename(cache / "usr")
        except OSError:
            # Another process was first, unless what is there is of no use.
            if not (cache / _FOLDER / _FILE).is_file():
                raise
    return cache / _FOLDER


def read_nouns(folder: Path) -> Iterator[Noun]:
    """Every synset of ``data.noun``, in the order of the file.

    Args:
        folder: Of the database, see :func:`find_wordnet`.

    Raises:
        MissingFileError: If it holds no ``data.noun``.
        DataError: If a line of it is not as wndb(5) says.
    """
    path = folder / _FILE
    if not path.is_file():
        raise MissingFileError(f"{path}: found no such file of WordNet's database")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("  "):  # the licence
            continue
        head, bar, gloss = line.partition(" | ")
        fields = head.split()
        try:
            count = int(fields[3], 16)
            words = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
            if not bar or len(words) != count or fields[2] != "n":
                raise ValueError
            noun = Noun(
                offset=int(fields[0]),
                file=int(fields[1]),
                words=words,
                definition=_definition(gloss),
            )
        except (ValueError, IndexError):
            found = " ".join(line[:40].split())
            raise DataError(
                f"{path}, line {number}: found '{found}', not a synset of nouns as of wndb(5)"
            ) from None
        yield noun


def _definition(gloss: str) -> str:
    text = _FIRST_EXAMPLE.split(gloss, maxsplit=1)[0]
    return " ".join(text.split()).rstrip(" ;:,.")


def _run(*command: str, folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise _missing(f"there is no {command[0]}")
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise _missing(f"{command[0]} took more than {_SECONDS} seconds") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise _missing(f"{command[0]} says: {lines[-1]}") from None


def _missing(why: str) -> MissingFileError:
    return MissingFileError(
        f"WordNet: not installed, and Debian's package {_PACKAGE} cannot be fetched ({why}); "
        f"'apt-get install {_PACKAGE}' as root brings it"
    )
