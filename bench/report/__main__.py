"""Puts what was measured into pages: tables, plots, and the figures that prose cites.

    python -m bench.report                     rewrite the blocks of the pages, and draw their plots
    python -m bench.report --check             say which of them are not as the rows are
    python -m bench.report --list              the tables and plots that there are
    python -m bench.report --show NAME         print a table, or draw a plot, whether shown or not

Pages are README.md and bench/results/README.md, unless others are named. Their blocks are described
in ``bench/report/blocks.py``; a table or a plot is declared in ``specs.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import rows as results
from bench.report import pictures
from bench.report.blocks import Block, blocks, rewritten
from bench.report.pictures import Plot
from bench.report.specs import PLOTS, TABLES
from bench.report.tables import Table
from ladder_kernels.errors import ConfigError, LadderKernelsError

_PAGES = (Path(__file__).parents[2] / "README.md", results.RESULTS / "README.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns 1 if blocks differ from the rows, 2 if one is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing")
    what.add_argument("--list", action="store_true", help="names of tables and plots")
    what.add_argument("--show", metavar="NAME", help="one of them")
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files")
    given = parser.parse_args(arguments)
    pages = given.pages or [page for page in _PAGES if page.is_file()]
    try:
        if given.list:
            _list()
        elif given.show:
            _show(given.show)
        elif given.check:
            differing = [said for page in pages for said in check(page)]
            print("\n".join(differing) or "All blocks are as the rows are.")
            return int(bool(differing))
        else:
            for page in pages:
                update(page)
    except LadderKernelsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def update(page: Path) -> None:
    """Rewrite the blocks of a Markdown file, draw its plots, and say what was done."""
    old = page.read_text(encoding="utf-8")
    new = rewritten(old, lambda block: text_of(block, page))
    for block in _shown(old, "table"):
        print("\n".join(_table(block.name).missing()) or f"table {block.name}: every row is there.")
    for block in _shown(old, "plot"):
        _draw(_plot(block.name))
    if new == old:
        print(f"{_short(page)}: its blocks were as the rows are.")
        return
    beside = page.with_suffix(".new")
    beside.write_text(new, encoding="utf-8")
    beside.replace(page)
    print(f"{_short(page)}: rewritten.")


def check(page: Path) -> list[str]:
    """A sentence for each block of a Markdown file that is not as the rows are."""
    document = page.read_text(encoding="utf-8")
    said = []
    as_they_should_be = blocks(rewritten(document, lambda block: text_of(block, page)))
    for block, right in zip(blocks(document), as_they_should_be, strict=True):
        if block.text != right.text:
            said.append(f"{_short(page)}: the {block.kind} {block.name} differs from the rows.")
    for block in _shown(document, "plot"):
        plot = _plot(block.name)
        if plot.rows() and not pictures.is_of(plot, results.RESULTS):
            said.append(
                f"{_short(page)}: the files of the plot {block.name} are not of these rows."
            )
    return said


def text_of(block: Block, page: Path) -> str:
    """What a block of a page should say.

    Raises:
        ConfigError: It names no table, plot, line or column.
    """
    if block.kind == "table":
        return _table(block.name).text()
    if block.kind == "plot":
        folder = os.path.relpath(results.RESULTS.resolve(), page.resolve().parent)
        return pictures.block(_plot(block.name), Path(folder).as_posix())
    parts = block.name.split(" > ")
    if len(parts) != 3:
        raise ConfigError(f"a figure is cited as 'TABLE > LINE > COLUMN', not as {block.name!r}")
    table, line, column = parts
    return _table(table).cited(line, column)


def _short(page: Path) -> Path:
    """From where the command runs, if it is below."""
    return page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page


def _shown(document: str, kind: str) -> list[Block]:
    return [block for block in blocks(document) if block.kind == kind]


def _table(name: str) -> Table:
    if name not in TABLES:
        raise ConfigError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    return TABLES[name]


def _plot(name: str) -> Plot:
    if name not in PLOTS:
        raise ConfigError(f"there is no plot {name!r}; there are {', '.join(PLOTS)}")
    return PLOTS[name]


def _list() -> None:
    for table in TABLES.values():
        print(f"table {table.name}: {table.source.file}, measured by {table.source.command}")
    for plot in PLOTS.values():
        print(f"plot {plot.name}: {plot.title}")


def _show(name: str) -> None:
    if name in TABLES:
        print(TABLES[name].text())
        print("\n".join(["", *TABLES[name].missing()]))
    elif name in PLOTS:
        _draw(PLOTS[name])
    else:
        raise ConfigError(f"there is no table or plot {name!r}; --list names them")


def _draw(plot: Plot) -> None:
    if not plot.rows():
        print(f"plot {plot.name}: {plot.source.file} has not the rows for it; nothing was drawn.")
        return
    for file in pictures.write(plot, results.RESULTS):
        print(f"plot {plot.name}: {file.name} written.")


if __name__ == "__main__":
    sys.exit(main())
