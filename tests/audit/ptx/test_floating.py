from __future__ import annotations

import numpy as np
import pytest
import torch

from ladder_kernels.audit.ptx import UnsupportedInstructionError


def _f32(values) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


def _lanes(seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(32) * scale).astype(np.float32)


def _bits(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16)


_F64 = np.float64


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.f32 %r9,%r0,%r1;", lambda a, b: a + b),
        ("sub.rn.f32 %r9,%r0,%r1;", lambda a, b: a - b),
        ("mul.f32 %r9,%r0,%r1;", lambda a, b: a * b),
        ("div.rn.f32 %r9,%r0,%r1;", lambda a, b: a / b),
        ("div.full.f32 %r9,%r0,%r1;", lambda a, b: a / b),
        ("fma.rn.f32 %r9,%r0,%r1,%r0;", lambda a, b: _F64(a) * _F64(b) + _F64(a)),
        ("min.f32 %r9,%r0,%r1;", np.minimum),
        ("max.f32 %r9,%r0,%r1;", np.maximum),
        ("max.f32 %r9,%r0,%r1,0f3F800000;", lambda a, b: np.maximum(np.maximum(a, b), 1)),
        ("neg.f32 %r9,%r0;", lambda a, b: -a),
        ("abs.f32 %r9,%r0;", lambda a, b: np.abs(a)),
        ("ex2.approx.ftz.f32 %r9,%r0;", lambda a, b: np.exp2(_F64(a))),
        ("tanh.approx.f32 %r9,%r0;", lambda a, b: np.tanh(_F64(a))),
        ("abs.f32 %r2,%r0; rsqrt.approx.f32 %r9,%r2;", lambda a, b: 1 / np.sqrt(np.abs(_F64(a)))),
        ("abs.f32 %r2,%r0; lg2.approx.f32 %r9,%r2;", lambda a, b: np.log2(np.abs(_F64(a)))),
        ("copysign.f32 %r9,%r0,%r1;", lambda a, b: np.copysign(b, a)),
        (
            "min.xorsign.abs.f32 %r9,%r0,%r1;",
            lambda a, b: np.minimum(np.abs(a), np.abs(b)) * np.sign(a * b),
        ),
        ("add.sat.f32 %r9,%r0,%r1;", lambda a, b: np.clip(a + b, 0, 1)),
    ],
)
def test_f32(evaluate, body, expected):
    a, b = _lanes(0), _lanes(1)
    found = evaluate(body, _f32(a), _f32(b)).view(np.float32)
    assert np.array_equal(found, expected(a, b).astype(np.float32))


def test_nan_passes_by_or_is_handed_on(evaluate):
    a, b = np.full(32, np.nan, np.float32), np.ones(32, np.float32)
    assert (evaluate("max.f32 %r9,%r0,%r1;", _f32(a), _f32(b)).view(np.float32) == 1).all()
    kept = evaluate("max.NaN.f32 %r9,%r0,%r1;", _f32(a), _f32(b)).view(np.float32)
    assert np.isnan(kept).all()


def test_subnormals_are_flushed_where_asked(evaluate):
    small = np.full(32, 1e-40, np.float32)
    half = np.full(32, 0.5, np.float32)
    assert (evaluate("mul.f32 %r9,%r0,%r1;", _f32(small), _f32(half)).view(np.float32) > 0).all()
    assert (evaluate("mul.ftz.f32 %r9,%r0,%r1;", _f32(small), _f32(half)) == 0).all()
    # Before the operation, too.
    large = np.full(32, 1e20, np.float32)
    assert (evaluate("mul.ftz.f32 %r9,%r0,%r1;", _f32(small), _f32(large)) == 0).all()


_NARROW = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("name", _NARROW)
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "min", "max"])
def test_16_bits_and_packed(evaluate, name, opcode):
    torch_function = {"min": "minimum", "max": "maximum"}.get(opcode, opcode)
    a, b = (torch.from_numpy(_lanes(seed, 5)).to(_NARROW[name]) for seed in (2, 3))
    expected = getattr(torch, torch_function)(a, b)
    found = evaluate(f"{opcode}.{name} %h9,%h0,%h1;", _bits(a), _bits(b), bits=16)
    assert np.array_equal(found, _bits(expected))
    pairs = [np.concatenate([_bits(x), _bits(x.flip(0))]).reshape(2, 32).T.copy() for x in (a, b)]
    packed = evaluate(
        f"{opcode}.{name}x2 %r9,%r0,%r1;", *(pair.view(np.uint32).ravel() for pair in pairs)
    )
    halves = packed.view(np.uint16).reshape(32, 2)
    assert np.array_equal(halves[:, 0], _bits(expected))
    assert np.array_equal(halves[:, 1], _bits(expected.flip(0)))


@pytest.mark.parametrize("name", _NARROW)
def test_fused_products_of_16_bits_are_rounded_once(evaluate, name):
    a, b, c = (torch.from_numpy(_lanes(seed)).to(_NARROW[name]) for seed in (4, 5, 6))
    exact = a.double() * b.double() + c.double()
    found = evaluate(f"fma.rn.{name} %h9,%h0,%h1,%h2;", _bits(a), _bits(b), _bits(c), bits=16)
    back = torch.from_numpy(found.view(np.int16)).view(_NARROW[name]).double()
    spacing = torch.finfo(_NARROW[name]).eps * exact.abs()
    assert ((back - exact).abs() <= spacing / 2 + 1e-9).all()


def test_fused_products_of_f16_are_not_rounded_to_f32_first(evaluate):
    # A hair below the middle between two f16, which float32 cannot tell from the middle.
    a, b, c = 2.0**-5 * (1 + 2.0**-10), 2.0**-6 * (1 - 2.0**-10), 1 + 2.0**-10
    raw = [np.full(32, value, np.float16).view(np.uint16) for value in (a, b, c)]
    found = evaluate("fma.rn.f16 %h9,%h0,%h1,%h2;", *raw, bits=16).view(np.float16)
    assert (found == c).all()


def test_fused_product_of_f32_keeps_what_two_roundings_lose(evaluate):
    a = np.full(32, 1 + 2.0**-12, np.float32)
    c = np.full(32, -(1 + 2.0**-11), np.float32)
    found = evaluate("fma.rn.f32 %r9,%r0,%r0,%r1;", _f32(a), _f32(c)).view(np.float32)
    assert (found == 2.0**-24).all()


def test_packed_f32(evaluate):
    a, b = _lanes(7), _lanes(8)
    found = (
        evaluate(
            "mov.b64 %d0,{%r0,%r1}; mov.b64 %d1,{%r1,%r0}; fma.rn.f32x2 %d9,%d0,%d1,%d0;",
            _f32(a),
            _f32(b),
            bits=64,
        )
        .view(np.float32)
        .reshape(32, 2)
    )
    product = a.astype(_F64) * b.astype(_F64)
    assert np.array_equal(found[:, 0], (product + a).astype(np.float32))
    assert np.array_equal(found[:, 1], (product + b).astype(np.float32))


@pytest.mark.parametrize("name", _NARROW)
def test_mixed_types(evaluate, name):
    a = torch.from_numpy(_lanes(9)).to(_NARROW[name])
    c = _lanes(10)
    wide = a.float().numpy()
    found = evaluate(f"sub.rn.f32.{name} %r9,%h0,%r1;", _bits(a), _f32(c)).view(np.float32)
    assert np.array_equal(found, wide - c)
    found = evaluate(f"fma.rn.f32.{name} %r9,%h0,%h0,%r1;", _bits(a), _f32(c)).view(np.float32)
    exact = wide.astype(_F64) ** 2 + c
    assert np.array_equal(found, exact.astype(np.float32))


def test_f64(evaluate):
    a, b = _lanes(11).astype(_F64), _lanes(12).astype(_F64)
    found = evaluate("add.f64 %d9,%d0,%d1;", a.view(np.uint64), b.view(np.uint64), bits=64)
    assert np.array_equal(found.view(_F64), a + b)


@pytest.mark.parametrize(
    "body", ["add.rz.f32 %r9,%r0,%r0;", "add.f32.f64 %r9,%d0,%r0;", "frobnicate.f32 %r9,%r0;"]
)
def test_what_is_not_modelled_is_refused(evaluate, body):
    with pytest.raises(UnsupportedInstructionError, match="model"):
        evaluate(body, _f32(_lanes(0)))


def test_testp(evaluate):
    values = np.array([np.nan, np.inf, -np.inf, 1.0] * 8, np.float32)
    for name, expected in {"notanumber": 8, "infinite": 16, "finite": 8, "number": 24}.items():
        body = f"testp.{name}.f32 %p1,%r0; selp.b32 %r9,1,0,%p1;"
        assert evaluate(body, _f32(values)).sum() == expected
