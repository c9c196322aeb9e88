"""Peaks and bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import roofline
from bench.hold import held, held_suffix
from bench.peak import KINDS, Peak
from bench.roofline import Ideal, Roofline, gpu_peak


def test_the_best_of_all_tries_counts():
    tries = [
        Peak(flops={"float32": 2.0, "bfloat16": 3.0}, bytes_read={10: 8.0, 1000: 2.0}),
        Peak(flops={"float32": 1.0, "bfloat16": 5.0}, bytes_read={10: 6.0, 1000: 4.0}),
    ]
    found = Roofline(iter(tries).__next__)
    found.measure()
    found.measure()
    assert found.flops == {"float32": 2.0, "bfloat16": 5.0}
    assert found.bytes_read == {10: 8.0, 1000: 4.0}
    assert found.memory == 4.0


def test_bounds():
    found = Roofline(
        lambda: Peak(flops={"float32": 100.0}, bytes_read={10: 8.0, 100: 2.0, 1000: 4.0})
    )
    found.measure()
    assert [found.bandwidth(size) for size in (1, 10, 99, 100, 5000)] == [8.0, 8.0, 8.0, 4.0, 4.0]
    much = Ideal(flops=1000.0, bytes_moved=16.0, kind="float32")
    assert found.bound(much) == 10.0
    few = Ideal(flops=1.0, bytes_moved=16.0, kind="float32")
    assert found.bound(few) == 2.0
    # Others went through so much that nothing is left in caches.
    assert found.bound(few, between=5000) == 4.0
    assert few.intensity == 1 / 16


def test_this_processor():
    found = Peak.measure(1)
    assert set(found.flops) == set(KINDS)
    assert found.flops["bfloat16"] > 0.5 * found.flops["float32"] > 1e8
    assert min(found.bytes_read.values()) > 1e8
    assert len(found.bytes_read) > 6


def test_a_gpus_peaks(monkeypatch):
    """All but the device: what is multiplied and copied, and which rate counts as which."""
    pytest.importorskip("triton")
    shapes = []

    def do_bench(call: Callable[[], torch.Tensor], *, return_mode: str) -> float:
        made = call()
        shapes.append((tuple(made.shape), made.dtype))
        assert return_mode == "min"
        return 1.0 + len(shapes)

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(roofline, "_PRODUCT", 32)
    monkeypatch.setattr(roofline, "_COPIED", 4096)
    found = gpu_peak(torch.device("cpu"))
    assert shapes == [
        ((32, 32), torch.float32),
        ((32, 32), torch.bfloat16),
        ((32, 32), torch.int32),
        ((1024,), torch.float32),
    ]
    work = 2 * 32**3
    assert found.flops == pytest.approx(
        {"float32": work / 2e-3, "bfloat16": work / 3e-3, "int8": work / 4e-3}
    )
    assert found.bytes_read == pytest.approx({4096: 2 * 4096 / 5e-3})


def test_holding():
    assert held(None) == {}
    assert held("avx2")["LADDER_KERNELS_CPU_ISA"] == "avx2"
    assert held("avx2_vnni")["LADDER_KERNELS_CPU_ISA"] == "avx2_vnni"
    assert held("avx2_vnni")["ATEN_CPU_CAPABILITY"] == "avx2"
    names = [held_suffix(isa) for isa in (None, "avx2", "avx2_vnni")]
    assert names == ["", ", held to AVX2", ", held to AVX2 with VNNI"]
