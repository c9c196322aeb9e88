"""Rows from files, folders and source trees."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from ladder_kernels.errors import ConfigError, DataError, MissingFileError
from ladder_kernels.training.sources import load_rows

ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}, {"text": "drei\nvier", "n": 3}]


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files(kind: str, tmp_path: Path):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        put(path, lines(ROWS))
    elif kind == "json":
        put(path, json.dumps(ROWS))
    else:
        getattr(datasets.Dataset.from_list(ROWS), f"to_{kind}")(path)
    rows = load_rows(path)
    assert rows.to_list() == ROWS
    assert rows.cache_files, "rows are to be memory-mapped"
    assert load_rows(path, limit=2).to_list() == ROWS[:2]
    assert load_rows(path, limit=9, split="test").to_list() == ROWS


def test_a_text_file_is_one_document(tmp_path: Path):
    path = put(tmp_path / "book.txt", "a line\n\nanother\n")
    assert load_rows(path).to_list() == [{"text": "a line\n\nanother\n"}]


def test_a_folder_of_data_files(tmp_path: Path):
    put(tmp_path / "b.jsonl", lines(ROWS[1:]))
    put(tmp_path / "a.jsonl", lines(ROWS[:1]))
    put(tmp_path / "README.md", "about")
    assert load_rows(tmp_path).to_list() == ROWS


def test_a_folder_with_splits(tmp_path: Path):
    put(tmp_path / "train.jsonl", lines(ROWS[1:]))
    put(tmp_path / "test.jsonl", lines(ROWS[:1]))
    assert load_rows(tmp_path).to_list() == ROWS[1:]
    assert load_rows(tmp_path, split="test").to_list() == ROWS[:1]
    with pytest.raises(DataError, match="no split 'validation'; there are train, test"):
        load_rows(tmp_path, split="validation")


def test_a_source_tree(tmp_path: Path):
    put(tmp_path / "b" / "two.py", "b = 2\n")
    put(tmp_path / "a.py", "a = 1\n")
    put(tmp_path / "package.json", "{}")
    put(tmp_path / "empty.py", "")
    put(tmp_path / ".git" / "hook.py", "hidden")
    put(tmp_path / "__pycache__" / "c.py", "compiled")
    (tmp_path / "latin.c").write_bytes(b"caf\xe9")
    put(tmp_path / "large.c", "x" * 1_000_001)
    expected = [{"text": "a = 1\n", "path": "a.py"}, {"text": "b = 2\n", "path": "b/two.py"}]
    assert load_rows(tmp_path).to_list() == expected


def test_a_changed_source_is_read_again(tmp_path: Path):
    path = put(tmp_path / "a.py", "a = 1\n")
    assert load_rows(tmp_path)[0]["text"] == "a = 1\n"
    put(path, "a = 2\n")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert load_rows(tmp_path)[0]["text"] == "a = 2\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "", "found no rows"),
        ("rows.jsonl", '{"text": "x"}\n{"te', "cannot be read: JSON parse error"),
        ("rows.parquet", "nonsense", "cannot be read: .*[Pp]arquet"),
        ("rows.csv", "text\n", "found no rows"),
        ("rows.xyz", "x", "unknown kind; allowed are .jsonl"),
    ],
)
def test_bad_files(name: str, text: str, message: str, tmp_path: Path):
    path = put(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_folders(tmp_path: Path, write: Callable[..., Path]):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files and no source files"):
        load_rows(tmp_path / "empty")
    put(tmp_path / "mixed" / "a.jsonl", lines(ROWS))
    put(tmp_path / "mixed" / "b.csv", "text\nx\n")
    with pytest.raises(DataError, match="csv and json files; a folder may have one kind"):
        load_rows(tmp_path / "mixed")
    with pytest.raises(ConfigError, match="limit: found 0"):
        load_rows(write("rows.jsonl", [{"text": "x"}]), limit=0)


@pytest.mark.parametrize("name", ["missing.jsonl", "no/such/folder", "./rows", "~/none"])
def test_missing_sources_are_not_looked_up_on_the_hub(name: str):
    with pytest.raises(MissingFileError, match="does not exist"):
        load_rows(name)
