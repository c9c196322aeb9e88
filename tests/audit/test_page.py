"""Rows of findings, and the page that is made of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from ladder_kernels.audit.audit import Finding, audit
from ladder_kernels.audit.catalogue import cases
from ladder_kernels.audit.page import page
from ladder_kernels.audit.rows import bits_in_words, rows
from ladder_kernels.audit.samples import samples
from ladder_kernels.audit.targets import TARGETS
from ladder_kernels.audit.traffic import Execution, execute_samples

CASES = (
    "rung_merge sum",
    "rms_norm with",
    "nf4_linear_transposed down M=16",
    "nf4_linear_transposed down M=2048",
)


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    chosen = [case for case in cases() if case.name.startswith(CASES)]
    return list(audit([TARGETS["sm_86"], TARGETS["gfx942"]], chosen))


@pytest.fixture(scope="module")
def executions() -> list[Execution]:
    chosen = [sample for sample in samples() if sample.name.startswith("rms_norm with")]
    return list(execute_samples(TARGETS["sm_86"], chosen))


def test_rows_add_launches_up(findings):
    found = {(row.target, row.case, row.kernel): row for row in rows(findings)}
    row = found["sm_86", "rung_merge sum, two taps", "_rung_merge_forward_kernel"]
    assert len(row.findings) == len(row.binaries) == 2
    assert row.most(lambda binary: binary.registers) == max(b.registers for b in row.binaries)
    longest = [max(f.seconds["RTX 3060"].values()) for f in row.findings]
    assert row.seconds("RTX 3060") == pytest.approx(sum(longest))
    assert row.parts("RTX 3060")["memory"] == pytest.approx(
        sum(f.seconds["RTX 3060"]["memory"] for f in row.findings)
    )
    assert row.bound("RTX 3060") == "matrix"
    assert row.matrix_kinds == ["HMMA.16816.F32.BF16"]
    assert row.load_bits == {128: 8}
    assert 1 < row.instructions_per_matrix < 20
    norm = found["gfx942", "rms_norm with residual", "_rms_norm_forward_kernel"]
    assert (norm.devices, norm.seconds("A100"), norm.bound("A100")) == ([], 0, "")
    assert norm.instructions_per_matrix is None


def test_rows_of_what_does_not_compile(findings):
    (row,) = rows([replace(findings[0], binary=None, seconds={}, faults=("no",))])
    assert (row.binaries, row.occupancy, row.load_bits, row.matrix_kinds) == ([], 0, {}, [])
    assert row.most(lambda binary: binary.registers) == 0


def test_bits_in_words():
    assert bits_in_words({128: 8, 8: 1}) == "8 x 128, 1 x 8"


def _line(text: str, heading: str, *parts: str) -> list[str]:
    """The cells of the first line of a section that has all parts."""
    section = text.split(heading)[1].split("\n## ")[0]
    line = next(each for each in section.splitlines() if all(part in each for part in parts))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page(findings, executions):
    text = page(findings, executions)
    assert f"Of {len(findings)} launches for 2 targets, none spills" in text
    short = _line(text, "## In short", "rms_norm with residual")
    # Four arrays of 2,048 rows of 3,584 numbers of two bytes at 360 GB a second, and the weight.
    assert short[1] == "163, memory"
    assert short[2:] == [""] * 5
    fused = _line(text, "## In short", "nf4_linear_transposed down M=2048")
    assert fused[1].endswith(", matrix")
    assert "M=16" not in text.split("## Every target")[0]
    times = _line(text, "## Modelled times", "rung_merge sum", "_rung_merge_forward_kernel")
    assert times[2:4] == ["2", "matrix"]
    code = _line(text, "## Machine code", "_rms_norm_forward_kernel")
    assert code[1] == "BLOCK 4096, 8 warps (sm_86)"
    assert code[6] == "6 x 128"
    assert code[8:] == ["100% / 100%", "1.00"]
    # Of what was not executed nothing is said.
    product = _line(text, "## Machine code", "_rung_merge_forward_kernel")
    assert product[5] == "32 x HMMA.16816.F32.BF16"
    assert product[8:] == ["", ""]
    assert "No argument that makes up a tenth" in text
    every = _line(text, "## Every target", "_rms_norm_forward_kernel")
    assert len(every) == 3
    assert every[1] == f"{code[2]} / 0"
    one = page([f for f in findings if f.target == "sm_86"], executions)
    assert _line(one, "## Every target", "_rung_merge_forward_kernel")[1:] == ["168 / 40"]


def test_unpacked_products_are_marked():
    chosen = [case for case in cases() if case.name == "nf4_linear_transposed down M=2048"]
    text = page(list(audit([TARGETS["sm_80"]], chosen)), [])
    assert _line(text, "## In short", chosen[0].name)[5].endswith("memory †")


def test_faults_stand_on_the_page(findings, executions):
    wrong = [replace(findings[0], faults=("9 spilled registers, 0 bytes of stack",)), *findings[1:]]
    text = page(wrong, executions)
    assert f"- sm_86: {wrong[0].case}, `{wrong[0].kernel}`: 9 spilled registers" in text
    assert "**fault**" in _line(text, "## Every target", wrong[0].kernel)[1]
    assert "none spills" not in text


def test_poor_accesses_stand_on_the_page(findings, executions):
    counters = deepcopy(executions[0].counters)
    counters.loads_of["x"].ideal_sectors = 0
    text = page(findings, [replace(executions[0], counters=counters)])
    assert "`_rms_norm_forward_kernel`: x is read in 16.0 sectors" in text
