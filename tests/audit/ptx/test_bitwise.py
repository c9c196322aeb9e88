from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_EDGES = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1)


def _lanes(bits: int, most: int | None = None) -> st.SearchStrategy[np.ndarray]:
    top = 2**bits - 1 if most is None else most
    value = st.sampled_from([edge for edge in _EDGES if edge <= top]) | st.integers(0, top)
    return st.lists(value, min_size=32, max_size=32).map(lambda v: np.array(v, f"u{bits // 8}"))


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _extract(value: int, position: int, length: int, bits: int, signed: bool) -> int:
    """PTX's own definition of ``bfe``, bit by bit."""
    top = bits - 1
    sign = (value >> min(position + length - 1, top)) & 1 if signed and length else 0
    result = 0
    for i in range(bits):
        inside = i < length and position + i <= top
        result |= ((value >> (position + i)) & 1 if inside else sign) << i
    return result


def _insert(a: int, b: int, position: int, length: int) -> int:
    for i in range(length):
        if position + i < 32:
            b = (b & ~(1 << (position + i))) | (((a >> i) & 1) << (position + i))
    return b


def _permute(a: int, b: int, selectors: int) -> int:
    source = (a | (b << 32)).to_bytes(8, "little")
    result = 0
    for i in range(4):
        selector = (selectors >> (4 * i)) & 15
        byte = source[selector & 7]
        if selector & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << (8 * i)
    return result


def _check(evaluate, body, expected, *inputs, bits=32):
    found = evaluate(body, *inputs, bits=bits)
    wanted = [
        expected(*(int(values[lane]) for values in inputs)) & ((1 << bits) - 1)
        for lane in range(32)
    ]
    assert found.tolist() == wanted


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("and.b32 %r9,%r0,%r1;", lambda a, b: a & b),
        ("or.b32 %r9,%r0,%r1;", lambda a, b: a | b),
        ("xor.b32 %r9,%r0,%r1;", lambda a, b: a ^ b),
        ("not.b32 %r9,%r0;", lambda a, b: ~a),
        ("prmt.b32 %r9,%r0,%r1,0x5410U;", lambda a, b: _permute(a, b, 0x5410)),
        ("prmt.b32 %r9,%r0,%r0,%r1;", lambda a, b: _permute(a, a, b)),
        ("popc.b32 %r9,%r0;", lambda a, b: a.bit_count()),
        ("clz.b32 %r9,%r0;", lambda a, b: 32 - a.bit_length()),
        ("bfind.u32 %r9,%r0;", lambda a, b: a.bit_length() - 1),
        ("brev.b32 %r9,%r0;", lambda a, b: int(f"{a:032b}"[::-1], 2)),
        ("shf.l.wrap.b32 %r9,%r0,%r1,%r1;", lambda a, b: ((b << 32 | a) << (b & 31)) >> 32),
        ("shf.r.wrap.b32 %r9,%r0,%r1,%r1;", lambda a, b: (b << 32 | a) >> (b & 31)),
    ],
)
@settings(max_examples=8, deadline=None)
@given(a=_lanes(32), b=_lanes(32))
def test_32_bits(evaluate, body, expected, a, b):
    _check(evaluate, body, expected, a, b)


@pytest.mark.parametrize("table", [0xEA, 0x96, 0xF8, 0x1D, 0x00, 0xFF])
@settings(max_examples=5, deadline=None)
@given(a=_lanes(32), b=_lanes(32), c=_lanes(32))
def test_lop3_is_its_table(evaluate, table, a, b, c):
    def expected(x, y, z):
        row = [((x >> i & 1) << 2) | ((y >> i & 1) << 1) | (z >> i & 1) for i in range(32)]
        return sum((table >> row[i] & 1) << i for i in range(32))

    _check(evaluate, f"lop3.b32 %r9,%r0,%r1,%r2,{table};", expected, a, b, c)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shl.b32 %r9,%r0,%r1;", lambda a, s: a << s if s < 32 else 0),
        ("shr.u32 %r9,%r0,%r1;", lambda a, s: a >> s if s < 32 else 0),
        ("shr.s32 %r9,%r0,%r1;", lambda a, s: _signed(a) >> min(s, 31)),
        ("shf.r.clamp.b32 %r9,%r0,%r0,%r1;", lambda a, s: (a << 32 | a) >> min(s, 32)),
        ("bfe.u32 %r9,%r0,%r1,7;", lambda a, s: _extract(a, s, 7, 32, False)),
        ("bfe.s32 %r9,%r0,%r1,7;", lambda a, s: _extract(a, s, 7, 32, True)),
        ("bfe.s32 %r9,%r0,3,%r1;", lambda a, s: _extract(a, 3, s, 32, True)),
        ("bfe.u32 %r9,%r0,0,%r1;", lambda a, s: _extract(a, 0, s, 32, False)),
        ("bfi.b32 %r9,%r0,%r1,%r1,5;", lambda a, s: _insert(a, s, s, 5)),
        ("bfi.b32 %r9,%r1,%r0,4,%r1;", lambda a, s: _insert(s, a, 4, s)),
    ],
)
@settings(max_examples=8, deadline=None)
@given(a=_lanes(32), s=_lanes(32, 70))
def test_amounts_beyond_the_width(evaluate, body, expected, a, s):
    _check(evaluate, body, expected, a, s)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shl.b64 %d9,%d0,%r1;", lambda a, s: a << s if s < 64 else 0),
        ("shr.s64 %d9,%d0,%r1;", lambda a, s: _signed(a, 64) >> min(s, 63)),
        ("bfe.u64 %d9,%d0,%r1,9;", lambda a, s: _extract(a, s, 9, 64, False)),
        ("bfe.s64 %d9,%d0,5,%r1;", lambda a, s: _extract(a, 5, s, 64, True)),
    ],
)
@settings(max_examples=8, deadline=None)
@given(a=_lanes(64), s=_lanes(32, 70))
def test_64_bits(evaluate, body, expected, a, s):
    _check(evaluate, body, expected, a, s, bits=64)
