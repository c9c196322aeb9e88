"""The gate: what ships compiles without faults, and no kernel is forgotten.

A representative part; ``ladder-kernels audit`` compiles everything for every target.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ladder_kernels.audit import audit as module
from ladder_kernels.audit.audit import audit, kernels, unaudited
from ladder_kernels.audit.binary import Binary, Instructions, compile_kernel
from ladder_kernels.audit.catalogue import Case, cases, work_of
from ladder_kernels.audit.launches import recording
from ladder_kernels.audit.model import Work
from ladder_kernels.audit.targets import TARGETS
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops.nf4_linear import gpu as linear
from ladder_kernels.ops.nf4_linear.configurations import Configuration, look_up, using
from tests.audit.kernels import _product_kernel, _scale_kernel

EVERYWHERE = ("nf4_linear q M=16", "nf4_swiglu_int8 M=128", "rung_merge gate", "rms_norm_backward")


def _launches(target: str) -> dict[str, Any]:
    with recording(target) as launches:
        for case in cases():
            case.call()
    return {launch.name: launch for launch in launches}


def test_everything_for_one_target():
    findings = list(audit([TARGETS["sm_86"]]))
    assert [finding for finding in findings if finding.faults] == []
    assert unaudited(findings) == []
    # Modelled: what multiplies 2,048 tokens' worth of matrices is bound by that.
    products = [f for f in findings if f.case == "nf4_linear down M=2048"]
    for finding in products:
        parts = finding.seconds["RTX 3060"]
        assert max(parts, key=parts.__getitem__) == "matrix", finding.kernel


@pytest.mark.parametrize("layer", ["q", "down"])
def test_products_of_many_rows_take_less_time_in_int8(layer):
    """Modelled, rounding of x included."""
    names = [f"nf4_linear{kind} {layer} M=2048" for kind in ("", "_int8")]
    chosen = [case for case in cases() if case.name in names]
    for target in ("sm_86", "sm_89"):
        times: dict[str, dict[str, float]] = {name: defaultdict(float) for name in names}
        for finding in audit([TARGETS[target]], chosen):
            for device, parts in finding.seconds.items():
                times[finding.case][device] += max(parts.values())
        for device, exact in times[names[0]].items():
            assert exact > 1.7 * times[names[1]][device], device


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "sm_86"])
def test_a_part_for_every_target(target):
    chosen = [case for case in cases() if case.name.startswith(EVERYWHERE)]
    findings = list(audit([TARGETS[target]], chosen))
    assert {finding.case for finding in findings} >= {"nf4_linear q M=16", "rms_norm_backward"}
    assert [finding for finding in findings if finding.faults] == []


def test_every_kernel_is_launched_and_known_for_every_target():
    launched: set[str] = set()
    for target in TARGETS:
        launches = _launches(target)
        assert all(work_of(launch) is not None for launch in launches.values())
        launched |= set(launches)
    assert {name.rpartition(".")[2] for name in kernels()} == launched


def _case(call: Callable[[], Any]) -> Case:
    return Case(name="a case", call=call)


def _multiply() -> None:
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    _product_kernel[(1, 1)](
        x, x, x, 64, 64, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, maxnreg=40,
        enable_fp_fusion=True,
    )  # fmt: skip


def test_a_kernel_that_spills_is_a_fault(monkeypatch):
    monkeypatch.setattr(module, "work_of", lambda _: Work(operations=1.0, moved=1.0, trips=2.0))
    (finding,) = audit([TARGETS["sm_86"]], [_case(_multiply)])
    assert len(finding.faults) == 1
    assert "spilled registers" in finding.faults[0]
    assert finding.kernel == "_product_kernel"


def test_a_kernel_that_nobody_entered_is_a_fault():
    (finding,) = audit([TARGETS["sm_86"]], [_case(_multiply)])
    assert finding.faults == ("a kernel that the catalogue does not know",)


def test_a_kernel_that_does_not_compile_is_a_fault():
    def call() -> None:
        x = torch.empty(64, device="meta")
        _scale_kernel[(1,)](x, None, x, 2.0, 64, 1, BLOCK=48)  # not a power of two

    (finding,) = audit([TARGETS["sm_86"]], [_case(call)])
    assert finding.binary is None
    assert "does not compile" in finding.faults[0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shared": 100 * 1024}, "102400 bytes of shared memory, more than 101376"),
        ({"stack": 16}, "0 spilled registers, 16 bytes of stack"),
        ({}, "a matrix product without matrix instructions"),
    ],
)
def test_limits(change, fault):
    whole = Instructions(total=10, classes={"matrix": 1} if change else {}, names={})
    parts: dict[str, Any] = {"registers": 32, "spilled": 0, "stack": 0, "shared": 0} | change
    binary = Binary(**parts, whole=whole, loop=None)
    work = Work(operations=1.0, moved=1.0, trips=1.0)
    assert list(module._faults(binary, work, TARGETS["sm_86"])) == [fault]


def test_occupancy():
    (found,) = audit([TARGETS["sm_86"]], [_case(_multiply)])
    # Forty registers of 128 threads, and two stages of two tiles in shared memory.
    assert found.binary is not None
    assert found.occupancy == found.binary.resident_warps(TARGETS["sm_86"], 4) / 48
    assert 0.25 <= found.occupancy <= 1


def test_kernels_in_parts_of_a_module_are_found(monkeypatch, tmp_path):
    """Modules named ``gpu_...`` count, others do not."""
    source = (
        "import triton\n\n\n@triton.jit\ndef _{0}_kernel(x):\n    pass\n\n\n"
        "@triton.jit\ndef _{0}_part(x):\n    pass\n"
    )
    folder = tmp_path / "an_op"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in ("gpu", "gpu_more", "cpu"):
        (folder / f"{name}.py").write_text(source.format(name))
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("an_op")
    found = {name for name, _ in module._kernels_of(package)}
    for name in ("an_op", "an_op.gpu", "an_op.gpu_more"):
        sys.modules.pop(name)
    assert found == {"an_op.gpu._gpu_kernel", "an_op.gpu_more._gpu_more_kernel"}


def test_forgotten_kernels_are_named():
    assert "ladder_kernels.ops.rms_norm.gpu._rms_norm_forward_kernel" in unaudited([])


def _fused(configuration: Configuration) -> None:
    weight = NF4Weight.empty((3584, 3584), device="meta")
    x = torch.empty(2048, 3584, dtype=torch.bfloat16, device="meta")
    with using(configuration):
        linear.nf4_linear(x, weight)


def _dense(configuration: Configuration) -> None:
    x, w, y = (torch.empty(2048, 3584, dtype=torch.bfloat16, device="meta") for _ in range(3))
    _product_kernel[(1, 1)](
        x, w, y, 2048, 3584, 3584, BLOCK_M=configuration.block_m, BLOCK_N=configuration.block_n,
        BLOCK_K=configuration.block_k, **configuration.options(), enable_fp_fusion=True,
    )  # fmt: skip


def _per_matrix_instruction(
    call: Callable[[Configuration], None], configuration: Configuration, target: str
) -> float:
    """Instructions of the main loop for each of its matrix instructions."""
    with recording(target) as launches:
        call(configuration)
    (launch,) = launches
    loop = compile_kernel(
        launch.kernel, launch.signature, launch.constants, TARGETS[target],
        attributes=launch.attributes, options=launch.options,
    ).loop  # fmt: skip
    assert loop is not None
    return loop.total / loop.matrix


@pytest.mark.parametrize("target", ["sm_86", "sm_89"])
@pytest.mark.parametrize("block_m", [128, 256])
def test_decoding_adds_few_instructions_to_those_of_a_dense_weight(target, block_m):
    rows = {128: 128, 256: 2048}[block_m]
    shipped = look_up(target, "forward", torch.bfloat16, rows, 3584 * 3584).configuration
    assert shipped.block_m == block_m
    fused = _per_matrix_instruction(_fused, shipped, target)
    assert fused <= 1.8 * _per_matrix_instruction(_dense, shipped, target)
