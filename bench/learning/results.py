"""Where results of trials are kept: one row a trial in a CSV file, appended as trials end.

A trial whose row is there is not run again, so that a study can be stopped and gone on with at any
time, and several processes may share its trials.
"""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench.learning.trial import Result, Trial
from bench.rows import RESULTS

__all__ = ["FILE", "append", "claimed", "read"]

FILE = RESULTS / "learning.csv"
"""The results of the study."""

_TRIAL = [entry.name for entry in fields(Trial)]
_COLUMNS = _TRIAL + [entry.name for entry in fields(Result) if entry.name != "trial"]


def read(path: Path = FILE) -> list[Result]:
    """Every result, in the order in which trials ended; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_result(row) for row in csv.DictReader(file)]


def _result(row: dict[str, str]) -> Result:
    kinds = {entry.name: type(entry.default) for entry in fields(Trial)}
    trial = Trial(
        **{
            name: kinds[name](row[name]) if kinds[name] in (int, float) else row[name]
            for name in _TRIAL
        }  # type: ignore[arg-type]
    )
    whole = ("tokens", "trained_parameters", "threads")
    real = ("seconds_per_step", "first_loss", "last_loss")
    values: dict[str, Any] = {name: int(row[name]) for name in whole}
    values |= {name: float(row[name] or math.nan) for name in real}
    values |= {name: row[name] for name in ("device", "versions", "commit")}
    return Result(trial=trial, figures=json.loads(row["figures"]), **values)


def append(result: Result, path: Path = FILE) -> None:
    """Add a row, whole or not at all: one write to a file opened for appending."""
    values = asdict(result)
    values |= values.pop("trial")
    values["figures"] = json.dumps({k: round(v, 6) for k, v in result.figures.items()})
    for name in ("seconds_per_step", "first_loss", "last_loss"):
        values[name] = "" if math.isnan(values[name]) else f"{values[name]:.6g}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(values)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def claimed(trial: Trial, folder: Path) -> Iterator[bool]:
    """Whether this process may run a trial: no other one is at it.

    Args:
        trial: The trial.
        folder: Where claims are kept, a file each; they end with the process.

    Yields:
        False if another process runs it now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in trial.key)
    with (folder / name).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
