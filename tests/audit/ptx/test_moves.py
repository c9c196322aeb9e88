from __future__ import annotations

import numpy as np
import pytest

from ladder_kernels.audit.ptx import UnsupportedInstructionError

_A = np.random.default_rng(0).integers(0, 2**32, 32).astype(np.uint32)
_B = np.where(np.arange(32) % 4 == 0, _A, np.random.default_rng(1).integers(0, 2**32, 32)).astype(
    np.uint32
)


def test_vectors_are_taken_apart_and_put_together(evaluate):
    found = evaluate("mov.b32 {%h1,%h2},%r0; mov.b32 %r9,{%h2,%h1};", _A)
    assert np.array_equal(found, (_A >> 16) | (_A << 16))
    wide = _A.astype(np.uint64) << np.uint64(32) | _B
    found = evaluate("mov.b64 {_,%r1},%d0; mov.b64 %d9,{%r1,%r1};", wide, bits=64)
    assert np.array_equal(found >> np.uint64(32), _A)
    assert np.array_equal(found & np.uint64(0xFFFFFFFF), _A)


def test_a_source_may_be_a_destination(evaluate):
    found = evaluate("mov.b32 {%h0,%h1},%r0; mov.b32 %r0,{%h1,%h0}; mov.b32 %r9,%r0;", _A)
    assert np.array_equal(found, (_A >> 16) | (_A << 16))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("eq", np.equal),
        ("ne", np.not_equal),
        ("lt", np.less),
        ("le", np.less_equal),
        ("gt", np.greater),
        ("ge", np.greater_equal),
    ],
)
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_integer_comparisons(evaluate, name, function, kind):
    body = f"setp.{name}.{kind} %p1,%r0,%r1; selp.b32 %r9,1,0,%p1;"
    a, b = (x.view(np.int32 if kind == "s32" else np.uint32) for x in (_A, _B))
    assert np.array_equal(evaluate(body, _A, _B), function(a, b))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("lt", lambda a, b: a < b),
        ("ltu", lambda a, b: ~(a >= b)),
        ("eq", lambda a, b: a == b),
        ("equ", lambda a, b: (a == b) | np.isnan(a + b)),
        ("ne", lambda a, b: (a < b) | (a > b)),
        ("neu", lambda a, b: a != b),
        ("num", lambda a, b: ~np.isnan(a + b)),
        ("nan", lambda a, b: np.isnan(a + b)),
    ],
)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_float_comparisons_and_nan(evaluate, name, function, kind):
    values = np.array([0, 1, -1, np.nan], np.float32)
    a, b = np.repeat(values, 8), np.tile(values, 8)
    if kind == "f32":
        raw, register = [x.view(np.uint32) for x in (a, b)], "%r"
    elif kind == "f16":
        raw, register = [x.astype(np.float16).view(np.uint16) for x in (a, b)], "%h"
    else:
        raw, register = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)], "%h"
    body = f"setp.{name}.{kind} %p1,{register}0,{register}1; selp.b32 %r9,1,0,%p1;"
    assert np.array_equal(evaluate(body, *raw), function(a, b))


def test_comparisons_combine_with_a_predicate_and_have_two_results(evaluate):
    body = (
        "setp.lt.u32 %p1,%t,16; setp.lt.and.u32 %p2|%p3,%r0,%r1,!%p1; "
        "selp.b32 %r8,1,0,%p2; selp.b32 %r9,2,%r8,%p3;"
    )
    late, less = np.arange(32) >= 16, _A < _B
    expected = np.where(~less & late, 2, np.where(less & late, 1, 0))
    assert np.array_equal(evaluate(body, _A, _B), expected)


def test_set(evaluate):
    halves = np.array([1, np.nan] * 16, np.float16).view(np.uint16)
    packed = (halves.astype(np.uint32) << np.uint32(16)) | halves[::-1]
    found = evaluate("set.nan.f16x2.f16x2 %r9,%r0,%r0;", packed).view(np.float16).reshape(32, 2)
    assert np.array_equal(found[:, 1], np.tile([0, 1], 16))
    assert np.array_equal(found[:, 0], np.tile([1, 0], 16))
    ones = evaluate("set.lt.u32.s32 %r9,%r0,%r1;", _A, _B)
    expected = np.where(_A.view(np.int32) < _B.view(np.int32), 0xFFFFFFFF, 0)
    assert np.array_equal(ones, expected)


def test_special_registers(evaluate):
    assert np.array_equal(evaluate("mov.u32 %r9,%laneid;"), np.arange(32))
    assert (evaluate("mov.u32 %r9,%ntid.x;") == 32).all()
    assert (evaluate("mov.u32 %r9,%nctaid.y;") == 1).all()
    with pytest.raises(UnsupportedInstructionError, match=r"%envreg3"):
        evaluate("mov.u32 %r9,%envreg3;")


def test_registers_start_as_garbage(evaluate):
    assert (evaluate("mov.u32 %r9,%r7;") != 0).all()


def test_generic_addresses_of_shared_memory_are_refused(evaluate):
    with pytest.raises(UnsupportedInstructionError, match="generic"):
        evaluate("cvta.shared.u64 %d1,%d1; mov.u32 %r9,0;")
