"""The tensor itself: what fits together, what it says of itself, moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ladder_kernels import NF4Weight, quantize_nf4
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import NF4_VALUES


def parts(**changes):
    """The fields of a doubly quantised [10, 70] weight, some of them changed."""
    weight = quantize_nf4(torch.randn(10, 70))
    return {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)} | changes


def test_facts():
    plain = quantize_nf4(torch.randn(10, 70).bfloat16(), double_quant=False)
    assert plain.shape == (10, 70)
    assert plain.numel == 700
    assert plain.dtype == torch.bfloat16
    assert plain.blocksize == 64
    assert plain.device == torch.device("cpu")
    assert not plain.double_quant
    assert list(plain.tensors()) == ["packed", "absmax"]
    assert plain.nbytes == 350 + 11 * 4
    double = quantize_nf4(torch.randn(10, 70))
    assert double.double_quant
    assert list(double.tensors()) == [
        "packed", "absmax", "nested_absmax", "nested_code", "nested_offset",
    ]  # fmt: skip
    assert double.nbytes == 350 + 11 + 4 + 256 * 4 + 4


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4.13)])
def test_bits_a_parameter(double_quant, bits):
    weight = quantize_nf4(torch.randn(1024, 1024), double_quant=double_quant)
    table = 1024 if double_quant else 0
    assert 8 * (weight.nbytes - table) / weight.numel == pytest.approx(bits, abs=0.005)


def test_defaults():
    weight = quantize_nf4(torch.randn(4, 64))
    assert (weight.blocksize, weight.double_quant) == (64, True)


def test_moves_share_what_is_there_already():
    weight = quantize_nf4(torch.randn(4, 64))
    same = weight.to("cpu")
    for name, tensor in weight.tensors().items():
        assert same.tensors()[name].data_ptr() == tensor.data_ptr()
    away = weight.to("meta")
    assert away.device.type == "meta"
    assert (away.shape, away.blocksize, away.dtype) == (weight.shape, 64, torch.float32)
    assert all(tensor.device.type == "meta" for tensor in away.tensors().values())


def test_is_constant():
    weight = quantize_nf4(torch.randn(4, 64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.blocksize = 32  # type: ignore[misc]
    assert weight != quantize_nf4(torch.randn(4, 64))
    assert hash(weight) == hash(weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 48}, "blocksize is 48; it must be one of 32, 64, 128"),
        (
            {"shape": (10, 72)},
            "packed is torch.uint8 [350]; it must be contiguous torch.uint8 [360]",
        ),
        (
            {"packed": torch.zeros(350, dtype=torch.int8)},
            "packed is torch.int8 [350]; it must be contiguous torch.uint8 [350]",
        ),
        (
            {"packed": torch.zeros(700, dtype=torch.uint8)[::2]},
            "packed is non-contiguous torch.uint8 [350]; it must be contiguous torch.uint8 [350]",
        ),
        (
            {"blocksize": 32},
            "absmax is torch.uint8 [11]; it must be contiguous torch.uint8 [22]",
        ),
        (
            {"absmax": torch.zeros(11)},
            "absmax is torch.float32 [11]; it must be contiguous torch.uint8 [11]",
        ),
        (
            {"nested_absmax": torch.zeros(2)},
            "nested_absmax is torch.float32 [2]; it must be contiguous torch.float32 [1]",
        ),
        (
            {"nested_code": torch.zeros(16)},
            "nested_code is torch.float32 [16]; it must be contiguous torch.float32 [256]",
        ),
        (
            {"nested_offset": torch.zeros(1)},
            "nested_offset is torch.float32 [1]; it must be contiguous torch.float32 []",
        ),
        (
            {"nested_code": None},
            "nested_code is missing; double quantisation needs all three nested tensors",
        ),
        (
            {"nested_absmax": None, "nested_code": None, "nested_offset": None},
            "absmax is torch.uint8 [11]; it must be contiguous torch.float32 [11]",
        ),
        (
            {"nested_code": torch.zeros(256, device="meta")},
            "nested_code is on device meta; it must be on cpu, as packed",
        ),
    ],
)
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError) as caught:
        NF4Weight(**parts(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_not_missed():
    """`nested_absmax` alone decides whether the scales are read as doubly quantised."""
    with pytest.raises(ConfigError, match="nested_absmax is missing"):
        NF4Weight(**parts(nested_absmax=None))


def test_error_of_quantisation_is_small():
    """Against the definition: every element takes the nearest centroid of its block."""
    weight = torch.randn(40, 64)
    ours = quantize_nf4(weight, double_quant=False)
    table = torch.tensor(NF4_VALUES, dtype=torch.float64)
    scale = weight.abs().amax(1, keepdim=True).double()
    nearest = (weight.double()[..., None] - scale[..., None] * table).abs().amin(-1)
    error = (ours.dequantize().double() - weight.double()).abs()
    assert float((error - nearest).abs().max()) < 1e-6
