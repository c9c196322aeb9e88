"""Rows of training data, from files, folders, source trees and the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladder_kernels.errors import ConfigError, DataError, MissingFileError

if TYPE_CHECKING:
    import datasets

__all__ = ["DATA_FILES", "SOURCE_FILES", "load_rows"]

DATA_FILES = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
"""Suffixes of data files, and the reader of ``datasets`` for each."""

_SOURCE_KINDS = """
    adoc bash bat c cc cfg clj cmake cpp cs css cu cuh cxx dart el erl ex exs f90 fs go gradle
    groovy h hh hpp hs hxx ini java jl js jsx kt kts lisp lua m md metal mjs ml mli mm nim php pl
    pm proto ps1 py pyi pyx r rb rs rst sass scala scm scss sh sql swift tcl tex tf toml ts tsx
    txt vb vue yaml yml zig
"""
SOURCE_FILES = frozenset(f".{kind}" for kind in _SOURCE_KINDS.split())
"""Suffixes of the files of a source tree that are read."""

_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "node_modules", "venv", "build", "dist", "target", "site-packages")
)
_LARGEST_SOURCE_BYTES = 1_000_000
# What lies beside data files without being data.
_ASIDE = re.compile(r"(readme|licen[cs]e|copying|notice|citation)\b.*", re.IGNORECASE)


def load_rows(
    source: str | Path, *, split: str = "train", limit: int | None = None
) -> datasets.Dataset:
    """Read rows.

    Rows stay in memory-mapped Arrow files of the cache of ``datasets``, whatever their number.

    Args:
        source: A file (jsonl, json, parquet, csv; or txt, which is one document); a folder whose
            files are all such data files of one kind, apart from a README and the like; any other
            folder, read as a source tree: one row ``{"text", "path"}`` a source file, in order of
            their paths, hidden files, build folders and files above 1 MB left out; or the name of a
            data set on the hub.
        split: Of a hub data set, or of a folder whose file names say their splits. Where there is
            one split only, that one is read whatever its name.
        limit: Read the first so many rows only.

    Returns:
        The rows.

    Raises:
        MissingFileError: If there is no such file or folder, nor a data set on the hub.
        DataError: If the data are empty or unreadable, or have no such split.
        ConfigError: If ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}; it must be 1 or more")
    path = Path(source).expanduser()
    if path.is_file():
        rows = _from_files(str(source), [path], split)
    elif path.is_dir():
        files = _data_files(path)
        rows = _from_files(str(source), files, split, folder=path) if files else _from_tree(path)
    else:
        rows = _from_hub(str(source), split)
    if len(rows) == 0:
        raise DataError(f"{source}: found no rows; there must be at least one")
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder of nothing else; empty for a source tree."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and not _ASIDE.fullmatch(path.name)
    ]
    if any(path.is_dir() or path.suffix.lower() not in DATA_FILES for path in files):
        return []
    return files


def _from_files(
    name: str, files: Sequence[Path], split: str, folder: Path | None = None
) -> datasets.Dataset:
    kinds = sorted({DATA_FILES.get(path.suffix.lower(), "") for path in files})
    if kinds == [""]:
        raise DataError(
            f"{name}: found a file of an unknown kind; allowed are {', '.join(DATA_FILES)}"
        )
    if len(kinds) > 1:
        raise DataError(f"{name}: found {' and '.join(kinds)} files; a folder may have one kind")
    if all(path.stat().st_size == 0 for path in files):
        raise DataError(f"{name}: found no rows; there must be at least one")
    # One document a file: lines of prose mean nothing by themselves.
    options: dict[str, Any] = {"sample_by": "document"} if kinds == ["text"] else {}
    if folder is None:
        options["data_files"] = [str(path) for path in files]
    else:
        options["data_dir"] = str(folder)
    return _load(name, split, kinds[0], **options)


def _from_hub(name: str, split: str) -> datasets.Dataset:
    looks_like_a_file = name.startswith((".", "~")) or Path(name).suffix.lower() in DATA_FILES
    if looks_like_a_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise MissingFileError(f"'{name}' does not exist")
    return _load(name, split, name)


def _load(name: str, split: str, builder: str, **options: Any) -> datasets.Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(builder, **options)
    except (FileNotFoundError, ConnectionError) as error:
        # The hub's client has no one exception for "not there" and "not reachable".
        raise MissingFileError(
            f"'{name}' is neither a file or folder here nor a data set that the hub gives out: "
            f"{_line(error)}"
        ) from None
    except (DatasetsError, OSError, ValueError) as error:
        message = _line(error.__cause__ or error)
        if "corresponds to no data" in message:
            raise DataError(f"{name}: found no rows; there must be at least one") from None
        raise DataError(f"{name}: cannot be read: {message}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded and len(loaded) > 1:
            names = ", ".join(map(str, loaded.keys()))
            raise DataError(f"{name}: found no split {split!r}; there are {names}")
        return loaded[split] if split in loaded else next(iter(loaded.values()))
    raise DataError(f"{name}: found a {type(loaded).__name__}; it must be a data set of rows")


def _from_tree(root: Path) -> datasets.Dataset:
    import datasets

    files = [
        # Size and time are part of the cache's key: a changed file is read again.
        (path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in _source_files(root)
    ]
    if not files:
        raise DataError(f"{root}: found no data files and no source files")
    features = datasets.Features(
        {"text": datasets.Value("string"), "path": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_generator(
        _read_tree,
        features=features,
        gen_kwargs={"root": str(root.resolve()), "files": (tuple(files),)},
    )
    if not isinstance(rows, datasets.Dataset):
        raise DataError(f"{root}: found a {type(rows).__name__}; it must be a data set of rows")
    return rows


def _source_files(root: Path) -> Iterator[Path]:
    """Source files under ``root`` in order of their paths."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(".")
        ]
        for name in names:
            path = Path(folder, name)
            if (
                path.suffix.lower() in SOURCE_FILES
                and not name.startswith(".")
                and path.is_file()
                and 0 < path.stat().st_size <= _LARGEST_SOURCE_BYTES
            ):
                found.append(path)
    yield from sorted(found)


def _read_tree(
    root: str, files: tuple[tuple[tuple[str, int, int], ...], ...]
) -> Iterator[dict[str, str]]:
    for name, _, _ in files[0]:
        try:
            text = Path(root, name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text, whatever its name says
        yield {"text": text, "path": name}


def _line(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
