from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton

from ladder_kernels.audit.launches import launch_of, recording
from ladder_kernels.launch import host, host_target
from ladder_kernels.ops.rms_norm import gpu
from tests.audit.kernels import _scale_kernel

DIVISIBLE = [["tt.divisibility", 16]]


def test_a_launch_says_what_triton_specialises_for():
    x = torch.empty(64, dtype=torch.bfloat16)
    args = (x[1:33], None, x, 2.5, 48, 1)
    launch = launch_of(_scale_kernel, (3,), args, {"BLOCK": 16, "num_warps": 2})
    assert launch.name == "_scale_kernel"
    assert launch.signature == {
        "x": "*bf16", "bias": "constexpr", "y": "*bf16", "factor": "fp32", "N": "i32",
        "stride": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    assert launch.constants == {"bias": None, "stride": 1, "BLOCK": 16}
    # x begins two bytes behind a multiple of 16; y and N = 48 are multiples.
    assert launch.attributes == {(2,): DIVISIBLE, (4,): DIVISIBLE}
    assert launch.options == {"num_warps": 2}
    assert launch.grid == (3,)
    assert list(launch.values) == ["x", "y", "factor", "N"]


def test_large_integers_and_computed_grids():
    x = torch.empty(4)
    args = (x, x, x, 1.0, 2**31, True)
    launch = launch_of(
        _scale_kernel, lambda given: (given["N"] // given["BLOCK"], 2), args, {"BLOCK": 1024}
    )
    assert launch.grid == (2**21, 2)
    assert launch.signature["N"] == "i64"
    assert launch.signature["stride"] == "i1"


def test_other_kinds_of_argument_are_refused():
    with pytest.raises(TypeError, match="_scale_kernel: argument x is a str"):
        launch_of(_scale_kernel, (1,), ("x", None, "y", 1.0, 1, 1), {"BLOCK": 16})


def test_launchers_are_recorded_without_memory():
    x = torch.empty(2048, 3584, dtype=torch.bfloat16, device="meta")
    run = triton.JITFunction.run
    with recording("sm_120") as launches:
        assert (host(), host_target()) == ("recorder", "sm_120")
        assert gpu.rms_norm(x, x[0], 1e-6).shape == x.shape
        gpu.rms_norm_backward(x, x, None, 1e-6, True)
        gpu.rms_norm(x, x[0], 1e-5)
    assert triton.JITFunction.run is run
    assert (host(), host_target()) == (None, "sm_86")
    assert [launch.name for launch in launches] == [
        "_rms_norm_forward_kernel", "_rms_norm_backward_kernel", "_rms_norm_forward_kernel",
    ]  # fmt: skip
    assert launches[0].grid == (2048,)
    assert launches[0].constants["BLOCK"] == 4096
    # Another eps is another value, not other code.
    assert launches[0].key == launches[2].key != launches[1].key
