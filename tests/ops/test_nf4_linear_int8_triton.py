"""The Triton products in whole numbers: rounding to the bit, products against float64.

In the interpreter, but for what only compiled code does: the decoder for NVIDIA GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import executing, interpreting
from ladder_kernels.audit.ptx import MemoryAccessError
from ladder_kernels.errors import BackendError
from ladder_kernels.launch import on_host
from ladder_kernels.nf4 import NF4_VALUES, NF4Weight, quantize_nf4
from ladder_kernels.ops import _nf4_args
from ladder_kernels.ops.nf4_linear.configurations import Configuration, using
from ladder_kernels.ops.nf4_linear_int8 import gpu, reference
from tests.ops.int8_support import exactly
from tests.ops.triton_support import interpreting_amid_poison

# The interpreter cuts stores of bfloat16 instead of rounding them.
DTYPES = [torch.float32, torch.float16]
CONFIGURATIONS = {
    "tile": Configuration("fused", 16, 32, 64),
    "half a block": Configuration("fused", 32, 16, 32),
    "many columns": Configuration("fused", 16, 16, 512),
    "splits": Configuration("fused", 16, 32, 64, splits=3),
    "splits inside blocks": Configuration("fused", 16, 16, 32, splits=2),
}
EVERY = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))
FIXED = [HealthCheck.function_scoped_fixture]
MACHINES = {"interpreted": interpreting, "executed": executing}
EACH_MACHINE = pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))


def within_nan(value):
    """The same matrix, its rows apart and with NaN around them."""
    rows, columns = value.shape
    around = torch.full((rows + 2, columns + 7), float("nan"), dtype=value.dtype)
    return around[1:-1, 3 : 3 + columns].copy_(value)


def in_place(q: torch.Tensor, piece: int) -> torch.Tensor:
    """Undo the order of the decoder: of each piece, the even elements and then the odd ones."""
    result = torch.empty_like(q).view(q.shape[0], -1, piece)
    order = [*range(0, piece, 2), *range(1, piece, 2)]
    result[..., order] = q.view(result.shape)
    return result.view(q.shape)


def check_rounding(x: torch.Tensor, blocksize: int, piece: int) -> None:
    q, steps = gpu.quantize_rows(x, blocksize, piece)
    expected, expected_steps = reference.quantize_rows(x, blocksize)
    assert torch.equal(in_place(q, piece), expected)
    torch.testing.assert_close(steps, expected_steps, rtol=0, atol=0, equal_nan=True)


def numbers(rows: int, columns: int, *, seed: int, spread: float) -> torch.Tensor:
    """Of any size: normal numbers to the power of ``spread``, halves of steps among them."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(rows, columns, generator=generator)
    value = value.sign() * value.abs() ** spread
    value[::2] = (254 * torch.rand(value[::2].shape, generator=generator) - 127).round() / 2
    value[::2, :: columns // 2] = 63.5
    return value


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 5),
    blocksize=st.sampled_from([32, 64, 128, 1024, 4096]),
    piece=st.sampled_from([32, 64, 256]),
    spread=st.sampled_from([0.2, 1.0, 4.0]),
    seed=st.integers(0, 2**31),
)
def test_rounding_to_the_bit(dtype, rows, blocks, blocksize, piece, spread, seed):
    x = numbers(rows, blocks * blocksize, seed=seed, spread=spread).to(dtype)
    with interpreting():
        check_rounding(within_nan(x), blocksize, min(piece, blocksize))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_to_the_bit_on_a_gpu(dtype):
    x = numbers(5, 320, seed=3, spread=2.0).to(dtype)
    x[1, 100], x[2, 5], x[3, 319] = torch.nan, torch.inf, -torch.inf
    x[4, :70] = 0
    with executing():
        check_rounding(within_nan(x), 64, 64)
        check_rounding(x, 32, 32)


@EACH_MACHINE
def test_rounding_of_blocks_that_cannot_be_scaled(machine):
    """By 0, by what 127 divided by is infinite, by infinity, by NaN; and by what just can."""
    smallest = float(gpu._smallest_divisor())
    below = torch.tensor(smallest).nextafter(torch.tensor(0.0)).item()
    sizes = [0, 1e-45, 3e-37, below, smallest, 4e-37, 1e-30, 1e38, torch.inf, -torch.inf, torch.nan]
    x = torch.ones(len(sizes), 64) * torch.tensor(sizes)[:, None]
    x[:, ::2] /= 3
    with machine():
        check_rounding(x, 32, 32)
    steps = reference.quantize_rows(x, 32)[1]
    assert (steps[:4] == 0).all()
    assert (steps[4:8] > 0).all()
    assert steps[8:].isnan().all()


def check(
    assert_as_accurate,
    M,
    N,
    blocks,
    dtype=torch.float32,
    blocksize=64,
    double_quant=True,
    addends=(True, True),
    seed=0,
    module: Any = gpu,
    machine=interpreting,
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = quantize_nf4(
        make(N, blocks * blocksize), blocksize=blocksize, double_quant=double_quant
    )
    x = make(M, blocks * blocksize)
    bias = make(N) if addends[0] else None
    residual = make(M, N) if addends[1] else None
    same = reference.nf4_linear_int8(x, weight, bias, residual)
    apart = None if residual is None else within_nan(residual)
    with machine():
        y = module.nf4_linear_int8(within_nan(x), weight, bias, apart)
    assert y.dtype == dtype
    assert_as_accurate(y, same, exactly(x, weight, bias, residual))


@settings(max_examples=25, deadline=None, suppress_health_check=FIXED)
@given(
    configuration=st.sampled_from(list(CONFIGURATIONS.values())),
    dtype=st.sampled_from(DTYPES),
    M=st.integers(1, 40),
    N=st.integers(1, 70),
    blocks=st.integers(1, 5),
    blocksize=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    addends=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_values(
    assert_as_accurate, configuration, dtype, M, N, blocks, blocksize, double_quant, addends, seed
):
    with using(configuration):
        check(assert_as_accurate, M, N, blocks, dtype, blocksize, double_quant, addends, seed)


@EVERY
@pytest.mark.parametrize("blocksize", [32, 64, 512])
def test_every_way(assert_as_accurate, configuration, blocksize):
    with using(configuration):
        check(assert_as_accurate, 5, 20, 2, blocksize=blocksize)


@pytest.mark.parametrize("blocksize", [32 << power for power in range(8)])
def test_every_blocksize(assert_as_accurate, blocksize):
    with using(CONFIGURATIONS["many columns"]):
        check(assert_as_accurate, 5, 12, 2, blocksize=blocksize)


@pytest.mark.parametrize("M", [1, 16, 17, 65, 130])
def test_as_the_table_says(assert_as_accurate, M):
    check(assert_as_accurate, M, 21, 3)


@pytest.mark.parametrize("M", [3, 130])
def test_as_the_table_says_on_a_gpu(assert_as_accurate, M):
    check(assert_as_accurate, M, 70, 3, machine=executing)


def test_more_blocks_than_share_a_second_level_scale(assert_as_accurate):
    check(assert_as_accurate, 3, 140, 5, blocksize=32)


def every_byte() -> NF4Weight:
    """``[32, 64]``: each of the 256 bytes four times, and scales with all their bits."""
    weight = quantize_nf4(torch.randn(32, 64), double_quant=False)
    packed = torch.arange(1024).to(torch.uint8)
    return replace(weight, packed=packed, absmax=0.1 + torch.rand(32))


@pytest.mark.parametrize("machine", ["interpreted", "executed", "executed, not by prmt"])
@pytest.mark.parametrize(("rows", "columns", "warps"), [(32, 64, 4), (16, 32, 4), (64, 32, 1)])
def test_every_byte(monkeypatch, machine, rows, columns, warps):
    """With rows of x that have one number, products are centroids; of 0, they are 0 exactly."""
    if "not" in machine:
        monkeypatch.setattr(gpu, "takes_ptx", lambda device: False)
    weight = every_byte()
    codes = torch.tensor(NF4_VALUES, dtype=torch.float64).mul(127).round()
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), 1).view(32, 64)
    configuration = Configuration("fused", 32, rows, columns, num_warps=warps)
    expected = codes[nibbles.long()] * weight.absmax.double()[:, None] / 127
    with MACHINES[machine.split(",")[0]](), using(configuration):
        y = gpu.nf4_linear_int8(torch.eye(64), weight).t()
    torch.testing.assert_close(y.double(), expected, rtol=5e-7, atol=0)


def check_largest_sums(machine: Any, name: str, module: Any = gpu) -> None:
    """Every product 127 x 127, with either sign, in blocks too large for one sum."""
    signs = torch.tensor([1.0, -1.0, 1.0])[:, None]
    weight = quantize_nf4(torch.ones(3, 1024), 512, double_quant=False)
    with machine(), using(CONFIGURATIONS[name]):
        out = module.nf4_linear_int8(3 * signs.expand(3, 1024), weight)
    torch.testing.assert_close(out, 3 * 1024 * signs.expand(3, 3), rtol=1e-6, atol=0)


@EACH_MACHINE
@pytest.mark.parametrize("name", ["tile", "half a block", "many columns"])
def test_the_largest_sums(machine, name):
    check_largest_sums(machine, name)


@pytest.mark.parametrize("name", ["tile", "half a block", "many columns"])
@pytest.mark.parametrize("blocksize", [32, 256])
def test_the_sums_are_the_references_bit_by_bit(name, blocksize):
    """With scales that are powers of two, or all zero but one, float32 adds up exactly."""
    M, N, blocks = 3, 20, 4
    x = 126 * torch.rand(M, blocks, blocksize) - 63
    x[..., 5] = -127.0
    x = (x * torch.randint(-2, 3, (M, blocks, 1)).exp2()).view(M, blocks * blocksize)
    weight = quantize_nf4(torch.randn(N, blocks * blocksize), blocksize, double_quant=False)
    only = torch.eye(blocks).repeat_interleave(N, 0).view(blocks, N * blocks)
    powers = torch.randint(-2, 3, (1, N * blocks)).float().exp2()
    for scales in torch.cat((only, powers)):
        scaled = replace(weight, absmax=scales.contiguous())
        with interpreting(), using(CONFIGURATIONS[name]):
            got = gpu.nf4_linear_int8(x, scaled)
        assert torch.equal(got, reference.nf4_linear_int8(x, scaled))


@EACH_MACHINE
@pytest.mark.parametrize("splits", [1, 2])
def test_rows_that_cannot_be_scaled(machine, splits):
    weight = quantize_nf4(torch.ones(33, 96), blocksize=32)
    x = torch.ones(4, 96)
    x[0, 95] = torch.nan
    x[1, 5] = -torch.inf
    x[2] = 0
    with machine(), using(Configuration("fused", 16, 32, 32, splits=splits)):
        out = gpu.nf4_linear_int8(x, weight)
    assert out[:2].isnan().all()
    assert (out[2] == 0).all()
    torch.testing.assert_close(out[3:], torch.full_like(out[3:], 96.0))


def test_rows_of_tiny_and_of_large_numbers():
    weight = quantize_nf4(torch.eye(64), double_quant=False)
    x = torch.tensor([1e-45, 3e-37, 4e-37, 1e-30, 1e30, 2e36])[:, None].expand(6, 64)
    with interpreting():
        out = gpu.nf4_linear_int8(x, weight)
    torch.testing.assert_close(out, reference.nf4_linear_int8(x, weight), rtol=1e-6, atol=0)


@EVERY
def test_nothing_beside_the_operands_is_touched(assert_as_accurate, configuration):
    with using(configuration):
        check(assert_as_accurate, 5, 37, 3, blocksize=32, machine=interpreting_amid_poison)


def test_leading_dimensions_and_strides_of_the_public_operation():
    weight = quantize_nf4(torch.randn(24, 64))
    x, residual = torch.randn(64, 3, 2).transpose(0, 2), torch.randn(24, 3, 2).transpose(0, 2)
    bias = torch.randn(48)[::2]
    with interpreting():
        y = ops.nf4_linear_int8(x, weight, bias, residual)
    with ops.use_backend("reference"):
        expected = ops.nf4_linear_int8(x, weight, bias, residual)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("M", "N", "K"), [(0, 8, 64), (3, 0, 64), (3, 8, 0)])
def test_nothing_to_do(M, N, K):
    weight, bias = quantize_nf4(torch.randn(N, K), double_quant=False), torch.randn(N)
    with interpreting():
        out = gpu.nf4_linear_int8(torch.randn(M, K), weight, bias)
    assert torch.equal(out, bias.expand(M, N))


def test_opcheck():
    weight = _nf4_args.flatten(quantize_nf4(torch.randn(8, 32), blocksize=32))
    operator = torch.ops.ladder_kernels.nf4_linear_int8.default
    with interpreting():
        opcheck(operator, (torch.randn(2, 3, 32), *weight, torch.randn(8), torch.randn(2, 3, 8)))


def test_what_cannot_run_is_refused():
    weight, x = quantize_nf4(torch.randn(8, 64)), torch.randn(3, 64)
    with interpreting(), pytest.raises(BackendError, match="cuts numbers to bfloat16"):
        ops.nf4_linear_int8(x.bfloat16(), weight)
    with interpreting(), pytest.raises(BackendError, match="float16, bfloat16 and float32, not"):
        ops.nf4_linear_int8(x.double(), weight)
    with (
        on_host("recorder", "sm_75"),
        ops.use_backend("triton"),
        pytest.raises(BackendError, match="without tensor cores on sm_75"),
    ):
        ops.nf4_linear_int8(x, weight)


BROKEN = {
    "order of x": ("pairs.permute(0, 2, 1)", "pairs"),
    "order of nibbles": ("tl.join(even, odd)", "tl.join(odd, even)"),
    "bits of a nibble": ("(index & 7) * 8", "(index & 3) * 8"),
    "where sums start": ("tl.full(acc.shape, _SHIFT_BITS", "tl.full(acc.shape, 0"),
    "bits of a scale": ("+ 2) & -4", "+ 2) & -4096"),
    "which of two scales": ("both == (block & 1)", "both == 0 * block"),
    "which two scales": ("block & -2", "block & -4"),
    "rounding of x": ("[:, None] + _SHIFT", "[:, None] - 0.25 + _SHIFT"),
    "scale of x": ("tl.div_rn(most, largest)", "tl.div_rn(most, largest + 1)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(assert_as_accurate, broken, name):
    shape = {"M": 5, "N": 37, "blocks": 3, "blocksize": 32}
    module = broken(gpu, *BROKEN[name])
    with using(CONFIGURATIONS["half a block"]):
        with pytest.raises(AssertionError):
            check(assert_as_accurate, **shape, module=module)
        check(assert_as_accurate, **shape)


def test_too_many_products_in_a_sum_are_noticed(broken):
    with pytest.raises(AssertionError):
        check_largest_sums(
            interpreting, "many columns", broken(gpu, "_SUMMANDS = 256", "_SUMMANDS = 512")
        )


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("prmt.b32 $0, first, second, 0x7531;", "prmt.b32 $0, first, second, 0x6420;"),
        ('picked("first", _CODE_WORDS, 0)', 'picked("first", _CODE_WORDS, 1)'),
        ("for start in range(0, 16, 4)]", "for start in (0, 4, 12, 8)]"),
    ],
)
def test_a_broken_decoder_is_noticed(assert_as_accurate, broken, right, wrong):
    module = broken(gpu, right, wrong)
    with using(CONFIGURATIONS["tile"]), pytest.raises(AssertionError):
        check(assert_as_accurate, 5, 37, 2, module=module, machine=executing)


@pytest.mark.parametrize(
    "mask",
    [
        "mask=m_inside[:, None], other=0",  # of rows of x in the product
        "mask=inside[:, None], other=0)",  # of rows of the weight
        "mask=inside[:, None], other=0.0",  # of blocks of x that is rounded
    ],
)
def test_a_missing_mask_is_noticed(broken, mask):
    module = broken(gpu, mask, ")" if mask.endswith(")") else "")
    weight = quantize_nf4(torch.randn(37, 192))
    with executing(), using(CONFIGURATIONS["tile"]), pytest.raises(MemoryAccessError):
        module.nf4_linear_int8(torch.randn(5, 192), weight)
