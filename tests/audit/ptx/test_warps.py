from __future__ import annotations

import numpy as np
import pytest

from ladder_kernels.audit.ptx import PTXError

_LANES = np.arange(32, dtype=np.uint32)
_VALUES = np.random.default_rng(0).integers(0, 2**32, 32).astype(np.uint32)


@pytest.mark.parametrize(
    ("form", "source"),
    [
        ("bfly.b32 %r9,%r0,5,31", _LANES ^ 5),
        ("idx.b32 %r9,%r0,7,31", np.full(32, 7)),
        ("down.b32 %r9,%r0,4,31", np.where(_LANES + 4 < 32, _LANES + 4, _LANES)),
        ("up.b32 %r9,%r0,4,0", np.where(_LANES >= 4, _LANES - 4, _LANES)),
        # Segments of eight lanes: the mask's bits 8 to 12 hold the bits that stay.
        ("idx.b32 %r9,%r0,2,6175", (_LANES & 24) + 2),
        ("bfly.b32 %r9,%r0,1,6175", _LANES ^ 1),
    ],
)
def test_shuffles(evaluate, form, source):
    opcode, operands = form.split(" ", 1)
    found = evaluate(f"shfl.sync.{opcode} {operands},-1;", _VALUES)
    assert np.array_equal(found, _VALUES[source])


def test_shuffle_says_who_read_outside(evaluate):
    body = "shfl.sync.down.b32 %r8|%p1,%r0,4,31,-1; selp.b32 %r9,1,0,%p1;"
    assert np.array_equal(evaluate(body, _VALUES), (_LANES < 28).astype(np.uint32))


def test_shuffle_from_a_thread_that_is_elsewhere(evaluate):
    with pytest.raises(PTXError, match="does not take part"):
        evaluate("setp.lt.u32 %p1,%t,8; @%p1 shfl.sync.bfly.b32 %r9,%r0,16,31,-1;", _VALUES)


@pytest.mark.parametrize(
    ("mode", "limit", "expected"),
    [("any", 1, 1), ("all", 32, 1), ("all", 31, 0), ("any", 0, 0), ("uni", 0, 1), ("uni", 5, 0)],
)
def test_votes(evaluate, mode, limit, expected):
    body = f"setp.lt.u32 %p1,%t,{limit}; vote.sync.{mode}.pred %p2,%p1,-1; selp.b32 %r9,1,0,%p2;"
    assert (evaluate(body) == expected).all()


def test_threads_that_do_not_take_part_have_no_vote(evaluate):
    body = (
        "setp.lt.u32 %p1,%t,8; setp.lt.u32 %p2,%t,4; mov.u32 %r9,7; "
        "@%p1 vote.sync.{mode}.pred %p3,{vote},255; @%p1 selp.b32 %r9,1,0,%p3;"
    )
    every = evaluate(body.format(mode="all", vote="%p1"))
    assert every.tolist() == [1] * 8 + [7] * 24
    some = evaluate(body.format(mode="all", vote="%p2"))
    assert some.tolist() == [0] * 8 + [7] * 24


def test_ballot_and_active_mask(evaluate):
    ballot = "setp.lt.u32 %p1,%t,5; vote.sync.ballot.b32 %r9,%p1,-1;"
    assert (evaluate(ballot) == 31).all()
    mask = "setp.lt.u32 %p1,%t,5; mov.u32 %r9,0; @%p1 activemask.b32 %r9;"
    assert np.array_equal(evaluate(mask), np.where(_LANES < 5, 31, 0))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("add.s32", int(_VALUES.sum(dtype=np.uint64)) & 0xFFFFFFFF),
        ("min.u32", int(_VALUES.min())),
        ("max.s32", int(_VALUES.view(np.int32).max()) & 0xFFFFFFFF),
        ("xor.b32", int(np.bitwise_xor.reduce(_VALUES))),
    ],
)
def test_reductions(evaluate, form, expected):
    assert (evaluate(f"redux.sync.{form} %r9,%r0,-1;", _VALUES) == expected).all()


def test_reduction_by_part_of_a_warp(evaluate):
    with pytest.raises(PTXError, match="part of a warp"):
        evaluate("setp.lt.u32 %p1,%t,8; @%p1 redux.sync.add.s32 %r9,%r0,-1;", _VALUES)


def test_match(evaluate):
    values = (_LANES % 3).astype(np.uint32)
    found = evaluate("match.any.sync.b32 %r9,%r0,-1;", values)
    for lane in range(32):
        assert found[lane] == sum(1 << other for other in range(32) if other % 3 == lane % 3)
    whole = "match.all.sync.b32 %r9|%p1,%r0,-1;"
    assert (evaluate(whole, values) == 0).all()
    assert (evaluate(whole, values * 0) == 0xFFFFFFFF).all()


def test_one_is_elected(evaluate):
    assert evaluate("elect.sync %r8|%p1,-1; selp.b32 %r9,1,0,%p1;").sum() == 1
