"""Samples launch the code that the audit reads, of every kernel; what is counted of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ladder_kernels.audit.audit import kernels
from ladder_kernels.audit.catalogue import cases
from ladder_kernels.audit.launches import Launch, recording
from ladder_kernels.audit.ptx import Counters, GlobalTraffic
from ladder_kernels.audit.samples import samples
from ladder_kernels.audit.targets import TARGETS
from ladder_kernels.audit.traffic import EXECUTABLE, Execution, execute_samples, unexecuted
from ladder_kernels.errors import ConfigError


def _recorded(target: str, called: Any) -> list[Launch]:
    with recording(target) as launches:
        for case in called:
            case.call()
    return launches


def _execution(launch: Launch, counters: Counters | None = None) -> Execution:
    return Execution(
        case="a sample", kernel=launch.name, target="sm_86", launch=launch,
        counters=counters or Counters(),
    )  # fmt: skip


@pytest.mark.parametrize("target", EXECUTABLE)
def test_every_kernel_has_a_sample_that_launches_audited_code(target):
    launches = _recorded(target, samples())
    audited = {launch.key for launch in _recorded(target, cases())}
    executed = {launch.name for launch in launches if launch.key in audited}
    assert {launch.name for launch in launches} == executed
    assert unexecuted(TARGETS[target], [_execution(launch) for launch in launches]) == []


def test_nearly_all_audited_code_is_executed():
    """What is left are last pieces of weights and vocabularies, which are of other sizes."""
    executed = {launch.key for launch in _recorded("sm_86", samples())}
    left = {launch.name for launch in _recorded("sm_86", cases()) if launch.key not in executed}
    assert left <= {"_nf4_dequantize_kernel", "_linear_cross_entropy_combine_kernel"}


def test_kernels_without_a_sample_are_named():
    launches = _recorded("sm_86", (s for s in samples() if s.name.startswith("rms_norm")))
    missing = unexecuted(TARGETS["sm_86"], [_execution(launch) for launch in launches])
    assert len(missing) == len(kernels()) - 2
    assert "ladder_kernels.ops.rotary.gpu._rotary_turn_kernel" in missing
    # Where there are no tensor cores for them, rungs and losses are PyTorch's.
    without = unexecuted(TARGETS["sm_75"], [])
    assert "ladder_kernels.ops.rotary.gpu._rotary_turn_kernel" in without
    assert not any("rung_merge" in name or "cross_entropy" in name for name in without)


def test_a_kernel_that_nobody_calls_is_named(monkeypatch):
    from ladder_kernels.audit import traffic

    stray = object()
    monkeypatch.setattr(traffic, "kernels", lambda: {"a.gpu._stray_kernel": stray})
    assert unexecuted(TARGETS["sm_86"], []) == ["a.gpu._stray_kernel"]


def _executed(name: str, target: str = "sm_86") -> list[Execution]:
    chosen = [sample for sample in samples() if sample.name == name]
    return list(execute_samples(TARGETS[target], chosen))


def test_counts_of_a_row_wise_kernel():
    (found,) = _executed("rms_norm with residual", "sm_120")
    assert (found.kernel, found.target) == ("_rms_norm_forward_kernel", "sm_120")
    counters = found.counters
    row = 3584 * 2
    # Sixteen programs read x, the residual and the weight, and write the sum and the result.
    assert counters.loads.bytes == 16 * 3 * row
    assert counters.stores.bytes == 16 * 2 * row
    assert set(counters.loads_of) == {"x", "residual", "weight"}
    assert counters.loads.coalescing == counters.stores.coalescing == 1
    assert found.remarks == ()


@pytest.mark.parametrize("name", ["rung_merge sum, two taps", "rung_merge_backward sum, two taps"])
def test_a_rung_has_no_bank_conflicts(name):
    for found in _executed(name):
        assert found.counters.shared.slowdown <= 1.05, found.kernel
        assert found.remarks == ()


def test_remarks():
    counters = Counters()
    counters.loads_of["x"] = GlobalTraffic(requests=10, sectors=160, ideal_sectors=160, bytes=5120)
    counters.loads_of["scale"] = GlobalTraffic(requests=10, sectors=80, ideal_sectors=10, bytes=320)
    counters.stores_of["y"] = GlobalTraffic(requests=5, sectors=80, ideal_sectors=20, bytes=640)
    counters.shared.requests, counters.shared.wavefronts, counters.shared.conflicts = 4, 10, 6
    (launch,) = _recorded("sm_86", (s for s in samples() if s.name == "rms_norm"))
    assert _execution(launch, counters).remarks == (
        "scale is read in 8.0 sectors a request where 1.0 hold its bytes",
        "y is written in 16.0 sectors a request where 4.0 hold its bytes",
        "bank conflicts: 2.5x the passes over shared memory",
    )
    # A small table stays in a cache, and what is little does not count.
    small = dict(launch.values) | {"scale": torch.zeros(256)}
    counters.stores_of["y"].sectors = 20
    counters.shared.conflicts = 4
    tabled = Launch(**{**vars(launch), "values": small})
    assert _execution(tabled, counters).remarks == ()


def test_targets_that_are_not_executed_are_refused():
    with pytest.raises(ConfigError, match="'sm_90': its code cannot be executed here; that of sm_"):
        next(execute_samples(TARGETS["sm_90"]))
