from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_kernels.audit.ptx.types import (
    FP8_VALUES,
    TYPES,
    float_to_bf16,
    float_to_fp8,
    float_to_tf32,
    pack,
    unpack,
)

_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_bits = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50).map(
    lambda values: np.array(values, np.uint32)
)


@given(_bits)
@settings(deadline=None)
def test_bf16_rounds_as_torch_does(bits):
    values = bits.view(np.float32)
    mine = torch.from_numpy(float_to_bf16(values).view(np.int16)).view(torch.bfloat16)
    theirs = torch.from_numpy(values).bfloat16()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_bf16_of_float64_is_rounded_once():
    # Half a step above one, and a hair: through float32 the hair is lost and the tie goes down.
    just_above = np.array([1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8 + 2.0**-40), 1 + 2.0**-8])
    assert float_to_bf16(just_above).tolist() == [0x3F81, 0xBF81, 0x3F80]


@pytest.mark.parametrize("name", _FP8)
def test_every_fp8_value_is_torchs(name):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(_FP8[name]).float().numpy()
    assert np.array_equal(FP8_VALUES[name], expected, equal_nan=True)


@pytest.mark.parametrize("name", _FP8)
def test_fp8_rounds_as_torch_does_within_its_range(name):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = halves.float()
    most = torch.finfo(_FP8[name]).max
    inside = values[values.abs() <= most]
    expected = inside.to(_FP8[name]).view(torch.uint8).numpy()
    assert np.array_equal(float_to_fp8(inside.numpy(), name), expected)
    beyond = float_to_fp8(np.array([np.inf, -np.inf, 1e9, np.nan], np.float32), name)
    assert FP8_VALUES[name][beyond[:3]].tolist() == [most, -most, most]
    assert np.isnan(FP8_VALUES[name][beyond[3]])


def test_tf32_rounds_ties_away_from_zero():
    step = 2.0**-10
    values = np.array([1 + step / 2, -1 - step / 2, 1 + step / 4, np.inf, np.nan], np.float32)
    rounded = float_to_tf32(values).view(np.float32)
    assert rounded[:4].tolist() == [1 + step, -1 - step, 1, np.inf]
    assert np.isnan(rounded[4])


@pytest.mark.parametrize("name", ["f16", "bf16", "f16x2", "bf16x2", "f32x2", "f32", "e4m3x2"])
def test_packing_undoes_unpacking(name):
    kind = TYPES[name]
    raw = np.arange(0, 2**14, 7).astype(f"u{kind.nbytes}") * np.array(3, f"u{kind.nbytes}")
    values = raw.view(kind.dtype)
    parts = unpack(values, kind)
    assert len(parts) == kind.lanes
    finite = np.all([np.isfinite(part) for part in parts], axis=0)
    assert finite.any()
    assert np.array_equal(pack(parts, kind).view(raw.dtype)[finite], raw[finite])


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_rounding_toward_zero_never_grows(name):
    values = torch.randn(1000).numpy()
    kind = TYPES[name]
    cut = unpack(pack([values], kind, toward_zero=True), kind)[0]
    nearest = unpack(pack([values], kind), kind)[0]
    assert (np.abs(cut) <= np.abs(values)).all()
    assert (np.abs(nearest) >= np.abs(cut)).all()
    assert (nearest != cut).any()
