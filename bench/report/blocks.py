"""Blocks of a Markdown file whose text is generated.

    <!-- table: NAME -->                a table
    ...
    <!-- end -->

    <!-- plot: NAME -->                 a plot, for light pages and for dark ones
    ...
    <!-- end -->

    the ladder makes <!-- figure: TABLE > LINE > COLUMN -->768<!-- end --> tokens/s

The last one cites a cell of a table, within a line of prose; the table need not be in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ladder_kernels.errors import ConfigError

__all__ = ["Block", "blocks", "rewritten"]

_BEGIN = r"<!-- (table|plot|figure): (.+?) -->"
_END = "<!-- end -->"
_BLOCK = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of a file.

    Attributes:
        kind: "table", "plot" or "figure".
        name: Behind it.
        text: Between the two comments.
    """

    kind: str
    name: str
    text: str


def blocks(document: str) -> list[Block]:
    """The blocks of a Markdown text, in order.

    Raises:
        ConfigError: One does not end, or a figure begins a line, where a comment would make the
            line HTML.
    """
    found = []
    for match in _BLOCK.finditer(document):
        kind, name, text = match.groups()
        if re.search(_BEGIN, text):
            raise ConfigError(f"the block '{kind}: {name}' does not end; it must with {_END!r}")
        if kind == "figure" and document[: match.start()].rpartition("\n")[2].strip() == "":
            raise ConfigError(
                f"the block 'figure: {name}' begins a line, which Markdown then takes for HTML; "
                "put a word before it"
            )
        found.append(Block(kind, name, text))
    if len(found) < len(re.findall(_BEGIN, document)):
        raise ConfigError(f"the last block does not end; it must with {_END!r}")
    return found


def rewritten(document: str, text_of: Callable[[Block], str]) -> str:
    """A Markdown text with the blocks' texts replaced.

    Args:
        document: The old one.
        text_of: What stands in a block; a figure's is put within its line, any other on lines of
            its own.
    """
    blocks(document)

    def replace(match: re.Match[str]) -> str:
        block = Block(*match.groups())
        text = text_of(block)
        inner = text if block.kind == "figure" else f"\n\n{text}\n\n"
        return f"<!-- {block.kind}: {block.name} -->{inner}{_END}"

    return _BLOCK.sub(replace, document)
