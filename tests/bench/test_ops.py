"""The benchmark of operations: its table, what it refuses to time, and its rows."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ladder_kernels as lk
from bench import rows
from bench.hold import ISAS
from bench.ops import SETS, int8_error
from bench.ops import __main__ as command
from bench.ops.cases import TABLE, Case, cases
from bench.ops.definitions import DEFINITIONS, DEQUANTISED, LIGER, NUMPY, RECOMPUTING, TORCH
from bench.ops.session import Session
from bench.ops.tracing import traced
from bench.ops.trial import Trial, candidates, verify
from bench.peak import KINDS, Peak
from bench.random_weights import random_backbone
from bench.roofline import Roofline
from ladder_kernels import native, nf4, ops
from ladder_kernels.nn.attention import SequenceLayout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[2]
_PEAK = ("ops/peak", "FLOP/s")


def small(name: str, direction: str = "forward", dtype: str = "float32") -> Case:
    found = (case for case in cases("full") if (case.name, case.direction) == (name, direction))
    return next(case for case in found if case.dtype == dtype).shrunk()


@pytest.mark.parametrize(
    ("device", "backend", "file"), [(CPU, "cpu", "cpu"), (CUDA, "triton", "gpu")]
)
def test_every_operation_and_backend_is_in_the_table(device, backend, file):
    folders = [each.name for each in pkgutil.iter_modules(ops.__path__) if each.ispkg]
    assert len(folders) > 8
    for folder in [*folders, "nf4_quantize", "nf4_dequantize"]:
        of_op = [case for case in cases() if case.op == folder]
        assert of_op, f"there is no case of {folder}"
        assert {case.dtype for case in of_op} == {"float32", "bfloat16"}
        named = [name for case in of_op for name in candidates(case, device)]
        assert "reference" in named
        package = Path(ops.__path__[0]) / folder if folder in folders else Path(nf4.__path__[0])
        assert (backend in named) == (package / f"{file}.py").exists()


def test_every_direction_and_rival_is_in_the_table():
    for name, definition in DEFINITIONS.items():
        directions = {line.direction for line in TABLE if line.name == name}
        assert directions == set(definition.functions), name
        assert directions <= set(definition.flops) & set(definition.numbers), name
        for direction in directions:
            case = small(name, direction)
            work = case.definition.make(case.sizes, _fresh(case))
            assert set(work.rivals) == set(definition.rivals), name
            assert set(work.leaves) <= set(work.inputs)
            assert case.ideal.bytes_moved > 0


def _fresh(case: Case) -> Any:
    from bench.ops.definitions import Fresh

    return Fresh(getattr(torch, case.dtype), CPU)


def test_sets_and_names():
    quick, default, full = (cases(name) for name in SETS)
    assert set(quick) < set(default) < set(full)
    assert len({str(case) for case in full}) == len(full)
    keys = {(case.op, case.model, case.shape, case.dtype) for case in full}
    assert len(keys) == len(full)
    shapes = {case.shape for case in default}
    assert "mlp.down M=2048 N=3584 K=18944" in shapes
    assert "attn.q, backward M=2048 N=3584 K=3584" in shapes
    assert "head, loss and gradient T=2048 V=49152 D=576" in shapes


def test_candidates_by_device_and_case():
    many, few = (
        next(case for case in cases() if case.name == "nf4_linear" and case.sizes["M"] == count)
        for count in (2048, 1)
    )
    assert candidates(many, CPU) == ["cpu", "reference", "bitsandbytes", DEQUANTISED, NUMPY]
    assert NUMPY not in candidates(few, CPU)
    assert NUMPY not in candidates(replace(many, dtype="bfloat16"), CPU)
    assert candidates(many, CUDA) == ["triton", "reference", "bitsandbytes", DEQUANTISED]
    # Only a backward pass computes again what was not kept.
    assert candidates(small("side_mlp"), CPU) == ["cpu", "reference", TORCH]
    backward = ["cpu", "reference", TORCH, RECOMPUTING]
    assert candidates(small("side_mlp", "backward"), CPU) == backward
    # No kernel of ours: PyTorch is all that there is, and is called so.
    assert candidates(small("ranged_attention"), CUDA) == ["reference", TORCH]
    assert LIGER not in candidates(small("rms_norm"), CPU)


def test_what_an_operation_must_do():
    case = next(case for case in cases() if case.shape == "mlp.down M=2048 N=3584 K=18944")
    ideal = case.ideal
    assert ideal.flops == 2 * 2048 * 3584 * 18944
    weight = 3584 * 18944 * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert ideal.bytes_moved == 4 * 2048 * (3584 + 18944) + weight
    assert (ideal.kind, small("nf4_linear_int8").ideal.kind) == ("float32", "int8")
    # A causal row of three: 1 + 2 + 3 pairs, two products of two operations for each channel.
    attention = replace(
        small("ranged_attention"), sizes={"S": 3, "T": 3, "H": 2, "Hkv": 1, "hd": 8}
    )
    assert attention.ideal.flops == 6 * 2 * 2 * 2 * 8
    one = replace(attention, sizes={"S": 1, "T": 5, "H": 1, "Hkv": 1, "hd": 1})
    assert one.ideal.flops == 5 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "direction"),
    [(name, way) for name, each in DEFINITIONS.items() for way in each.functions],
)
def test_small_shapes_are_verified(name, direction, dtype):
    case = small(name, direction, dtype)
    names = candidates(case, CPU)
    trial = Trial(case, CPU)
    trial.run(names, seconds=0, at_least=2)
    assert trial.failures == {}
    assert {name: len(times) for name, times in trial.seconds.items()} == dict.fromkeys(names, 2)


def _wrong(function: Callable[..., Any], spoil: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def wrong(**inputs: Tensor) -> Any:
        made = function(**inputs)
        return (spoil(made[0]), *made[1:]) if isinstance(made, tuple) else spoil(made)

    return wrong


def _one_off(made: Tensor) -> Tensor:
    spoilt = torch.zeros_like(made)
    spoilt.view(-1)[0] = 1e-2
    return made + spoilt


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("nf4_linear", "forward"),
        ("nf4_linear", "backward"),
        ("nf4_linear_int8", "forward"),
        ("linear_cross_entropy", "both"),
        ("rotary", "forward"),
        ("rms_norm", "backward"),
    ],
)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda made: 1.001 * made, "exceeds .*not timed"),
        (lambda made: made * torch.tensor(float("nan")), "exceeds .*not timed"),
    ],
)
def test_a_wrong_candidate_is_refused(name, direction, spoil, words):
    case = small(name, direction)
    trial = Trial(case, CPU)
    rival = next(iter(trial.work.rivals))
    right = trial.work.rivals[rival]
    trial.work = replace(trial.work, rivals={rival: _wrong(right, spoil)})
    trial.run(["reference", rival], seconds=0, at_least=1)
    assert list(trial.failures) == [rival]
    with pytest.raises(RuntimeError, match=words):
        raise trial.failures[rival]
    assert list(trial.seconds) == ["reference"]


def test_wrong_shapes_and_numbers_are_refused():
    trial = Trial(small("nf4_linear"), CPU)
    right = trial.work.rivals[DEQUANTISED]
    spoilt = {
        "narrower": _wrong(right, lambda made: made[:, 1:]),
        "half": _wrong(right, lambda made: made.half()),
        "one number": _wrong(right, _one_off),
    }
    trial.work = replace(trial.work, rivals=spoilt)
    trial.run(list(spoilt), seconds=0, at_least=1)
    assert list(trial.failures) == list(spoilt)
    assert "instead of" in str(trial.failures["narrower"])
    assert "instead of" in str(trial.failures["half"])
    assert trial.seconds == {}


def test_right_on_some_tokens_and_wrong_on_all_is_refused():
    """What is wrong at full size only is seen there."""
    case = small("linear_cross_entropy", "both")
    trial = Trial(case, CPU)
    right = trial.work.rivals[DEQUANTISED]

    def wrong(hidden: Tensor, labels: Tensor) -> Tensor:
        loss = right(hidden, labels)
        return loss if len(labels) < case.sizes["T"] else 1.01 * loss

    trial.work = replace(trial.work, rivals={DEQUANTISED: wrong})
    trial.run([DEQUANTISED], seconds=0, at_least=1)
    assert "not timed" in str(trial.failures[DEQUANTISED])


def test_other_bits_are_refused():
    trial = Trial(small("nf4_dequantize"), CPU)
    right = trial.work.ours

    def nearly(like: Tensor) -> Tensor:
        made = right(like)
        return made if lk.get_backend() == "reference" else made.nextafter(2 * made)

    trial.work = replace(trial.work, ours=nearly)
    trial.run(["cpu", "reference"], seconds=0, at_least=1)
    assert "other bits" in str(trial.failures["cpu"])
    assert list(trial.seconds) == ["reference"]


def test_the_backend_is_the_one_that_is_named():
    seen = []
    trial = Trial(small("rms_norm"), CPU)
    right = trial.work.ours

    def noting(**inputs: Tensor) -> Tensor:
        seen.append(lk.get_backend())
        return right(**inputs)

    trial.work = replace(trial.work, ours=noting)
    for name in ("cpu", "reference"):
        trial.prepared(name)()
    assert seen == ["cpu", "reference"]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_dry_run_on_a_gpu_that_is_not_there(name):
    found = [
        (candidate, problem)
        for direction in DEFINITIONS[name].functions
        for candidate, problem in traced(small(name, direction, "bfloat16"))
    ]
    assert {problem for _, problem in found} == {None}
    ships = name != "ranged_attention"
    assert ("triton" in dict(found)) == ships
    assert "reference" in dict(found)


def test_dry_run_sees_what_is_wrong(monkeypatch):
    case = small("rms_norm")
    whole = DEFINITIONS["rms_norm"].make

    def narrower(sizes: Any, new: Any) -> Any:
        work = whole(sizes, new)
        return replace(work, ours=_wrong(work.ours, lambda made: made[:, 1:]))

    wrong = {**DEFINITIONS, "rms_norm": replace(DEFINITIONS["rms_norm"], make=narrower)}
    monkeypatch.setattr("bench.ops.cases.DEFINITIONS", wrong)
    problems = dict(traced(case))
    assert "instead of" in str(problems["triton"])
    assert problems[TORCH] is None


def test_dry_run_from_the_command_line(capsys):
    assert command.main(["--dry-run", "--quick"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("calls traced on a GPU that is not there, 0 wrong; no times")
    assert int(last.split()[0]) > 80


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("rms_norm", "backward"),
        ("rotary", "forward"),
        ("rung_merge", "forward"),
        ("nf4_linear", "backward"),
        ("linear_cross_entropy", "both"),
        ("nf4_dequantize", "forward"),
    ],
)
def test_triton_kernels_give_what_is_right_here(name, direction):
    pytest.importorskip("triton")
    from ladder_kernels.audit import interpreting

    with interpreting():
        verify(small(name, direction), CPU, ["triton"])


def _benchmark(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The benchmark at small sizes in a process of its own, whose rows go to a folder."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "bench/ops", "--benchmark-only", "--small"),
            *("--benchmark-quiet", "--seconds", "0", "--at-least", "4", "-p", "no:cacheprovider"),
            *("-p", "no:timeout"),  # which the benchmarks' own requirements leave out
            *("--results", str(folder), *more),
        ],
        cwd=ROOT,
        # Within the processes of pytest-xdist, pytest-benchmark would measure nothing.
        env={name: each for name, each in os.environ.items() if not name.startswith("PYTEST_")},
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_whole_path_into_rows(tmp_path):
    saved = tmp_path / "own.json"
    words = "135M and (mlp.down-forward-M70 or (head-both and float32-cpu) or nf4_quantize)"
    done = _benchmark(tmp_path, "-k", words, "--benchmark-json", str(saved))
    assert done.returncode == 0, done.stdout
    found = rows.read("ops.csv", tmp_path)
    of = {(row.bench, row.candidate, row.dtype, row.metric): row for row in found}
    for dtype in ("float32", "bfloat16"):
        for candidate in ("cpu", "reference", "bitsandbytes", DEQUANTISED):
            row = of["ops/nf4_linear", candidate, dtype, "seconds"]
            assert (row.model, row.shape) == ("SmolLM2-135M", "mlp.down M=70 N=128 K=192")
            assert 0 < row.low <= row.median <= row.high
            assert (row.evidence, row.threads > 0, bool(row.versions)) == ("measured", True, True)
            rate = of["ops/nf4_linear", candidate, dtype, "FLOP/s"]
            flops = 2 * 70 * 128 * 192
            assert rate.median == pytest.approx(flops / row.median, rel=1e-4)
            assert rate.low == pytest.approx(flops / row.high, rel=1e-4)
            share = of["ops/nf4_linear", candidate, dtype, "share of the bound"]
            assert 0 < share.low <= share.median <= share.high
    assert ("ops/nf4_linear", NUMPY, "float32", "seconds") in of
    beyond = "bytes: beyond inputs and results"
    assert abs(of["ops/linear_cross_entropy", "cpu", "float32", beyond].median) < 1 << 27
    # Quantising multiplies nothing.
    assert ("ops/nf4_quantize", "cpu", "float32", "FLOP/s") not in of
    for kind in KINDS:
        assert of["ops/peak", "processor", kind, "FLOP/s"].median > 1e8
    assert of["ops/peak", "processor", "", "bytes/s"].median > 1e8
    # They are pytest-benchmark's own times.
    own = json.loads(saved.read_text())["benchmarks"]
    for each in own:
        info = each["extra_info"]
        row = of[f"ops/{info['op']}", info["candidate"], info["dtype"], "seconds"]
        assert each["stats"]["rounds"] == 4
        if info["shape"] == row.shape:
            assert each["stats"]["median"] == pytest.approx(row.median, rel=1e-4)
    assert "| SmolLM2-135M | mlp.down M=70 N=128 K=192 | float32 |" in done.stdout
    assert f"rows in {tmp_path / 'ops.csv'}" in done.stdout


@pytest.mark.skipif("avx2" not in (native.status().isas or ()), reason="there is no AVX2 here")
def test_held_to_an_older_processor(tmp_path):
    done = _benchmark(tmp_path, "-k", "135M and rms_norm and forward", "--isa", "avx2")
    assert done.returncode == 0, done.stdout
    found = rows.read("ops.csv", tmp_path)
    assert found
    assert all(row.device.endswith(", held to AVX2") for row in found)
    peaks = {row.dtype: row.median for row in found if (row.bench, row.metric) == _PEAK}
    assert peaks["bfloat16"] == peaks["float32"]  # AVX2 has no products of bfloat16
    assert set(ISAS) == {"avx2", "avx2_vnni"}


def test_a_wrong_candidate_fails_its_own_item():
    session = Session.here(isa=None, seconds=0, at_least=1)
    session.roofline = Roofline(lambda: Peak(flops=dict.fromkeys(KINDS, 1e9), bytes_read={1: 1e9}))
    case = small("nf4_linear")
    session._of, session._times = case, {"cpu": [1.0, 2.0, 4.0]}
    session._failures = {"bitsandbytes": RuntimeError("not timed")}
    together = ["cpu", "bitsandbytes"]
    assert session.times(case, "cpu", together) == [1.0, 2.0, 4.0]
    with pytest.raises(RuntimeError, match="not timed"):
        session.times(case, "bitsandbytes", together)


def test_errors_of_products_in_whole_numbers(tiny_config):
    backbone = random_backbone(tiny_config(), dtype=torch.float32)
    fused = [m.fused for m in backbone.modules() if hasattr(m, "fused")]
    found: int8_error.Errors = {}
    with torch.no_grad(), int8_error.watched(backbone, found):
        backbone.frozen_pass(torch.arange(48)[None], layout=SequenceLayout.build(1, 48))
    assert {"q", "k", "v", "o", "gate", "up", "down"} <= set(found)
    assert [m.fused for m in backbone.modules() if hasattr(m, "fused")] == fused
    for pairs in found.values():
        assert len(pairs) == 3
        for least, median, most in int8_error.spread(pairs).values():
            assert 0 < least <= median <= most < 0.05


_SCRATCH = """
import torch
from bench.memory import bytes_beyond

def call():
    scratch = torch.ones(1 << 24)
    return [scratch[:1024].clone()]

print(bytes_beyond(call))
"""


def test_bytes_beyond_are_those_of_the_call():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    command = [sys.executable, "-c", _SCRATCH]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) >= 0.9 * (1 << 26)
