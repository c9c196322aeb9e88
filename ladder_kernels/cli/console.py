"""What the terminal shows: one-line messages and warnings, quiet libraries, tables."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

__all__ = ["Verbose", "one_line", "print_json", "say", "show_warnings_as_lines", "table"]

# For the authors of libraries, not for who runs them.
_NOT_FOR_USERS = (
    DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning,
)  # fmt: skip


def one_line(message: object) -> str:
    """``message`` as text without line breaks."""
    return " ".join(str(message).split())


def say(line: str) -> None:
    """Write one line to stderr."""
    print(line, file=sys.stderr, flush=True)


def show_warnings_as_lines() -> None:
    """Show every Python warning as one line, ``warning: ...``, without file, line and code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        say(f"warning: {one_line(message)}")

    warnings.showwarning = show
    if not sys.warnoptions:
        warnings.simplefilter("default")
        for category in _NOT_FOR_USERS:
            warnings.simplefilter("ignore", category)


def _quiet_libraries(verbose: bool) -> bool:
    """Choose how much the libraries below say, before they are imported.

    Variables of the environment that the user set count more.
    """
    level = "info" if verbose else "error"
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, level)
    if not sys.stderr.isatty():
        for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    logging.basicConfig(level=level.upper(), format="%(levelname)s: %(name)s: %(message)s")
    if verbose and not sys.warnoptions:
        warnings.simplefilter("default")
    return verbose


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Show what the libraries below say too, and all warnings.",
        callback=_quiet_libraries,
        is_eager=True,
    ),
]
"""The option ``--verbose``, which every command has."""


def table(
    columns: Sequence[str] | None, rows: Sequence[Sequence[str]], *, numbers: bool = False
) -> None:
    """Print a table to stdout whose first column names the rows.

    Args:
        columns: Headings; ``None`` shows none.
        rows: Cells, as many as there are columns.
        numbers: Whether the other columns hold numbers, which are aligned to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(show_edge=False, box=None, pad_edge=False, show_header=columns is not None)
    for index, column in enumerate(columns or [""] * len(rows[0])):
        right = numbers and index > 0
        grid.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    Console().print(grid)


def print_json(values: Mapping[str, Any]) -> None:
    """Print values to stdout as one JSON object; numbers that JSON lacks (infinity) as null."""
    print(json.dumps(_plain(values), indent=2, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
