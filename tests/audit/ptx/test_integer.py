from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_kernels.audit.ptx import UnsupportedInstructionError

_EDGES = {
    32: (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF),
    64: (0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1, 2**32, 2**32 - 1),
}


def _lanes(bits: int, *, low: int = 0) -> st.SearchStrategy[np.ndarray]:
    edges = st.sampled_from([edge for edge in _EDGES[bits] if edge >= low])
    value = edges | st.integers(low, 2**bits - 1)
    return st.lists(value, min_size=32, max_size=32).map(lambda v: np.array(v, f"u{bits // 8}"))


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int:
    return -(abs(a) // abs(b)) if (a < 0) != (b < 0) else abs(a) // abs(b)


def _low24(a: int) -> int:
    return _signed(a & 0xFFFFFF, 24)


def _bytes(a: int, *, signed: bool) -> list[int]:
    return list(np.array([a], "u4").view("i1" if signed else "u1").astype(int))


_CASES = {
    "add.s32 %r9,%r0,%r1;": lambda a, b: a + b,
    "sub.s32 %r9,%r0,%r1;": lambda a, b: a - b,
    "mul.lo.s32 %r9,%r0,%r1;": lambda a, b: a * b,
    "mul.hi.u32 %r9,%r0,%r1;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r9,%r0,%r1;": lambda a, b: _signed(a) * _signed(b) >> 32,
    "min.s32 %r9,%r0,%r1;": lambda a, b: min(_signed(a), _signed(b)),
    "min.u32 %r9,%r0,%r1;": min,
    "max.s32 %r9,%r0,%r1;": lambda a, b: max(_signed(a), _signed(b)),
    "max.u32 %r9,%r0,%r1;": max,
    "neg.s32 %r9,%r0;": lambda a, b: -a,
    "abs.s32 %r9,%r0;": lambda a, b: abs(_signed(a)),
    "mad.lo.s32 %r9,%r0,%r1,%r0;": lambda a, b: a * b + a,
    "mad.hi.s32 %r9,%r0,%r1,%r0;": lambda a, b: (_signed(a) * _signed(b) >> 32) + a,
    "mul24.lo.s32 %r9,%r0,%r1;": lambda a, b: _low24(a) * _low24(b),
    "dp4a.s32.u32 %r9,%r0,%r1,%r0;": lambda a, b: (
        a + sum(x * y for x, y in zip(_bytes(a, signed=True), _bytes(b, signed=False), strict=True))
    ),
    "add.s32 %r9,%r0,-7;": lambda a, b: a - 7,
}


def _check(evaluate, body, expected, *inputs, bits=32):
    found = evaluate(body, *inputs, bits=bits)
    wanted = [
        expected(*(int(values[lane]) for values in inputs)) & ((1 << bits) - 1)
        for lane in range(32)
    ]
    assert found.tolist() == wanted


@pytest.mark.parametrize("body", _CASES)
@settings(max_examples=8, deadline=None)
@given(a=_lanes(32), b=_lanes(32))
def test_32_bits(evaluate, body, a, b):
    _check(evaluate, body, _CASES[body], a, b)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mul.wide.s32 %d9,%r0,%r1;", lambda a, b: _signed(a) * _signed(b)),
        ("mul.wide.u32 %d9,%r0,%r1;", lambda a, b: a * b),
        (
            "cvt.s64.s32 %d2,%r1; mad.wide.s32 %d9,%r0,%r1,%d2;",
            lambda a, b: _signed(a) * _signed(b) + _signed(b),
        ),
    ],
)
@settings(max_examples=8, deadline=None)
@given(a=_lanes(32), b=_lanes(32))
def test_wide_products(evaluate, body, expected, a, b):
    _check(evaluate, body, expected, a, b, bits=64)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s64 %d9,%d0,%d1;", lambda a, b: a + b),
        ("mul.lo.s64 %d9,%d0,%d1;", lambda a, b: a * b),
        ("mul.hi.u64 %d9,%d0,%d1;", lambda a, b: a * b >> 64),
        ("mul.hi.s64 %d9,%d0,%d1;", lambda a, b: _signed(a, 64) * _signed(b, 64) >> 64),
        ("max.s64 %d9,%d0,%d1;", lambda a, b: max(_signed(a, 64), _signed(b, 64))),
    ],
)
@settings(max_examples=8, deadline=None)
@given(a=_lanes(64), b=_lanes(64))
def test_64_bits(evaluate, body, expected, a, b):
    _check(evaluate, body, expected, a, b, bits=64)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("div.u32 %r9,%r0,%r1;", lambda a, b: a // b),
        ("rem.u32 %r9,%r0,%r1;", lambda a, b: a % b),
        ("div.s32 %r9,%r0,%r1;", lambda a, b: _quotient(_signed(a), _signed(b))),
        (
            "rem.s32 %r9,%r0,%r1;",
            lambda a, b: _signed(a) - _quotient(_signed(a), _signed(b)) * _signed(b),
        ),
    ],
)
@settings(max_examples=8, deadline=None)
@given(a=_lanes(32), b=_lanes(32, low=1))
def test_division(evaluate, body, expected, a, b):
    _check(evaluate, body, expected, a, b)


@settings(max_examples=8, deadline=None)
@given(a=_lanes(64), b=_lanes(64, low=1))
def test_division_of_64_bits(evaluate, a, b):
    _check(
        evaluate,
        "div.s64 %d9,%d0,%d1;",
        lambda x, y: _quotient(_signed(x, 64), _signed(y, 64)),
        a,
        b,
        bits=64,
    )


@settings(max_examples=8, deadline=None)
@given(a=_lanes(64), b=_lanes(64))
def test_carries_make_sums_of_64_bits_from_halves(evaluate, a, b):
    halves = "mov.b64 {%r0,%r1},%d0; mov.b64 {%r2,%r3},%d1;"
    add = halves + "add.cc.u32 %r4,%r0,%r2; addc.u32 %r5,%r1,%r3; mov.b64 %d9,{%r4,%r5};"
    subtract = halves + "sub.cc.u32 %r4,%r0,%r2; subc.u32 %r5,%r1,%r3; mov.b64 %d9,{%r4,%r5};"
    _check(evaluate, add, lambda x, y: x + y, a, b, bits=64)
    _check(evaluate, subtract, lambda x, y: x - y, a, b, bits=64)


@settings(max_examples=8, deadline=None)
@given(a=_lanes(64), b=_lanes(32))
def test_carries_in_products(evaluate, a, b):
    body = (
        "mov.b64 {%r2,%r3},%d0; mad.lo.cc.u32 %r4,%r1,%r1,%r2; "
        "madc.hi.u32 %r5,%r1,%r1,%r3; mov.b64 %d9,{%r4,%r5};"
    )
    _check(evaluate, body, lambda x, y: y * y + x, a, b, bits=64)


def test_saturation_is_refused(evaluate):
    lanes = np.zeros(32, "u4")
    with pytest.raises(UnsupportedInstructionError, match=r"saturation.*add\.sat\.s32"):
        evaluate("add.sat.s32 %r9,%r0,%r0;", lanes)
