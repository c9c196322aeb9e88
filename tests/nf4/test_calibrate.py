"""Rounding for given inputs: less error, the same format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ladder_kernels import quantize_nf4
from ladder_kernels.errors import ConfigError, NonFiniteError
from ladder_kernels.nf4 import BLOCKSIZES, NF4Weight
from ladder_kernels.nf4.calibrate import quantize_calibrated

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def correlated(tokens: int, size: int, seed: int = 1) -> torch.Tensor:
    """Inputs [tokens, size] with few directions, and a few large features."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(size // 4, size, generator=generator)
    noise = 0.3 * torch.randn(tokens, size, generator=generator)
    x = torch.randn(tokens, size // 4, generator=generator) @ basis + noise
    x[:, :: size // 3] *= 8
    return x


def moments_of(x: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return x.to(dtype).t() @ x.to(dtype)


def loss(weight: torch.Tensor, quantised: NF4Weight, x: torch.Tensor) -> float:
    """Squared error of x W^T."""
    difference = weight.double() - quantised.dequantize(torch.float64)
    return float((x.double() @ difference.t()).square().sum())


def same(a: NF4Weight, b: NF4Weight) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "blocksize"),
    [
        (96, 128, 64),
        (2100, 64, 64),  # more rows than are worked on at a time
        (40, 300, 128),  # more columns than errors are fed back by at a time; blocks straddle rows
        (33, 90, 32),
        (7, 45, 64),  # an odd number of elements
        (3, 40, 4096),  # one short block
    ],
)
def test_less_error_than_rounding_to_nearest(rows, columns, blocksize, double_quant, dtype):
    weight, x = torch.randn(rows, columns).to(dtype), correlated(400, columns)
    calibrated = quantize_nf4(weight, blocksize, double_quant, moments_of(x))
    nearest = quantize_nf4(weight, blocksize, double_quant)
    assert loss(weight, calibrated, x) < 0.7 * loss(weight, nearest, x)
    unseen = correlated(400, columns)
    assert loss(weight, calibrated, unseen) < 0.7 * loss(weight, nearest, unseen)
    assert calibrated.nbytes == nearest.nbytes
    assert calibrated.dtype == dtype
    assert (calibrated.shape, calibrated.blocksize) == (nearest.shape, nearest.blocksize)


def test_each_step_lowers_the_error():
    weight, x = torch.randn(64, 128), correlated(500, 128)
    losses = []
    for shares, sweeps in [((1.0,), 0), ((1.0, 0.9, 0.8, 0.7), 0), ((1.0, 0.9, 0.8, 0.7), 3)]:
        packed, absmax, _ = quantize_calibrated(
            weight, moments_of(x), 64, False, name="w", shares=shares, sweeps=sweeps
        )
        losses.append(loss(weight, NF4Weight(packed, absmax, (64, 128), 64, weight.dtype), x))
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 7.0])
def test_unrelated_inputs_round_to_nearest_by_bits(blocksize, dtype, scale, assert_same_bits):
    """With nothing to feed back and no other scales there is nothing to gain."""
    weight = torch.randn(128, 128).to(dtype)
    weight[3] = 0
    packed, absmax, nested = quantize_calibrated(
        weight, scale * torch.eye(128), blocksize, False, name="w", shares=(1.0,)
    )
    nearest = quantize_nf4(weight, blocksize, False)
    assert nested is None
    assert_same_bits(packed, nearest.packed)
    assert_same_bits(absmax, nearest.absmax)


@pytest.mark.parametrize("shape", [(33, 90), (5, 7)])
def test_unrelated_inputs_are_at_the_nearest_values(shape):
    """Of the values that the final, double quantised scales allow, wherever blocks begin."""
    weight = torch.randn(shape)
    packed, absmax, nested = quantize_calibrated(
        weight, torch.eye(shape[1]), 64, True, name="w", shares=(1.0,)
    )
    assert nested is not None
    found = NF4Weight(packed, absmax, shape, 64, torch.float32, *nested).dequantize()
    every = torch.stack(
        [
            NF4Weight(
                torch.full_like(packed, 17 * index), absmax, shape, 64, torch.float32, *nested
            ).dequantize()
            for index in range(16)
        ]
    )
    nearest = (every - weight).abs().amin(dim=0)
    torch.testing.assert_close((found - weight).abs(), nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (33, 90), (7, 45)])
def test_bitsandbytes_reads_it(shape, double_quant, assert_same_bits):
    from bitsandbytes.functional import dequantize_4bit

    weight, x = torch.randn(shape), correlated(200, shape[1])
    ours = quantize_nf4(weight, 64, double_quant, moments_of(x))
    bits, state = ours.to_bitsandbytes()
    theirs = dequantize_4bit(bits, state)
    assert_same_bits(ours.dequantize(), theirs.view(shape))
    assert same(NF4Weight.from_bitsandbytes(bits, state), ours)


def test_the_same_bits_again():
    weight, moments = torch.randn(70, 96), moments_of(correlated(300, 96))
    before = moments.clone()
    one, other = (quantize_nf4(weight, 64, True, moments) for _ in range(2))
    assert same(one, other)
    assert torch.equal(moments, before)


def test_a_multiple_of_the_moments_means_the_same():
    weight, moments = torch.randn(70, 96), moments_of(correlated(300, 96))
    assert same(
        quantize_nf4(weight, 64, True, moments), quantize_nf4(weight, 64, True, 4 * moments)
    )


def test_float32_moments_and_strides():
    x = correlated(300, 96)
    weight = torch.randn(96, 70).t()
    nearest = quantize_nf4(weight)
    for moments in (moments_of(x, torch.float32), moments_of(x).t()):
        calibrated = quantize_nf4(weight, calibration=moments)
        assert loss(weight, calibrated, x) < 0.7 * loss(weight, nearest, x)


def test_fewer_inputs_than_features():
    weight, x = torch.randn(32, 128), torch.randn(5, 128)
    calibrated = quantize_nf4(weight, calibration=moments_of(x))
    assert loss(weight, calibrated, x) < 0.1 * loss(weight, quantize_nf4(weight), x)


@pytest.mark.parametrize("double_quant", [False, True])
def test_features_that_are_never_used(double_quant):
    weight, x = torch.randn(32, 128), correlated(300, 128)
    x[:, 5:70] = 0
    calibrated = quantize_nf4(weight, 64, double_quant, moments_of(x))
    nearest = quantize_nf4(weight, 64, double_quant)
    assert loss(weight, calibrated, x) < 0.7 * loss(weight, nearest, x)
    unused, other = (q.dequantize()[:, 5:70] - weight[:, 5:70] for q in (calibrated, nearest))
    assert unused.square().sum() < 1.5 * other.square().sum()
    nothing = quantize_nf4(weight, 64, double_quant, torch.zeros(128, 128))
    assert loss(weight, nothing, torch.eye(128)) < 1.05 * loss(weight, nearest, torch.eye(128))


@pytest.mark.parametrize("double_quant", [False, True])
def test_zeros_stay_zero(double_quant):
    weight = torch.zeros(64, 64)
    calibrated = quantize_nf4(weight, 64, double_quant, moments_of(correlated(100, 64)))
    assert not calibrated.dequantize().any()


def test_a_weight_without_elements():
    for shape in [(0, 64), (5, 0)]:
        found = quantize_nf4(torch.empty(shape), 64, False, torch.zeros(shape[1], shape[1]))
        assert found.shape == shape
        assert found.dequantize().shape == shape


EYE = torch.eye(8)


def changed(place: tuple[int, int], value: float) -> torch.Tensor:
    matrix = EYE.clone()
    matrix[place] = value
    return matrix


@pytest.mark.parametrize(
    ("moments", "words"),
    [
        ([[1.0]], ["list"]),
        (torch.eye(4), ["[4, 4]", "[8, 8]"]),
        (torch.ones(8), ["[8]", "[8, 8]"]),
        (EYE.bfloat16(), ["bfloat16", "float32", "float64"]),
        (EYE.long(), ["int64", "float32"]),
        (changed((1, 2), torch.nan), ["NaN"]),
        (changed((1, 1), torch.inf), ["infinity"]),
        (changed((1, 1), -2.0), ["-2", "diagonal"]),
        (changed((1, 2), 0.5), ["symmetric", "0.5"]),
        (torch.ones(8, 8) - 0.5 * EYE, ["semidefinite"]),
        (EYE.to("meta"), ["without values"]),
    ],
)
def test_wrong_moments(moments: Any, words: list[str]):
    with pytest.raises(ConfigError, match="calibration of 'layer'") as caught:
        quantize_nf4(torch.randn(3, 8), calibration=moments, name="layer")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("shape", [(8,), (2, 4, 8), ()])
def test_only_matrices_have_inputs(shape):
    with pytest.raises(ConfigError, match="matrix"):
        quantize_nf4(torch.randn(shape), calibration=EYE)


def test_the_weights_own_errors_stay():
    weight = torch.randn(3, 8)
    with pytest.raises(ConfigError, match="blocksize"):
        quantize_nf4(weight, 48, calibration=EYE)
    with pytest.raises(ConfigError, match="dtype"):
        quantize_nf4(weight.double(), calibration=EYE)
    weight[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'layer'.*\[1, 2\]"):
        quantize_nf4(weight, calibration=EYE, name="layer")
