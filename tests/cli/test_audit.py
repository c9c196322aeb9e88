"""``audit``: what it compiles, what it says, and that faults end in exit code 1."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from ladder_kernels.audit import audit as audit_module


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


def test_table(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run = call("audit", "--target", "sm_86", "--only", "rotary")
    assert run.code == 0
    assert "_rotary_turn_kernel" in run.stdout
    assert "RTX 3060" in run.stdout


def test_faults_end_in_an_exit_code(call, monkeypatch):
    monkeypatch.setattr(audit_module, "_faults", lambda *_: ["too slow"])
    run = call("audit", "--target", "sm_86", "--only", "rotary")
    assert run.code == 1
    assert "fault: sm_86: rotary, _rotary_turn_kernel: too slow" in run.stderr


def test_unknown_targets_are_refused(call):
    call("audit", "--target", "sm_1").assert_refused("target 'sm_1': found no such target")
