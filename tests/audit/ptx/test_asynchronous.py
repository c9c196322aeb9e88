from __future__ import annotations

import numpy as np
import pytest

from ladder_kernels.audit.ptx import (
    MemoryAccessError,
    Schedule,
    UnsupportedInstructionError,
    execute,
)

_SHARED = ".extern .shared .align 16 .b8 memory[];"
_ADDRESSES = """
    ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1];
    mad.wide.u32 %a2, %t, 16, %a0; mad.wide.u32 %a3, %t, 16, %a1;
    mov.b32 %r8, memory; mad.lo.u32 %r9, %t, 16, %r8;
"""
_RETURN = "ld.shared.v4.b32 {%r1,%r2,%r3,%r4}, [%r9]; st.global.v4.b32 [%a3], {%r1,%r2,%r3,%r4};"


def _copy(piece, body, *, size=128, **options):
    source = np.arange(1, size + 1, dtype=np.float32)
    target = np.zeros(128, np.float32)
    kernel = piece(_ADDRESSES + body + _RETURN, 2, _SHARED)
    execute(
        kernel,
        {"source": source, "target": target},
        (1,),
        warps=1,
        shared_bytes=1024,
        schedule=Schedule(**options),
    )
    return source, target


_BEGIN = "cp.async.cg.shared.global [%r9], [%a2], 16;"


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    "wait", ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"]
)
def test_copies_have_landed_after_the_wait(piece, late, wait):
    source, target = _copy(piece, _BEGIN + wait, late_copies=late)
    assert np.array_equal(source, target)


@pytest.mark.parametrize(
    "wait", ["", "cp.async.commit_group;", "cp.async.commit_group; cp.async.wait_group 1;"]
)
def test_a_copy_that_nothing_waits_for_has_not_landed(piece, wait):
    source, target = _copy(piece, _BEGIN + wait)
    assert np.isnan(target).all()
    source, target = _copy(piece, _BEGIN + wait, late_copies=False)
    assert np.array_equal(source, target)


def test_what_a_copy_will_overwrite_is_lost_at_once(piece):
    zero = "mov.b32 %r1, 0; st.shared.v4.b32 [%r9], {%r1,%r1,%r1,%r1};"
    _, target = _copy(piece, zero + _BEGIN)
    assert np.isnan(target).all()


def test_a_thread_waits_for_its_own_copies_alone(piece):
    body = _BEGIN + "setp.lt.u32 %p1, %t, 16; @%p1 cp.async.wait_all;"
    source, target = (array.reshape(32, 4) for array in _copy(piece, body))
    assert np.array_equal(target[:16], source[:16])
    assert np.isnan(target[16:]).all()
    # Every thread has closed its group, and half of them wait for it.
    body = _BEGIN + "cp.async.commit_group; setp.lt.u32 %p1, %t, 16; @%p1 cp.async.wait_group 0;"
    source, target = (array.reshape(32, 4) for array in _copy(piece, body))
    assert np.array_equal(target[:16], source[:16])
    assert np.isnan(target[16:]).all()


def test_only_the_older_groups_have_landed(piece):
    body = (
        "cp.async.ca.shared.global [%r9], [%a2], 8; cp.async.commit_group; "
        "cp.async.ca.shared.global [%r9+8], [%a2+8], 8; cp.async.commit_group; "
        "cp.async.wait_group 1;"
    )
    source, target = (array.reshape(32, 4) for array in _copy(piece, body))
    assert np.array_equal(target[:, :2], source[:, :2])
    assert np.isnan(target[:, 2:]).all()


def test_threads_have_groups_of_their_own(piece):
    # Half of the threads close two groups, so that they wait for less.
    body = _BEGIN + (
        "cp.async.commit_group; setp.lt.u32 %p1, %t, 16; @%p1 cp.async.commit_group; "
        "cp.async.wait_group 1;"
    )
    source, target = (array.reshape(32, 4) for array in _copy(piece, body))
    assert np.array_equal(target[:16], source[:16])
    assert np.isnan(target[16:]).all()


def test_what_is_not_wanted_is_zero_and_not_read(piece):
    body = (
        "setp.lt.u32 %p1, %t, 24; selp.b32 %r5, 16, 0, %p1; "
        "cp.async.cg.shared.global [%r9], [%a2], 16, %r5; cp.async.wait_all;"
    )
    source, target = _copy(piece, body, size=96)
    assert np.array_equal(target[:96], source)
    assert not target[96:].any()


def test_partial_copies(piece):
    body = "cp.async.ca.shared.global [%r9], [%a2], 8, 4; cp.async.wait_all;"
    source, target = (array.reshape(32, 4) for array in _copy(piece, body))
    assert np.array_equal(target[:, 0], source[:, 0])
    assert not target[:, 1].any()


def test_bounds(piece):
    with pytest.raises(MemoryAccessError, match=r"cp\.async read") as caught:
        _copy(piece, _BEGIN, size=96)
    assert (caught.value.argument, caught.value.offset) == ("source", 384)
    with pytest.raises(MemoryAccessError, match=r"shared cp\.async write"):
        _copy(piece, "cp.async.cg.shared.global [%r9+1024], [%a2], 16;")


def test_other_copies_are_refused(piece):
    with pytest.raises(UnsupportedInstructionError, match="bulk"):
        _copy(piece, "cp.async.bulk.commit_group;")
