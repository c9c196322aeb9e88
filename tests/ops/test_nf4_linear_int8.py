"""Products in whole numbers: the definition, how far it may be from the exact product, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_kernels import ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import NF4_VALUES, quantize_nf4
from ladder_kernels.ops.nf4_linear_int8 import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("reference_backend")


def by_definition(x, weight, bias=None, residual=None):
    """The same in NumPy's float64, but for what is float32 by definition."""
    rows = x.float().numpy().reshape(-1, weight.blocksize)
    most = np.abs(rows).max(1, keepdims=True)
    q = np.rint(rows * (np.float32(127) / most)).astype(np.float64) * most / 127
    packed = weight.packed.numpy()
    indices = np.stack((packed >> 4, packed & 15), 1).reshape(weight.shape)
    c = np.rint(127 * np.array(NF4_VALUES))[indices]
    scales = reference.scales_of_rows(weight, 0, weight.shape[0]).double().numpy()
    scaled = c * scales.repeat(weight.blocksize, 1)
    out = torch.from_numpy(q.reshape(x.shape) @ scaled.T / 127)
    for addend in (bias, residual):
        out = out if addend is None else out + addend.double()
    return out


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    leading=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 4),
    blocksize=st.sampled_from([32, 64, 128, 2048]),
    double_quant=st.booleans(),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    piece=st.sampled_from([1, 100, 1 << 22]),
    seed=st.integers(0, 2**31),
)
def test_values(
    assert_as_accurate,
    dtype,
    leading,
    rows,
    blocks,
    blocksize,
    double_quant,
    with_bias,
    with_residual,
    piece,
    seed,
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    columns = blocks * blocksize
    weight = quantize_nf4(make(rows, columns), blocksize=blocksize, double_quant=double_quant)
    x = make(*leading, columns)
    bias = make(rows) if with_bias else None
    residual = make(*leading, rows) if with_residual else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_NUMBERS", piece)
        out = ops.nf4_linear_int8(x, weight, bias, residual)
    assert (out.shape, out.dtype) == ((*leading, rows), dtype)
    flat = None if residual is None else residual.reshape(-1, rows)
    exact = by_definition(x.reshape(-1, columns), weight, bias, flat)
    assert_as_accurate(out.reshape(-1, rows), exact.to(dtype), exact)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 20),
    N=st.integers(1, 20),
    blocks=st.integers(1, 5),
    heavy=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_distance_to_the_exact_product(M, N, blocks, heavy, seed):
    """Half a step of each rounding, and no more: a / 254 of activations, scale / 254 of weights."""
    generator = torch.Generator().manual_seed(seed)
    K = 64 * blocks
    x = torch.randn(M, K, generator=generator)
    if heavy:
        x = x**5
    weight = quantize_nf4(torch.randn(N, K, generator=generator))
    dense = weight.dequantize(torch.float64)
    scales = reference.scales_of_rows(weight, 0, N).double().repeat_interleave(64, 1)
    step = x.view(M, blocks, 64).double().abs().amax(2).repeat_interleave(64, 1) / 254
    bound = x.double().abs() @ (scales / 254).T + step @ (dense.abs() + scales / 254).T
    difference = (ops.nf4_linear_int8(x, weight).double() - x.double() @ dense.T).abs()
    assert (difference <= 1.00001 * bound).all()


def test_whole_numbers():
    x = torch.tensor([[1.0, -127.0, 0.5, 1.5, 2.5, -0.49], [2.0, 0.0, 254.0, 0.0, 0.0, 0.0]])
    q, steps = reference.quantize_rows(x, 3)
    assert q.tolist() == [[1, -127, 0, 76, 127, -25], [1, 0, 127, 0, 0, 0]]
    assert steps.tolist() == [[1.0, pytest.approx(2.5 / 127)], [2.0, 0.0]]
    q, _ = reference.quantize_rows(x, 6)
    assert q[0].tolist() == [1, -127, 0, 2, 2, 0]  # ties to even
    weight = quantize_nf4(torch.tensor([NF4_VALUES * 2]), blocksize=32, double_quant=False)
    negative, positive = reference.codes_of_rows(weight, 0, 1)[0, :16].split(8)
    assert negative.tolist() == [-127, -88, -67, -50, -36, -23, -12, 0]
    assert positive.tolist() == [10, 20, 31, 43, 56, 71, 92, 127]


@pytest.mark.parametrize("blocksize", [64, 1024, 2048, 4096])
def test_sums_inside_a_block_are_exact(blocksize):
    q, codes = (torch.randint(-127, 128, (4, 2 * blocksize)).to(torch.int8) for _ in range(2))
    q[0], codes[0] = 127, 127
    sums = reference.block_sums(q, codes, blocksize)
    a, b = (t.long().unflatten(1, (2, blocksize)) for t in (q, codes))
    assert torch.equal(sums.long(), torch.einsum("mbk,nbk->mnb", a, b))
    assert sums[0, 0, 0] == blocksize * 127**2


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cannot_be_scaled(dtype):
    weight = quantize_nf4(torch.randn(8, 64))
    x = torch.randn(5, 64).to(dtype)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 4] = torch.inf
    x[3, 5] = -torch.inf
    bias = torch.randn(8).to(dtype)
    out = ops.nf4_linear_int8(x, weight, bias)
    assert torch.equal(out[0], bias)
    assert out[1:4].isnan().all()
    assert torch.equal(out[4], ops.nf4_linear_int8(x[4], weight, bias))


def test_an_outlier_spoils_its_own_block_only():
    weight = quantize_nf4(torch.eye(128), double_quant=False)
    x = torch.randn(3, 128)
    calm = ops.nf4_linear_int8(x, weight)
    x[:, 70] = 1000.0
    out = ops.nf4_linear_int8(x, weight)
    assert torch.equal(out[:, :64], calm[:, :64])
    assert (out[:, 64:] - x[:, 64:]).abs().max() > 1


def test_rows_of_tiny_and_of_large_numbers():
    weight = quantize_nf4(torch.eye(64), double_quant=False)
    sizes = torch.tensor([1e-45, 3e-37, 4e-37, 1e-30, 1e30, 2e36]).unsqueeze(1)
    out = ops.nf4_linear_int8(sizes.expand(6, 64), weight)
    assert torch.equal(out[:2], torch.zeros(2, 64))  # 127 / size is infinite
    torch.testing.assert_close(out[2:], sizes[2:].expand(4, 64))


def test_bias_and_residual_are_added_before_the_rounding():
    weight = quantize_nf4(torch.randn(16, 64))
    x, bias, residual = torch.randn(3, 64), torch.randn(16), torch.randn(3, 16)
    narrow = [t.bfloat16() for t in (x, bias, residual)]
    wide = [t.float() for t in narrow]
    out = ops.nf4_linear_int8(narrow[0], weight, *narrow[1:])
    expected = ops.nf4_linear_int8(wide[0], weight, *wide[1:]).bfloat16()
    assert torch.equal(out, expected)


def test_no_rows_and_no_columns():
    weight = quantize_nf4(torch.randn(8, 64))
    assert ops.nf4_linear_int8(torch.randn(0, 3, 64), weight).shape == (0, 3, 8)
    assert ops.nf4_linear_int8(torch.randn(64), weight).shape == (8,)


def test_gradients_are_refused():
    weight = quantize_nf4(torch.randn(8, 64))
    x = torch.randn(3, 64, requires_grad=True)
    message = "nf4_linear_int8: x requires a gradient; this operation has none"
    with pytest.raises(ConfigError, match=message):
        ops.nf4_linear_int8(x, weight)
    residual = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(ConfigError, match="residual requires a gradient"):
        ops.nf4_linear_int8(x.detach(), weight, None, residual)
    with torch.no_grad():
        out = ops.nf4_linear_int8(x, weight, None, residual)
    assert torch.equal(out, ops.nf4_linear_int8(x.detach(), weight, None, residual.detach()))
    with torch.inference_mode():
        assert torch.equal(ops.nf4_linear_int8(x, weight, None, residual), out)


def test_autocast_casts_the_inputs():
    weight = quantize_nf4(torch.randn(8, 64))
    x, bias = torch.randn(3, 64), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.nf4_linear_int8(x, weight, bias)
    assert torch.equal(out, ops.nf4_linear_int8(x.bfloat16(), weight, bias.bfloat16()))


def test_float64():
    weight = quantize_nf4(torch.randn(8, 64))
    x = torch.randn(3, 64, dtype=torch.float64)
    out = ops.nf4_linear_int8(x, weight)
    assert out.dtype == torch.float64
    assert (out - F.linear(x, weight.dequantize(torch.float64))).abs().max() < 0.3


W = quantize_nf4(torch.ones(4, 64))
X = torch.ones(3, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.ones(4, 64)), "weight is a Tensor; it must be an NF4Weight"),
        ((X[:, :32], W), r"x has shape \[3, 32\]; it must be \['...', 64\]"),
        ((X.long(), W), "x has dtype torch.int64"),
        ((X, W, torch.ones(5)), r"bias has shape \[5\]; it must be \[4\]"),
        ((X, W, torch.ones(4).half()), "bias has dtype torch.float16; it must be torch.float32"),
        ((X, W, None, torch.ones(4, 3)), r"residual has shape \[4, 3\]; it must be \[3, 4\]"),
        ((X.to("meta"), W), "weight is on device cpu; it must be on meta, as x"),
        (
            (torch.ones(3, 96), quantize_nf4(torch.ones(4, 96))),
            "weight has rows of 96 and blocks of 64; a row must be a whole number of blocks",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ops.nf4_linear_int8(*arguments)
