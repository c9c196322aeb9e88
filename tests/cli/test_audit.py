"""``audit``: what it compiles, what it says, and that faults end in exit code 1."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from ladder_kernels.audit import audit as audit_module
from ladder_kernels.audit import catalogue, targets
from ladder_kernels.audit import samples as samples_module
from ladder_kernels.cli import audit as cli


def test_json(call):
    run = call("audit", "--target", "sm_86", "--target", "gfx942", "--only", "rms_norm", "--json")
    assert run.code == 0
    assert run.stderr.splitlines() == [
        "compiling for sm_86", "compiling for gfx942", "6 launches, 2 targets, 0 faults",
    ]  # fmt: skip
    found = json.loads(run.stdout)
    assert found["unaudited"] == []
    assert len(found["launches"]) == 6
    first = found["launches"][0]
    assert (first["target"], first["case"]) == ("sm_86", "rms_norm")
    assert first["kernel"] == "_rms_norm_forward_kernel"
    assert first["grid"] == [2048]
    assert 16 <= first["registers"] <= 255
    assert (first["spilled"], first["stack"], first["faults"]) == (0, 0, [])
    modelled = first["modelled_seconds"]["RTX 3060"]
    # 2,048 rows of 3,584 numbers of two bytes, read and written, at 360 GB a second.
    assert modelled["memory"] == pytest.approx(2 * 2048 * 3584 * 2 / 360e9, rel=1e-3)
    assert modelled["matrix"] == 0
    assert found["launches"][-1]["modelled_seconds"] == {}

    assert 0.3 < first["occupancy"] <= 1
    assert first["shared_limit"] == 99 * 1024
    assert first["load_bits"] == {"128": 4}
    assert first["matrix_instructions"] == {}
    assert first["loop_instructions_per_matrix_instruction"] is None
    assert first["bound"] == {"RTX 3060": "memory"}


@pytest.fixture
def tables(monkeypatch):
    """Tables as they are before a narrow terminal folds them: lists of a header and lines."""
    shown = []
    monkeypatch.setattr(cli, "table", lambda header, lines: shown.append((header, lines)))
    return shown


def test_table(call, tables):
    run = call("audit", "--target", "sm_86", "--only", "rung_merge sum")
    assert run.code == 0
    ((header, (line,)),) = tables
    cells = dict(zip(header, line, strict=True))
    assert cells["kernel"] == "_rung_merge_forward_kernel"
    assert (cells["spills"], cells["occupancy"], cells["bound"]) == ("0", "17%", "matrix")
    assert (cells["matrix"], cells["loads"]) == ("HMMA.16816.F32.BF16", "8 x 128")
    assert cells["loop"].endswith(" a matrix instruction")
    assert cells["modelled"].startswith("RTX 3060: ")


def test_a_table_on_a_narrow_terminal(call):
    run = call("audit", "--execute", "--only", "rotary")
    assert run.code == 0
    assert "sm_86" in run.stdout


def test_executing(call):
    run = call("audit", "--execute", "--target", "sm_89", "--only", "rotary", "--json")
    assert run.code == 0
    assert run.stderr.splitlines() == ["executing code for sm_89"]
    found = json.loads(run.stdout)
    assert found["unexecuted"] == []
    queries, keys = found["launches"]
    assert (queries["kernel"], queries["sample"]) == ("_rotary_turn_kernel", "rotary")
    # Heads in place; cosines and sines of half a head.
    q = 16 * 28 * 128 * 2
    assert (queries["loads"]["arguments"]["x"]["bytes"], queries["stores"]["bytes"]) == (q, q)
    assert queries["loads"]["arguments"]["cos"]["coalescing"] == 1
    assert queries["loads"]["bytes_moved"] >= queries["loads"]["bytes"]
    assert queries["instructions"]["total"] > keys["instructions"]["total"] > 0
    assert queries["shared"]["slowdown"] == 1


def test_a_table_of_what_was_executed(call, tables):
    assert call("audit", "--execute", "--only", "rms_norm_backward").code == 0
    ((header, (line,)),) = tables
    cells = dict(zip(header, line, strict=True))
    assert (cells["target"], cells["kernel"]) == ("sm_86", "_rms_norm_backward_kernel")
    assert (cells["loads"], cells["stores"]) == ("16.0 / 16.0", "16.0 / 16.0")
    assert int(cells["instructions"].replace(",", "")) > 0


def test_a_kernel_without_a_sample_ends_in_an_exit_code(call, monkeypatch):
    monkeypatch.setattr(samples_module, "samples", lambda: iter(()))
    run = call("audit", "--execute")
    assert run.code == 1
    assert "sm_86: ladder_kernels.ops.rotary.gpu._rotary_turn_kernel: no sample" in run.stderr


def test_targets_that_are_not_executed_are_refused(call):
    run = call("audit", "--execute", "--target", "sm_90", "--only", "rotary")
    assert run.code == 2
    assert "target 'sm_90': its code cannot be executed here" in run.stderr


def test_the_page(call, monkeypatch, tmp_path):
    rotary = [case for case in catalogue.cases() if case.name == "rotary"]
    few = [sample for sample in samples_module.samples() if sample.name == "rotary"]
    monkeypatch.setattr(catalogue, "cases", lambda: iter(rotary))
    monkeypatch.setattr(samples_module, "samples", lambda: iter(few))
    for name in set(targets.TARGETS) - {"sm_86"}:
        monkeypatch.delitem(targets.TARGETS, name)
    path = tmp_path / "page.md"
    run = call("audit", "--markdown", str(path))
    # What else there is was forgotten.
    assert run.code == 1
    assert "rms_norm_forward_kernel: no case of the catalogue launches it" in run.stderr
    assert "rms_norm_forward_kernel: no sample launches it" in run.stderr
    assert f"wrote {path} in 0 minutes" in run.stderr
    assert "| rotary | `_rotary_turn_kernel` | 2 | memory |" in path.read_text()


@pytest.mark.parametrize("option", [["--json"], ["--execute"], ["--target", "sm_86"]])
def test_the_page_is_about_everything(call, tmp_path, option):
    path = tmp_path / "page.md"
    call("audit", "--markdown", str(path), *option).assert_refused("goes with no other option")
    assert not path.exists()


def test_faults_end_in_an_exit_code(call, monkeypatch):
    monkeypatch.setattr(audit_module, "_faults", lambda *_: ["too slow"])
    run = call("audit", "--target", "sm_86", "--only", "rotary")
    assert run.code == 1
    assert "fault: sm_86: rotary, _rotary_turn_kernel: too slow" in run.stderr


def test_unknown_targets_are_refused(call):
    call("audit", "--target", "sm_1").assert_refused("target 'sm_1': found no such target")
