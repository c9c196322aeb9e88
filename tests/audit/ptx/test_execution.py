from __future__ import annotations

import numpy as np
import pytest

from ladder_kernels.audit.ptx import BarrierError, PTXError, Schedule, execute

_SHARED = ".extern .shared .align 16 .b8 memory[];"
_EVERY = [
    Schedule(lockstep=lockstep, reverse=reverse)
    for lockstep in (True, False)
    for reverse in (False, True)
]
_PLACE = """
    ld.param.b64 %a0, [p0];
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %t;
    mad.wide.u32 %a0, %r3, 4, %a0;
"""


@pytest.mark.parametrize("schedule", _EVERY)
def test_threads_that_part_meet_again(piece, schedule):
    body = (
        _PLACE
        + """
        mov.u32 %r5, 0; mov.u32 %r9, 0; rem.u32 %r4, %r3, 9;
        $L1: setp.ge.u32 %p1, %r5, %r4; @%p1 bra $L2;
        add.s32 %r9, %r9, 3; add.s32 %r5, %r5, 1; bra.uni $L1;
        $L2: add.s32 %r9, %r9, 1; bar.sync 0; st.global.b32 [%a0], %r9;
    """
    )
    found = np.zeros(3 * 64, np.uint32)
    execute(piece(body, 1), [found], (3,), warps=2, shared_bytes=0, schedule=schedule)
    assert np.array_equal(found, 3 * (np.arange(192) % 9) + 1)


@pytest.mark.parametrize("schedule", _EVERY)
def test_every_block_of_a_grid(piece, schedule):
    body = """
        ld.param.b64 %a0, [p0]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
        mad.lo.u32 %r6, %r3, %r5, %r2; mad.lo.u32 %r6, %r6, %r4, %r1;
        mad.wide.u32 %a0, %r6, 4, %a0; atom.global.add.u32 %r8, [%a0], 1;
    """
    found = np.zeros(3 * 4 * 5, np.uint32)
    executed = execute(
        piece(body, 1), [found], (5, 4, 3), warps=2, shared_bytes=0, schedule=schedule
    )
    assert (found == 64).all()
    assert executed == 60 * 2 * 12


def test_a_grid_of_nothing(piece):
    found = np.zeros(64, np.uint32)
    kernel = piece(_PLACE + "st.global.b32 [%a0], 1;", 1)
    assert execute(kernel, [found], (0, 3), warps=2, shared_bytes=0) == 0
    assert not found.any()


_EXCHANGE = (
    _PLACE
    + """
    mov.b32 %r8, memory; mad.lo.u32 %r9, %t, 4, %r8; st.shared.b32 [%r9], %t;
    {barrier}
    xor.b32 %r7, %t, 63; mad.lo.u32 %r7, %r7, 4, %r8; ld.shared.b32 %r6, [%r7];
    st.global.b32 [%a0], %r6;
"""
)


@pytest.mark.parametrize("schedule", _EVERY)
@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_missing_barrier_shows_unless_in_lockstep(piece, schedule, barrier):
    found = np.zeros(64, np.uint32)
    kernel = piece(_EXCHANGE.format(barrier=barrier), 1, _SHARED)
    execute(kernel, [found], (1,), warps=2, shared_bytes=256, schedule=schedule)
    right = np.array_equal(found, np.arange(64) ^ 63)
    assert right == (bool(barrier) or schedule.lockstep)


@pytest.mark.parametrize("schedule", _EVERY)
@pytest.mark.parametrize("threads", [40, 32])
def test_a_barrier_for_part_of_the_threads(piece, schedule, threads):
    body = f"setp.lt.u32 %p1, %t, {threads}; @!%p1 bra $L1; bar.sync 0; $L1: mov.u32 %r1, 0;"
    with pytest.raises(BarrierError, match=r"bar\.sync 0"):
        execute(piece(body, 0), [], (1,), warps=2, shared_bytes=0, schedule=schedule)


@pytest.mark.parametrize("schedule", _EVERY)
def test_a_barrier_after_part_of_the_threads_returned(piece, schedule):
    body = "setp.lt.u32 %p1, %t, 32; @%p1 ret; bar.sync 0;"
    with pytest.raises(BarrierError):
        execute(piece(body, 0), [], (1,), warps=2, shared_bytes=0, schedule=schedule)


@pytest.mark.parametrize("schedule", _EVERY)
def test_blocks_may_return_early_and_take_different_ways(piece, schedule):
    # Blocks that run together do not wait for each other.
    body = (
        _PLACE
        + """
        setp.eq.u32 %p1, %r1, 2; @%p1 ret;
        mov.u32 %r9, 0;
        $L1: add.s32 %r9, %r9, 1; bar.sync 0; setp.lt.u32 %p2, %r9, %r1; @%p2 bra $L1;
        st.global.b32 [%a0], %r9;
    """
    )
    found = np.zeros((5, 64), np.uint32)
    execute(piece(body, 1), [found], (5,), warps=2, shared_bytes=0, schedule=schedule)
    assert np.array_equal(found, np.repeat([1, 1, 0, 3, 4], 64).reshape(5, 64))


def test_warps_at_different_barriers(piece):
    body = """
        setp.lt.u32 %p1, %t, 32; @%p1 bra $L1; bar.sync 0; bra.uni $L2;
        $L1: bar.sync 0; $L2: mov.u32 %r1, 0;
    """
    with pytest.raises(BarrierError, match="waits at another"):
        execute(
            piece(body, 0), [], (1,), warps=2, shared_bytes=0, schedule=Schedule(lockstep=False)
        )


def test_a_step_may_change_its_own_guard(piece):
    body = _PLACE + (
        "setp.lt.u32 %p1, %t, 16; @%p1 setp.lt.u32 %p1, %t, 8; selp.b32 %r9, 1, 0, %p1; "
        "st.global.b32 [%a0], %r9;"
    )
    found = np.zeros(32, np.uint32)
    execute(piece(body, 1), [found], (1,), warps=1, shared_bytes=0)
    assert np.array_equal(found, np.arange(32) < 8)


def test_a_step_with_two_results_may_change_its_own_guard(piece):
    body = _PLACE + (
        "setp.lt.u32 %p1, %t, 16; setp.lt.u32 %p2, %t, 0; @%p1 setp.lt.u32 %p1|%p2, %t, 8; "
        "selp.b32 %r9, 1, 0, %p2; st.global.b32 [%a0], %r9;"
    )
    found = np.zeros(32, np.uint32)
    execute(piece(body, 1), [found], (1,), warps=1, shared_bytes=0)
    assert np.array_equal(found, (np.arange(32) >= 8) & (np.arange(32) < 16))


@pytest.mark.parametrize("schedule", _EVERY)
def test_the_order_of_blocks_and_warps(piece, schedule):
    # All write to one place: who comes last stays.
    body = """
        ld.param.b64 %a0, [p0]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %warpid;
        mad.lo.u32 %r3, %r1, 10, %r2; st.global.b32 [%a0], %r3;
    """
    found = np.full(1, 99, np.uint32)
    execute(piece(body, 1), [found], (3,), warps=2, shared_bytes=0, schedule=schedule)
    block, warp = divmod(int(found[0]), 10)
    assert block == (0 if schedule.reverse else 2)
    assert warp == (0 if schedule.reverse and not schedule.lockstep else 1)


def test_a_trap(piece):
    with pytest.raises(PTXError, match="trapped"):
        execute(piece("trap;", 0), [], (1,), warps=1, shared_bytes=0)


@pytest.mark.parametrize("grid", [(), (1, 1, 1, 1), (-1,)])
def test_grids_that_are_none(piece, grid):
    with pytest.raises(PTXError, match="a grid is"):
        execute(piece("", 0), [], grid, warps=1, shared_bytes=0)
