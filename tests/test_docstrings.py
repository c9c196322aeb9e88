from __future__ import annotations

import ast
from pathlib import Path

from ladder_kernels.docstrings import collect_docstrings


def test_standard_library_gives_a_split_by_module() -> None:
    examples = collect_docstrings()
    held_out = [e for e in examples if e.held_out]
    training = [e for e in examples if not e.held_out]
    assert len(training) > 1000
    assert len(held_out) > 50
    assert not {e.module for e in held_out} & {e.module for e in training}
    assert not {e.code for e in held_out} & {e.code for e in training}
    for example in examples[::100]:
        function = ast.parse(example.code).body[0]
        assert ast.get_docstring(function) is None
        assert example.code in example.prompt
        assert example.messages()[1]["content"] == example.docstring


def test_what_is_left_out(tmp_path: Path) -> None:
    body = "\n".join(f"    value_{i} = {i}" for i in range(5))
    documented = f'"""Return nothing, but at some length."""\n{body}'.replace('"""', "'''")
    (tmp_path / "good.py").write_text(
        f"def first():\n    {documented}\n\n"
        f"def undocumented():\n{body}\n\n"
        f'def too_short():\n    """Tiny."""\n{body}\n\n'
        f'def no_code():\n    """Only a docstring, with nothing below it at all."""\n'
    )
    (tmp_path / "twice.py").write_text(f"def first():\n    {documented}\n")
    (tmp_path / "broken.py").write_text("def :\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text(f"def second():\n    {documented}\n")
    examples = collect_docstrings(tmp_path)
    assert [(e.module, e.name) for e in examples] == [("good.py", "first")]
    assert examples[0].docstring == "Return nothing, but at some length."
