"""The native products against float64, in every instruction set variant that runs here."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.ops.nf4_linear import cpu, reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


ANY_EXAMPLE = {
    "deadline": None,
    # The variant holds for all examples of a test.
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def check(assert_as_accurate, M, N, K, dtype, blocksize=64, double_quant=True, *, seed=0):
    """Forward with bias and residual, and the transposed product."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = quantize_nf4(make(N, K), blocksize=blocksize, double_quant=double_quant)
    x, bias, residual, grad = make(M, K), make(N), make(M, N), make(M, N)
    dense = weight.dequantize(dtype)
    exact = F.linear(x.double(), dense.double(), bias.double()) + residual.double()
    same_dtype = F.linear(x, dense, bias) + residual
    assert_as_accurate(cpu.nf4_linear(x, weight, bias, residual), same_dtype, exact)
    back = cpu.nf4_linear_transposed(grad, weight)
    assert_as_accurate(back, grad @ dense, grad.double() @ dense.double())


def test_this_machine_runs_the_library():
    """Without it the tests below would say nothing."""
    assert native.status().available, native.status().reason
    assert ISAS[-1] == "baseline"


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, **ANY_EXAMPLE)
@given(
    dtype=st.sampled_from(DTYPES),
    M=st.integers(1, 300),
    N=st.integers(1, 200),
    blocks=st.integers(1, 8),
    blocksize=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_whole_blocks(
    assert_as_accurate, use_isa, isa, dtype, M, N, blocks, blocksize, double_quant, seed
):
    use_isa(isa)
    K = blocks * blocksize
    check(assert_as_accurate, M, N, K, dtype, blocksize, double_quant, seed=seed)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, **ANY_EXAMPLE)
@given(
    dtype=st.sampled_from(DTYPES),
    M=st.integers(1, 40),
    N=st.integers(1, 70),
    K=st.integers(1, 500),
    blocksize=st.sampled_from([32, 64, 4096]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_blocks_that_begin_anywhere_in_a_row(
    assert_as_accurate, use_isa, isa, dtype, M, N, K, blocksize, double_quant, seed
):
    use_isa(isa)
    check(assert_as_accurate, M, N, K, dtype, blocksize, double_quant, seed=seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (300, 130, 1600),  # several slices of depth
        (2100, 40, 64),  # several pieces of rows
        (20, 2100, 64),  # several pieces of columns
        (40, 2100, 800),
    ],
)
def test_more_than_one_slice_or_piece(assert_as_accurate, use_isa, isa, dtype, M, N, K):
    use_isa(isa)
    check(assert_as_accurate, M, N, K, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 3, 16, 17, 300])
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, dtype, M):
    use_isa(isa)
    weight = quantize_nf4(torch.randn(190, 832))
    x, grad = torch.randn(M, 832).to(dtype), torch.randn(M, 190).to(dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(
            torch.cat((cpu.nf4_linear(x, weight), cpu.nf4_linear_transposed(grad, weight)), 1)
        )
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_rounded_to_the_dtype_of_x(use_isa, isa, dtype):
    """With x a unit vector the product is the dequantised weight itself, bit for bit."""
    use_isa(isa)
    weight = quantize_nf4(torch.randn(96, 128))
    x = torch.eye(128).to(dtype)
    for rows in (128, 8):
        out = cpu.nf4_linear(x[:rows], weight)
        assert torch.equal(out, weight.dequantize(dtype).t()[:rows])
    grad = torch.eye(96).to(dtype)
    assert torch.equal(cpu.nf4_linear_transposed(grad, weight), weight.dequantize(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "below"), [(40, 56), (41, 30), (900, 701)])
def test_transposed_over_two_matrices(use_isa, isa, dtype, N, below):
    """To the bit what the matrix of all their rows gives."""
    use_isa(isa)
    dense, grad = torch.randn(N + below, 128), torch.randn(33, N + below).to(dtype)
    whole, *parts = (
        quantize_nf4(rows, double_quant=False) for rows in (dense, dense[:N], dense[N:])
    )
    expected = cpu.nf4_linear_transposed(grad, whole)
    assert torch.equal(cpu.nf4_linear_transposed(grad, *parts), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [2, 40])
def test_values_that_are_not_finite(use_isa, isa, rows):
    """NaN and infinity stay in their row; overflow rounds to infinity, as torch rounds."""
    use_isa(isa)
    weight = quantize_nf4(torch.ones(32, 64))
    for dtype in DTYPES:
        x = torch.ones(rows, 64, dtype=dtype)
        x[0, 3] = torch.nan
        x[1, 5] = torch.inf
        out = cpu.nf4_linear(x, weight)
        assert out[0].isnan().all()
        assert (out[1] == torch.inf).all()
        assert torch.equal(out[2:], torch.full_like(out[2:], 64.0))
        big = torch.full((rows, 64), torch.finfo(dtype).max, dtype=dtype)
        assert (cpu.nf4_linear(big, weight) == torch.inf).all()


@pytest.mark.parametrize("isa", ISAS)
def test_float16_subnormals(use_isa, isa):
    use_isa(isa)
    weight = quantize_nf4(torch.ones(4, 64), double_quant=False)
    tiny = torch.arange(1, 64).view(-1, 1) * 2.0**-24
    x = torch.cat((tiny, torch.zeros(63, 63)), dim=1).half()
    for rows in (63, 5):
        out = cpu.nf4_linear(x[:rows].contiguous(), weight)
        assert torch.equal(out, tiny[:rows].half().expand(rows, 4))


def test_empty_and_strided_inputs():
    weight = quantize_nf4(torch.randn(48, 64))
    assert cpu.nf4_linear(torch.randn(0, 64), weight).shape == (0, 48)
    assert cpu.nf4_linear_transposed(torch.randn(0, 48), weight).shape == (0, 64)
    no_columns = NF4Weight(
        torch.empty(0, dtype=torch.uint8), torch.empty(0), (5, 0), 64, torch.float32
    )
    bias = torch.randn(5)
    assert torch.equal(cpu.nf4_linear(torch.randn(3, 0), no_columns, bias), bias.expand(3, 5))
    no_rows = NF4Weight(
        torch.empty(0, dtype=torch.uint8), torch.empty(0), (0, 5), 64, torch.float32
    )
    assert torch.equal(cpu.nf4_linear_transposed(torch.randn(3, 0), no_rows), torch.zeros(3, 5))
    for rows in (3, 30):
        wide, residual = torch.randn(rows, 200), torch.randn(48, rows)
        wanted = cpu.nf4_linear(
            wide[:, 20:84].contiguous(), weight, None, residual.t().contiguous()
        )
        assert torch.equal(cpu.nf4_linear(wide[:, 20:84], weight, None, residual.t()), wanted)
        same = torch.randn(1, 64).expand(rows, 64)
        assert torch.equal(cpu.nf4_linear(same, weight), cpu.nf4_linear(same.clone(), weight))


def test_reads_nothing_beyond_its_inputs():
    """NaN all around what a call may read would show in its result."""
    weight = quantize_nf4(torch.randn(33, 96))
    for dtype in DTYPES:
        for rows in (5, 35):
            wide = torch.full((rows + 2, 96 + 40), torch.nan, dtype=dtype)
            wide[1:-1, 20:116] = torch.randn(rows, 96)
            out = cpu.nf4_linear(wide[1:-1, 20:116], weight)
            assert torch.equal(out, cpu.nf4_linear(wide[1:-1, 20:116].contiguous(), weight))
            assert out.isfinite().all()


def test_two_threads_of_python_at_once(use_isa):
    use_isa(ISAS[0])
    weight = quantize_nf4(torch.randn(300, 512))
    inputs = [torch.randn(rows, 512) for rows in (1, 40, 7, 130) for _ in range(8)]
    wanted = [cpu.nf4_linear(x, weight) for x in inputs]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(
            pool.map(lambda x: cpu.nf4_linear(x, weight), inputs), wanted, strict=True
        ):
            assert torch.equal(got, want)


def test_the_operation_uses_it():
    """bf16 with a residual: the native kernel rounds once, the reference twice."""
    weight = quantize_nf4(torch.randn(64, 128))
    x, residual = torch.randn(40, 128).bfloat16(), torch.randn(40, 64).bfloat16()
    native_result = cpu.nf4_linear(x, weight, None, residual)
    assert torch.equal(ops.nf4_linear(x, weight, None, residual), native_result)
    assert not torch.equal(reference.nf4_linear(x, weight, None, residual), native_result)


def test_the_library_refuses_what_makes_no_sense():
    library = native.library()
    assert library is not None
    x, out = torch.randn(2, 64), torch.empty(2, 8)
    weight = quantize_nf4(torch.randn(8, 64))
    good = (weight.packed.data_ptr(), None, weight.absmax.data_ptr())
    nested = (weight.nested_absmax, weight.nested_code, weight.nested_offset)
    pointers = [t.data_ptr() for t in nested if t is not None]

    def call(*fields, dtype=0, M=2, stride=64, threads=1, into=True):
        matrix = native.NF4Matrix(*fields)
        return library.lk_nf4_linear(
            ctypes.byref(matrix),
            dtype,
            M,
            x.data_ptr(),
            stride,
            None,
            None,
            0,
            out.data_ptr() if into else None,
            threads,
        )

    assert call(*good, *pointers, 8, 64, 64) == 0
    assert call(*good, *pointers, 8, 64, 60) == 1
    assert call(*good, *pointers, 8, -1, 64) == 1
    assert call(*good, None, None, None, 8, 64, 64) == 1
    assert call(None, *good[1:], *pointers, 8, 64, 64) == 1
    for wrong in ({"dtype": 7}, {"M": -1}, {"stride": 63}, {"threads": 0}, {"into": False}):
        assert call(*good, *pointers, 8, 64, 64, **wrong) == 1
    assert library.lk_set_isa(b"sse9") == 3
