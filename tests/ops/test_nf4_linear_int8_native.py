"""The native products in whole numbers, in every instruction set variant that runs here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.ops.nf4_linear_int8 import cpu, reference
from tests.ops.int8_support import exactly

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(assert_as_accurate, M, N, K, dtype, blocksize=64, double_quant=True, *, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = quantize_nf4(make(N, K), blocksize=blocksize, double_quant=double_quant)
    x, bias, residual = make(M, K), make(N), make(M, N)
    same_dtype = reference.nf4_linear_int8(x, weight, bias, residual)
    exact = exactly(x, weight, bias, residual)
    assert_as_accurate(cpu.nf4_linear_int8(x, weight, bias, residual), same_dtype, exact)


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=60,
    deadline=None,
    # The variant holds for all examples of a test.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    M=st.one_of(st.integers(1, 6), st.integers(7, 300)),
    N=st.integers(1, 200),
    blocks=st.integers(1, 8),
    blocksize=st.sampled_from([32, 64, 128, 256]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    assert_as_accurate, use_isa, isa, dtype, M, N, blocks, blocksize, double_quant, seed
):
    use_isa(isa)
    K = blocks * blocksize
    check(assert_as_accurate, M, N, K, dtype, blocksize, double_quant, seed=seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K", "blocksize"),
    [
        (250, 130, 1728, 64),  # several slices of depth
        (2060, 40, 64, 32),  # several parts of x
        (300, 2100, 64, 64),  # several pieces of columns
        (20, 30, 8192, 4096),  # blocks deeper than a slice
        (3, 30, 8192, 4096),
        (1, 9, 576, 64),  # rows of W that end inside a group
    ],
)
def test_more_than_one_slice_or_piece(assert_as_accurate, use_isa, isa, dtype, M, N, K, blocksize):
    use_isa(isa)
    check(assert_as_accurate, M, N, K, dtype, blocksize)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 14, 15, 64])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 512])
def test_the_sums_are_the_references_bit_by_bit(use_isa, isa, M, blocksize):
    """With scales that are powers of two, or all zero but one, float32 adds up exactly."""
    use_isa(isa)
    N, blocks = 50, 4
    x = 126 * torch.rand(M, blocks, blocksize) - 63
    x[..., 5] = -127.0
    x = (x * torch.randint(-2, 3, (M, blocks, 1)).exp2()).view(M, blocks * blocksize)
    weight = quantize_nf4(torch.randn(N, blocks * blocksize), blocksize, double_quant=False)
    only = torch.eye(blocks).repeat_interleave(N, 0).view(blocks, N * blocks)
    powers = torch.randint(-2, 3, (1, N * blocks)).float().exp2()
    for scales in torch.cat((only, powers)):
        scaled = replace(weight, absmax=scales.contiguous())
        got, expected = (part.nf4_linear_int8(x, scaled) for part in (cpu, reference))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("M", [2, 20])
def test_the_largest_sums(use_isa, isa, M):
    """Every product 127 x 127, with either sign, in the largest blocks that there are."""
    use_isa(isa)
    signs = torch.tensor([1.0, -1.0]).repeat(M)[:M, None]
    for blocksize in (64, 4096):
        weight = quantize_nf4(torch.ones(3, 4096), blocksize, double_quant=False)
        out = cpu.nf4_linear_int8(3 * signs.expand(M, 4096), weight)
        torch.testing.assert_close(out, 3 * 4096 * signs.expand(M, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 4, 5, 300])
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, dtype, M):
    use_isa(isa)
    weight = quantize_nf4(torch.randn(190, 1728))
    x = torch.randn(M, 1728).to(dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(cpu.nf4_linear_int8(x, weight))
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cannot_be_scaled(use_isa, isa, rows, dtype):
    use_isa(isa)
    weight = quantize_nf4(torch.ones(33, 96), blocksize=32)
    x = torch.ones(rows, 96, dtype=dtype)
    x[0, 95] = torch.nan
    x[1, 5] = -torch.inf
    x[2] = 0
    out = cpu.nf4_linear_int8(x, weight)
    assert out[:2].isnan().all()
    assert (out[2] == 0).all()
    assert torch.equal(out[3:], torch.full_like(out[3:], 96.0))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_tiny_and_of_large_numbers(use_isa, isa):
    use_isa(isa)
    weight = quantize_nf4(torch.eye(64), double_quant=False)
    sizes = torch.tensor([1e-45, 3e-37, 4e-37, 1e-30, 1e30, 2e36]).unsqueeze(1)
    for rows in (sizes, sizes[:3], sizes[3:]):
        x = rows.expand(-1, 64)
        assert torch.equal(cpu.nf4_linear_int8(x, weight), reference.nf4_linear_int8(x, weight))


def test_empty_and_strided_inputs():
    weight = quantize_nf4(torch.randn(48, 64))
    assert cpu.nf4_linear_int8(torch.randn(0, 64), weight).shape == (0, 48)
    no_columns = NF4Weight(
        torch.empty(0, dtype=torch.uint8), torch.empty(0), (5, 0), 64, torch.float32
    )
    bias = torch.randn(5)
    assert torch.equal(cpu.nf4_linear_int8(torch.randn(3, 0), no_columns, bias), bias.expand(3, 5))
    for rows in (3, 30):
        wide, residual = torch.randn(rows, 200), torch.randn(48, rows)
        wanted = cpu.nf4_linear_int8(
            wide[:, 20:84].contiguous(), weight, None, residual.t().contiguous()
        )
        assert torch.equal(cpu.nf4_linear_int8(wide[:, 20:84], weight, None, residual.t()), wanted)
        same = torch.randn(1, 64).expand(rows, 64)
        wanted = cpu.nf4_linear_int8(same.clone(), weight)
        assert torch.equal(cpu.nf4_linear_int8(same, weight), wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_reads_nothing_beyond_its_inputs(use_isa, isa):
    """NaN all around what a call may read would show in its result."""
    use_isa(isa)
    weight = quantize_nf4(torch.randn(33, 96), blocksize=32)
    for dtype in DTYPES:
        for rows in (4, 35):
            wide = torch.full((rows + 2, 96 + 40), torch.nan, dtype=dtype)
            wide[1:-1, 20:116] = torch.randn(rows, 96)
            out = cpu.nf4_linear_int8(wide[1:-1, 20:116], weight)
            assert torch.equal(out, cpu.nf4_linear_int8(wide[1:-1, 20:116].contiguous(), weight))
            assert out.isfinite().all()


def test_two_threads_of_python_at_once(use_isa):
    use_isa(ISAS[0])
    weight = quantize_nf4(torch.randn(300, 512))
    inputs = [torch.randn(rows, 512) for rows in (1, 40, 7, 130) for _ in range(8)]
    wanted = [cpu.nf4_linear_int8(x, weight) for x in inputs]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda x: cpu.nf4_linear_int8(x, weight), inputs)
        for got, want in zip(results, wanted, strict=True):
            assert torch.equal(got, want)


def test_the_operation_uses_it(monkeypatch):
    called = []

    def watched(*arguments):
        called.append(arguments)
        return original(*arguments)

    library = native.library()
    assert library is not None
    original = library.lk_nf4_linear_int8
    monkeypatch.setattr(library, "lk_nf4_linear_int8", watched)
    ops.nf4_linear_int8(torch.randn(40, 128), quantize_nf4(torch.randn(64, 128)))
    assert len(called) == 1


def test_the_library_refuses_blocks_that_begin_inside_rows():
    library = native.library()
    assert library is not None
    x, out = torch.randn(2, 96), torch.empty(2, 4)

    def call(blocksize):
        weight = quantize_nf4(torch.randn(4, 96), blocksize, double_quant=False)
        matrix = native.NF4Matrix(
            weight.packed.data_ptr(), weight.absmax.data_ptr(), None, None, None, None, 4, 96,
            blocksize,
        )  # fmt: skip
        pointers = x.data_ptr(), 96, None, None, 0, out.data_ptr()
        return library.lk_nf4_linear_int8(matrix, 0, 2, *pointers, 1)

    assert call(32) == 0
    assert call(64) == 1
