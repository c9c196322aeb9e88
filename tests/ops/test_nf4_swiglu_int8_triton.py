"""The Triton SwiGLU in whole numbers against float64, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import executing, interpreting
from ladder_kernels.audit.ptx import MemoryAccessError
from ladder_kernels.errors import BackendError
from ladder_kernels.launch import on_host
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops import _nf4_args
from ladder_kernels.ops.nf4_linear.configurations import Configuration, using
from ladder_kernels.ops.nf4_swiglu_int8 import gpu, reference
from tests.ops.int8_support import exactly
from tests.ops.triton_support import interpreting_amid_poison

# The interpreter cuts stores of bfloat16 instead of rounding them.
DTYPES = [torch.float32, torch.float16]
CONFIGURATIONS = {
    "tile": Configuration("fused", 16, 32, 64),
    "half a block": Configuration("fused", 32, 16, 32),
    "many columns": Configuration("fused", 16, 16, 512),
}
EVERY = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))


def check(
    assert_as_accurate,
    M,
    N,
    blocks,
    dtype=torch.float32,
    blocksize=64,
    double_quant=(True, True),
    seed=0,
    module: Any = gpu,
    machine=interpreting,
):
    generator = torch.Generator().manual_seed(seed)
    K = blocks * blocksize

    def make(*shape):
        # Rows apart, with NaN around them.
        around = torch.full((shape[0] + 2, shape[1] + 7), float("nan")).to(dtype)
        return around[1:-1, 3:-4].copy_(torch.randn(*shape, generator=generator))

    weights = [
        quantize_nf4(make(N, K) / K**0.5, blocksize=blocksize, double_quant=nested)
        for nested in double_quant
    ]
    x = make(M, K)
    gate, up = (exactly(x, weight) for weight in weights)
    with machine():
        y = module.nf4_swiglu_int8(x, *weights)
    assert y.dtype == dtype
    assert_as_accurate(y, reference.nf4_swiglu_int8(x, *weights), F.silu(gate) * up)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    configuration=st.sampled_from(list(CONFIGURATIONS.values())),
    dtype=st.sampled_from(DTYPES),
    M=st.integers(1, 40),
    N=st.integers(1, 40),
    blocks=st.integers(1, 5),
    blocksize=st.sampled_from([32, 64, 128]),
    double_quant=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_values(
    assert_as_accurate, configuration, dtype, M, N, blocks, blocksize, double_quant, seed
):
    with using(configuration):
        check(assert_as_accurate, M, N, blocks, dtype, blocksize, double_quant, seed)


@EVERY
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_every_blocksize(assert_as_accurate, configuration, blocksize):
    with using(configuration):
        check(assert_as_accurate, 5, 20, 2, blocksize=blocksize)


@pytest.mark.parametrize("M", [1, 16, 17, 65])
def test_as_the_table_says(assert_as_accurate, M):
    check(assert_as_accurate, M, 21, 3)


@pytest.mark.parametrize("M", [3, 130])
def test_as_the_table_says_on_a_gpu(assert_as_accurate, M):
    check(assert_as_accurate, M, 70, 3, machine=executing)


@EVERY
def test_nothing_beside_the_operands_is_touched(assert_as_accurate, configuration):
    with using(configuration):
        check(assert_as_accurate, 5, 37, 3, blocksize=32, machine=interpreting_amid_poison)


def test_rows_that_cannot_be_scaled():
    weights = [quantize_nf4(torch.randn(33, 64)) for _ in range(2)]
    x = torch.randn(4, 64)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    x[2] = 0
    with interpreting():
        out = gpu.nf4_swiglu_int8(x, *weights)
    assert out[:2].isnan().all()
    assert (out[2] == 0).all()
    assert out[3].isfinite().all()


@pytest.mark.parametrize(("M", "N", "K"), [(0, 8, 64), (3, 0, 64), (3, 8, 0)])
def test_nothing_to_do(M, N, K):
    weight = quantize_nf4(torch.randn(N, K), double_quant=False)
    with interpreting():
        out = gpu.nf4_swiglu_int8(torch.randn(M, K), weight, weight)
    assert torch.equal(out, torch.zeros(M, N))


def test_opcheck():
    weights = [
        *_nf4_args.flatten(quantize_nf4(torch.randn(8, 32), blocksize=32)),
        *_nf4_args.flatten(quantize_nf4(torch.randn(8, 32), blocksize=32, double_quant=False)),
    ]
    with interpreting():
        operator = torch.ops.ladder_kernels.nf4_swiglu_int8.default
        opcheck(operator, (torch.randn(2, 3, 32), *weights))


def test_what_cannot_run_is_refused():
    weight, x = quantize_nf4(torch.randn(8, 64)), torch.randn(3, 64)
    with interpreting(), pytest.raises(BackendError, match="cuts numbers to bfloat16"):
        ops.nf4_swiglu_int8(x.bfloat16(), weight, weight)
    with (
        on_host("recorder", "sm_75"),
        ops.use_backend("triton"),
        pytest.raises(BackendError, match="without tensor cores on sm_75"),
    ):
        ops.nf4_swiglu_int8(x, weight, weight)


BROKEN = {
    "rows in turns": ("tl.join(gate, up).permute(0, 2, 1)", "tl.join(gate, up)"),
    "which is which": ("silu(gate) * up", "silu(up) * gate"),
    "scale of both": ("silu(gate)", "silu(gate * 127)"),
    "scales of the gate": ("        up_absmax,\n", "        gate_absmax,\n"),
    "bytes of the gate": ("weight_bytes(up_packed", "weight_bytes(gate_packed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(assert_as_accurate, broken, name):
    module = broken(gpu, *BROKEN[name])
    shape = {"M": 5, "N": 37, "blocks": 2, "double_quant": (False, False)}
    with using(CONFIGURATIONS["tile"]):
        with pytest.raises(AssertionError):
            check(assert_as_accurate, **shape, module=module)
        check(assert_as_accurate, **shape)


def test_a_missing_mask_is_noticed(broken):
    module = broken(gpu, "mask=m_inside[:, None], other=0", "")
    weight = quantize_nf4(torch.randn(37, 128))
    with executing(), using(CONFIGURATIONS["tile"]), pytest.raises(MemoryAccessError):
        module.nf4_swiglu_int8(torch.randn(5, 128), weight, weight)
