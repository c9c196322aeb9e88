"""The SwiGLU in whole numbers: reference, and native in every variant that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops.nf4_linear_int8 import reference as linear
from ladder_kernels.ops.nf4_swiglu_int8 import cpu, reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_weights(N, K, generator=None, **options):
    return [
        quantize_nf4(torch.randn(N, K, generator=generator) / K**0.5, **options) for _ in range(2)
    ]


def exactly(x, weights):
    """Both products in float32, as their operation is tested; the rest in float64."""
    gate, up = (linear.nf4_linear_int8(x.float(), w).double() for w in weights)
    return F.silu(gate) * up


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    N=st.integers(1, 40),
    blocks=st.integers(1, 4),
    piece=st.sampled_from([1, 100, 1 << 22]),
    seed=st.integers(0, 2**31),
)
def test_reference(assert_as_accurate, dtype, leading, N, blocks, piece, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = make_weights(N, 32 * blocks, generator, blocksize=32)
    x = torch.randn(*leading, 32 * blocks, generator=generator).to(dtype)
    with ops.use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "BLOCK_NUMBERS", piece)
        out = ops.nf4_swiglu_int8(x, *weights)
    assert (out.shape, out.dtype) == ((*leading, N), dtype)
    exact = exactly(x.reshape(-1, 32 * blocks), weights).view(*leading, N)
    assert_as_accurate(out, exact.to(dtype), exact)


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    M=st.one_of(st.integers(1, 6), st.integers(7, 100)),
    N=st.integers(1, 150),
    blocks=st.integers(1, 6),
    blocksize=st.sampled_from([32, 64]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_native(
    assert_as_accurate, use_isa, isa, dtype, M, N, blocks, blocksize, double_quant, seed
):
    use_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    K = blocks * blocksize
    weights = make_weights(N, K, generator, blocksize=blocksize, double_quant=double_quant)
    x = torch.randn(M, K, generator=generator).to(dtype)
    exact = exactly(x, weights)
    assert_as_accurate(cpu.nf4_swiglu_int8(x, *weights), exact.to(dtype), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(250, 130, 1728), (2060, 40, 64), (300, 1100, 64), (3, 60, 576)]
)
def test_more_than_one_slice_or_piece(assert_as_accurate, use_isa, isa, dtype, M, N, K):
    use_isa(isa)
    weights = make_weights(N, K)
    x = torch.randn(M, K).to(dtype)
    exact = exactly(x, weights)
    assert_as_accurate(cpu.nf4_swiglu_int8(x, *weights), exact.to(dtype), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("M", [1, 4, 5, 300])
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, M):
    use_isa(isa)
    weights = make_weights(190, 832)
    x = torch.randn(M, 832)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(cpu.nf4_swiglu_int8(x, *weights))
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_neither_half_is_in_memory(recorder):
    weights = make_weights(512, 64)
    x = torch.randn(1000, 64)
    with recorder:
        cpu.nf4_swiglu_int8(x, *weights)
    assert recorder.peak == 1000 * 512 * 4  # the result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "BLOCK_NUMBERS", 1000 * 64)
        with recorder:
            reference.nf4_swiglu_int8(x, *weights)
    assert recorder.largest == 1000 * 512


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_cannot_be_scaled(backend):
    weights = make_weights(33, 64)
    x = torch.randn(3, 64)
    x[0, 1] = torch.nan
    x[1] = 0
    with ops.use_backend(backend):
        for rows in (x, x.repeat(4, 1)):
            out = ops.nf4_swiglu_int8(rows, *weights)[:3]
            assert out[0].isnan().all()
            assert (out[1] == 0).all()
            assert out[2].isfinite().all()


W = quantize_nf4(torch.ones(4, 64))
X = torch.ones(3, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.ones(4, 64), W), "w_gate is a Tensor; it must be an NF4Weight"),
        ((X, W, None), "w_up is a NoneType; it must be an NF4Weight"),
        (
            (X, W, quantize_nf4(torch.ones(5, 64))),
            r"w_up has shape \[5, 64\]; it must be \[4, 64\]",
        ),
        (
            (X, W, quantize_nf4(torch.ones(4, 64), blocksize=32)),
            "w_up has blocksize 32; it must be 64, as w_gate",
        ),
        ((X.T, W, W), r"x has shape \[64, 3\]; it must be \['...', 64\]"),
        ((X.long(), W, W), "x has dtype torch.int64"),
        ((X.to("meta"), W, W), "w_gate is on device cpu; it must be on meta, as x"),
        (
            (X[:, :32], *[quantize_nf4(torch.ones(4, 32))] * 2),
            "w_gate has rows of 32 and blocks of 64; a row must be a whole number of blocks",
        ),
        ((X.clone().requires_grad_(), W, W), "x requires a gradient; this operation has none"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=f"nf4_swiglu_int8: {message}"):
        ops.nf4_swiglu_int8(*arguments)
