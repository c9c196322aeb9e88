from __future__ import annotations

import numpy as np
import pytest
import torch

from ladder_kernels.audit.ptx import UnsupportedInstructionError
from ladder_kernels.audit.ptx.types import FP8_VALUES

_FLOATS = np.concatenate(
    [
        np.random.default_rng(0).standard_normal(24) * 300,
        [0.5, 1.5, -2.5, 1e30, -1e30, np.nan, np.inf, -0.0],
    ]
).astype(np.float32)
_BITS = _FLOATS.view(np.uint32)


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


@pytest.mark.parametrize(
    ("body", "width", "bits", "expected"),
    [
        ("cvt.s64.s32 %d9,%r0;", 32, 64, lambda a: _signed(a, 32)),
        ("cvt.u64.u32 %d9,%r0;", 32, 64, lambda a: a),
        ("cvt.u32.u64 %r9,%d0;", 64, 32, lambda a: a),
        ("cvt.s32.s8 %r9,%r0;", 32, 32, lambda a: _signed(a, 8)),
        ("cvt.u32.u16 %r9,%h0;", 16, 32, lambda a: a),
        ("cvt.s32.s16 %r9,%h0;", 16, 32, lambda a: _signed(a, 16)),
        ("cvt.u16.u32 %h9,%r0;", 32, 16, lambda a: a),
        ("cvt.sat.s8.s32 %r9,%r0;", 32, 32, lambda a: max(-128, min(127, _signed(a, 32)))),
        ("cvt.sat.u8.s32 %r9,%r0;", 32, 32, lambda a: max(0, min(255, _signed(a, 32)))),
    ],
)
def test_integers(evaluate, body, width, bits, expected):
    edges = [0, 1, 127, 128, 255, 256, 0x7FFF, 0x8000, 2**31, 2**32 - 1]
    raw = np.random.default_rng(1).integers(0, 2**63, 32).astype(np.uint64)
    raw[: len(edges)] = edges
    values = (raw & np.uint64(2**width - 1)).astype(f"u{width // 8}")
    found = evaluate(body, values, bits=bits)
    assert found.tolist() == [expected(int(v)) & (2**bits - 1) for v in values]


@pytest.mark.parametrize(
    ("rounding", "function"),
    [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)],
)
def test_floats_to_integers_saturate(evaluate, rounding, function):
    found = evaluate(f"cvt.{rounding}.s32.f32 %r9,%r0;", _BITS).view(np.int32)
    wide = function(np.where(np.isnan(_FLOATS), 0, _FLOATS).astype(np.float64))
    assert np.array_equal(found, np.clip(wide, -(2**31), 2**31 - 1).astype(np.int64))
    rounded = evaluate(f"cvt.{rounding}.f32.f32 %r9,%r0;", _BITS).view(np.float32)
    assert np.array_equal(rounded, function(_FLOATS), equal_nan=True)


def test_integers_to_floats(evaluate):
    values = np.random.default_rng(2).integers(0, 2**32, 32).astype(np.uint32)
    found = evaluate("cvt.rn.f32.s32 %r9,%r0;", values).view(np.float32)
    assert np.array_equal(found, values.view(np.int32).astype(np.float32))
    found = evaluate("cvt.rn.f32.u32 %r9,%r0;", values).view(np.float32)
    assert np.array_equal(found, values.astype(np.float32))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_floats_to_16_bits(evaluate, name, dtype):
    expected = torch.from_numpy(_FLOATS).to(dtype)
    single = evaluate(f"cvt.rn.{name}.f32 %h9,%r0;", _BITS, bits=16)
    back = torch.from_numpy(single.view(np.int16)).view(dtype)
    torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)
    # The first of two sources becomes the higher half.
    pair = evaluate(f"cvt.rn.{name}x2.f32 %r9,%r0,%r1;", _BITS, _BITS[::-1].copy())
    halves = torch.from_numpy(pair.view(np.int16).reshape(32, 2)).view(dtype)
    torch.testing.assert_close(halves[:, 1], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(halves[:, 0], expected.flip(0), rtol=0, atol=0, equal_nan=True)
    widened = evaluate(f"cvt.f32.{name} %r9,%h0;", single).view(np.float32)
    assert np.array_equal(widened, expected.float().numpy(), equal_nan=True)
    positive = evaluate(f"cvt.rn.relu.{name}.f32 %h9,%r0;", _BITS, bits=16)
    back = torch.from_numpy(positive.view(np.int16)).view(dtype).float().numpy()
    assert np.array_equal(back, np.fmax(expected.float().numpy(), 0))


def test_rounding_toward_zero(evaluate):
    found = evaluate("cvt.rz.bf16.f32 %h9,%r0;", _BITS, bits=16)
    numbers = ~np.isnan(_FLOATS)
    assert np.array_equal(found[numbers], (_BITS >> 16).astype(np.uint16)[numbers])


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_fp8(evaluate, name, dtype):
    codes = np.random.default_rng(3).integers(0, 256, (32, 2)).astype(np.uint8)
    pair = codes.view(np.uint16).ravel()
    found = evaluate(f"cvt.rn.f16x2.{name}x2 %r9,%h0;", pair).view(np.float16).reshape(32, 2)
    assert np.array_equal(found, FP8_VALUES[name][codes].astype(np.float16), equal_nan=True)
    values = np.clip(np.nan_to_num(_FLOATS), -400, 400)
    raw = values.view(np.uint32)
    code = evaluate(f"cvt.rn.satfinite.{name}x2.f32 %h9,%r0,%r1;", raw, raw[::-1].copy(), bits=16)
    expected = torch.from_numpy(values).to(dtype).view(torch.uint8).numpy()
    assert np.array_equal(code.view(np.uint8).reshape(32, 2)[:, 1], expected)
    assert np.array_equal(code.view(np.uint8).reshape(32, 2)[:, 0], expected[::-1])


def test_tf32(evaluate):
    found = evaluate("cvt.rna.tf32.f32 %r9,%r0;", _BITS)
    assert (found[np.isfinite(_FLOATS)] & 0x1FFF == 0).all()
    error = np.abs(found.view(np.float32)[:24] - _FLOATS[:24])
    assert (error <= np.abs(_FLOATS[:24]) * 2.0**-11).all()


@pytest.mark.parametrize("body", ["cvt.rp.f16.f32 %h9,%r0;", "cvt.rs.f16x2.f32 %r9,%r0,%r0,%r0;"])
def test_other_roundings_are_refused(evaluate, body):
    with pytest.raises(UnsupportedInstructionError, match="rounding"):
        evaluate(body, _BITS)
