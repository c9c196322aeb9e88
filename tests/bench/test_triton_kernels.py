"""The benchmark of the Triton kernels: its list, what it refuses to time, and its rows."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import kernel_calls, rows, triton_kernels
from bench.kernel_calls import Call, calls, shrunk
from bench.timing import Quantiles
from ladder_kernels.audit import interpreting
from ladder_kernels.audit.catalogue import cases
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops.rms_norm import gpu as norm

QUANTILES = Quantiles(low=1e-5, median=2e-5, high=3e-5, calls=9)


def small(name: str) -> Call:
    (call,) = [each for each in calls() if each.name == name]
    return call.on("cpu", size=shrunk, half=torch.float32)


def test_the_list_is_the_audits():
    found = list(calls())
    assert [call.name for call in found] == [case.name for case in cases()]
    for call in found:
        assert callable(kernel_calls._reference(call.module, call.function))
    # Nothing is left replaced.
    assert norm.rms_norm.__module__ == norm.__name__


def test_numbers_for_shapes():
    (full,) = [each for each in calls() if each.name == "rms_norm with residual"]
    x, residual, weight, eps = full.on("cpu").arguments
    assert (x.shape, weight.shape, eps) == ((2048, 3584), (3584,), 1e-6)
    assert {each.dtype for each in (x, residual, weight)} == {torch.bfloat16}
    call = small("nf4_linear q M=2048")
    x, weight, bias, residual = call.arguments
    assert residual is x  # as in the catalogue
    assert isinstance(weight, NF4Weight)
    assert (x.shape, weight.shape, bias.shape) == ((72, 128), (128, 128), (128,))
    again = small("nf4_linear q M=2048").arguments
    assert torch.equal(x, again[0])
    assert torch.equal(weight.packed, again[1].packed)


@pytest.mark.parametrize(
    ("kind", "only", "count"),
    [
        ("interpreted", ["rms_norm", "rotary", "nf4 ", "rung_merge sum", "nf4_linear q M=16"], 8),
        ("interpreted", ["linear_cross_entropy"], 3),
        ("executed", ["rms_norm_backward", "nf4 dequantize"], 2),
    ],
)
def test_dry_run(capsys, kind, only, count):
    assert triton_kernels.main(["--dry-run", kind, "--only", *only]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{count} calls {kind} at small shapes, 0 wrong; no times"
    assert all(line.startswith(f"{kind}: ") for line in lines[:-1])
    assert len(lines) == count + 1


def _never(call: Callable[[], object]) -> Quantiles:
    raise AssertionError("timed")


def _twice(x: torch.Tensor, *more: Any) -> torch.Tensor:
    return 2 * torch.nn.functional.rms_norm(x, x.shape[-1:])


def _narrower(x: torch.Tensor, *more: Any) -> torch.Tensor:
    return x[:, 1:]


@pytest.mark.parametrize(
    ("wrong", "words"), [(_twice, "exceeds .*not timed"), (_narrower, "instead of .*not timed")]
)
def test_a_wrong_result_is_not_timed(monkeypatch, capsys, wrong, words):
    call = small("rms_norm")
    with interpreting():
        assert triton_kernels.timed(call, lambda timed: QUANTILES) == QUANTILES
        monkeypatch.setattr(norm, "rms_norm", wrong)
        with pytest.raises(RuntimeError, match=words):
            triton_kernels.timed(call, _never)
    assert triton_kernels.dry_run("interpreted", ["rms_norm"]) == 1
    assert "wrong: rms_norm: " in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(rows, "write", _never)
    assert triton_kernels.main([]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("There is no GPU here, so nothing was measured")
    assert "ladder-kernels audit" in line


def test_rows_of_a_gpu(monkeypatch, tmp_path, capsys):
    """All but the device: what is called, refused and written on a GPU."""
    whole = Call.on
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_kernels, "architecture", lambda device: "sm_86")
    monkeypatch.setattr(rows, "device_name", lambda: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(triton_kernels, "do_bench", lambda call: QUANTILES)
    monkeypatch.setattr(
        Call, "on", lambda call, device: whole(call, "cpu", size=shrunk, half=torch.float32)
    )
    monkeypatch.setattr(norm, "rms_norm_backward", _twice)
    with interpreting():
        assert triton_kernels.measure(("rms_norm",)) == 1
    with (tmp_path / "triton_kernels.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["shape"] for row in found] == ["rms_norm", "rms_norm with residual"]
    for row in found:
        assert (row["bench"], row["evidence"], row["metric"]) == (
            *("triton_kernels", "measured"),
            "seconds",
        )
        assert (row["low"], row["median"], row["high"]) == ("1e-05", "2e-05", "3e-05")
        assert row["device"] == "NVIDIA GeForce RTX 3060"
        assert "triton=" in row["versions"]
        assert row["commit"]
    out = capsys.readouterr().out
    assert "wrong: rms_norm_backward" in out
    assert "measured / modelled" in out


@pytest.mark.parametrize(
    ("device", "known"),
    [
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA A100-SXM4-80GB", True),
        ("NVIDIA GeForce RTX 4070 Ti", False),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", False),
        ("AMD Instinct MI300X", False),
    ],
)
def test_modelled_times(device, known):
    (case,) = [each for each in cases() if each.name == "rms_norm"]
    seconds = triton_kernels.modelled(case, device)
    assert (seconds is not None) == known
    if seconds is not None:
        assert 1e-6 < seconds < 1e-3
        line = triton_kernels.line_of("a case", QUANTILES, seconds)
        assert line[-1] == f"{QUANTILES.median / seconds:.2f}"
    assert triton_kernels.line_of("a case", QUANTILES, None)[-2:] == ["", ""]
