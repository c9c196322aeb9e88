"""A real fine-tuning task that every machine has: docstrings of Python's own standard library.

Each example is one function. The prompt shows its code without the docstring, the completion is the
docstring. Whole modules are held out, by a fixed hash of their path, so that no function of a
held-out module is ever trained on.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["INSTRUCTION", "DocstringExample", "collect_docstrings", "standard_library"]

INSTRUCTION = "Write the docstring of this Python function."

# Tests and vendored tools repeat each other; a docstring there is rarely written for a reader.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages"}
    | {"dist-packages", "ensurepip", "__pycache__"}
)
_CODE_CHARACTERS = range(60, 1201)
_DOCSTRING_CHARACTERS = range(20, 401)
_HELD_OUT_ONE_IN = 8


@dataclass(frozen=True, kw_only=True)
class DocstringExample:
    """One function of the standard library.

    Attributes:
        module: path of its file relative to the library's folder, with forward slashes.
        name: the function's name.
        code: its source without the docstring.
        docstring: the docstring, with indentation removed.
        held_out: whether its module is kept for evaluation.
    """

    module: str
    name: str
    code: str
    docstring: str
    held_out: bool

    @property
    def prompt(self) -> str:
        """The user's message: instruction and code."""
        return f"{INSTRUCTION}\n\n```python\n{self.code}\n```"

    def messages(self) -> list[dict[str, str]]:
        """The example as a chat: the user shows the code, the assistant answers."""
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.docstring},
        ]


def standard_library() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def collect_docstrings(root: Path | None = None) -> list[DocstringExample]:
    """Read every documented function under ``root``.

    Functions whose code or docstring is very short or very long are left out, and of functions with
    equal code only the first is kept. The order is by path, then by place in the file.

    Args:
        root: a folder of Python files; the running interpreter's standard library by default.

    Returns:
        The examples, training and held-out ones together.
    """
    root = standard_library() if root is None else root
    seen: set[str] = set()
    examples = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        for example in _documented_functions(path, relative.as_posix()):
            if example.code not in seen:
                seen.add(example.code)
                examples.append(example)
    return examples


def _documented_functions(path: Path, module: str) -> Iterator[DocstringExample]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # a few files of the library are broken on purpose, for its own tests
    held_out = int(hashlib.sha256(module.encode()).hexdigest(), 16) % _HELD_OUT_ONE_IN == 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or len(docstring) not in _DOCSTRING_CHARACTERS or len(node.body) < 2:
            continue
        node.body = node.body[1:]
        code = ast.unparse(node)
        if len(code) in _CODE_CHARACTERS:
            yield DocstringExample(
                module=module, name=node.name, code=code, docstring=docstring, held_out=held_out
            )
