from __future__ import annotations

import numpy as np
import pytest

from ladder_kernels.audit.ptx import Counters, execute

_SHARED = ".extern .shared .align 16 .b8 memory[];"


def _global_access(piece, step: int, width: int, *, store: bool = False, shift: int = 0):
    """Counters of one access of ``width`` bytes by each thread, ``step`` bytes apart."""
    registers = {4: "%r1", 8: "{%r1,%r2}", 16: "{%r1,%r2,%r3,%r4}"}[width]
    vector = {4: "", 8: ".v2", 16: ".v4"}[width]
    access = f"st.global{vector}.b32 [%a0+{shift}], {registers};"
    if not store:
        access = f"ld.global{vector}.b32 {registers}, [%a0+{shift}];"
    body = f"ld.param.b64 %a0, [p0]; mad.wide.u32 %a0, %t, {step}, %a0; {access}"
    counters = Counters()
    data = np.zeros(32 * 32 + 32, np.uint32)
    execute(piece(body, 1), [data], (1,), warps=1, shared_bytes=0, counters=counters)
    return counters


@pytest.mark.parametrize(
    ("step", "width", "shift", "sectors", "ideal", "nbytes"),
    [
        (4, 4, 0, 4, 4, 128),  # neighbours: 128 bytes in 4 sectors
        (4, 4, 4, 5, 4, 128),  # the same, across a sector's edge
        (32, 4, 0, 32, 4, 128),  # a sector for each thread
        (8, 4, 0, 8, 4, 128),  # every second word
        (0, 4, 0, 1, 1, 4),  # one word for all
        (16, 16, 0, 16, 16, 512),
        (128, 8, 0, 32, 8, 256),
    ],
)
@pytest.mark.parametrize("store", [False, True])
def test_sectors(piece, step, width, shift, sectors, ideal, nbytes, store):
    counters = _global_access(piece, step, width, store=store, shift=shift)
    traffic, other = counters.loads, counters.stores
    if store:
        traffic, other = other, traffic
    assert (traffic.requests, traffic.sectors, traffic.ideal_sectors) == (1, sectors, ideal)
    assert (traffic.bytes, traffic.bytes_moved) == (nbytes, 32 * sectors)
    assert traffic.coalescing == ideal / sectors
    assert other.requests == 0
    of_arguments = counters.stores_of if store else counters.loads_of
    assert of_arguments == {"p0": traffic}
    assert counters.shared.requests == 0


def test_threads_that_do_not_take_part_ask_for_nothing(piece):
    body = (
        "ld.param.b64 %a0, [p0]; mad.wide.u32 %a0, %t, 4, %a0; "
        "setp.lt.u32 %p1, %t, 8; @%p1 ld.global.b32 %r1, [%a0]; "
        "setp.lt.u32 %p1, %t, 0; @%p1 ld.global.b32 %r1, [%a0];"
    )
    counters = Counters()
    data = np.zeros(32, np.uint32)
    execute(piece(body, 1), [data], (1,), warps=1, shared_bytes=0, counters=counters)
    assert (counters.loads.requests, counters.loads.sectors, counters.loads.bytes) == (1, 1, 32)
    assert counters.instructions["global"] == 2


@pytest.mark.parametrize(
    ("step", "width", "wavefronts", "conflicts"),
    [
        (4, 4, 1, 0),  # one bank a thread
        (8, 4, 2, 1),  # two threads a bank
        (128, 4, 32, 31),  # all threads in one bank
        (0, 4, 1, 0),  # all threads at one word
        (132, 4, 1, 0),  # rows padded by one word
        (8, 8, 2, 0),  # 256 bytes need two passes
        (16, 16, 4, 0),
        (32, 16, 8, 4),
    ],
)
@pytest.mark.parametrize("opcode", ["ld", "st"])
def test_bank_conflicts(piece, step, width, wavefronts, conflicts, opcode):
    registers = {4: "%r1", 8: "{%r1,%r2}", 16: "{%r1,%r2,%r3,%r4}"}[width]
    vector = {4: "", 8: ".v2", 16: ".v4"}[width]
    operands = f"{registers}, [%r9]" if opcode == "ld" else f"[%r9], {registers}"
    body = (
        f"mov.b32 %r8, memory; mad.lo.u32 %r9, %t, {step}, %r8; "
        f"{opcode}.shared{vector}.b32 {operands};"
    )
    counters = Counters()
    kernel = piece(body, 0, _SHARED)
    execute(kernel, [], (1,), warps=1, shared_bytes=8192, counters=counters)
    shared = counters.shared
    assert (shared.requests, shared.wavefronts, shared.conflicts) == (1, wavefronts, conflicts)
    assert shared.slowdown == wavefronts / (wavefronts - conflicts)


@pytest.mark.parametrize(
    ("row", "wavefronts", "conflicts"), [(16, 4, 0), (128, 32, 28), (144, 4, 0)]
)
def test_bank_conflicts_of_matrix_loads(piece, row, wavefronts, conflicts):
    body = (
        f"mov.b32 %r8, memory; mad.lo.u32 %r9, %t, {row}, %r8; "
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1,%r2,%r3,%r4}, [%r9];"
    )
    counters = Counters()
    kernel = piece(body, 0, _SHARED)
    execute(kernel, [], (1,), warps=1, shared_bytes=8192, counters=counters)
    shared = counters.shared
    assert (shared.requests, shared.wavefronts, shared.conflicts) == (1, wavefronts, conflicts)


def test_instructions_by_category(piece):
    body = """
        mov.u32 %r0, 1;
        add.s32 %r1, %r0, %r0;
        cvt.rn.f32.s32 %r2, %r1;
        mul.f32 %r3, %r2, %r2;
        setp.gt.f32 %p1, %r3, 0f00000000;
        @%p1 bra $L1;
        add.s32 %r1, %r1, 1;
        $L1: bar.sync 0;
    """
    counters = Counters()
    kernel = piece(body, 0)
    executed = execute(kernel, [], (3, 2), warps=4, shared_bytes=0, counters=counters)
    warps = 3 * 2 * 4
    # The kernel begins with one more mov and ends with ret.
    expected = {"other": 2, "integer": 1, "convert": 1, "float": 2, "control": 3}
    for category, count in counters.instructions.items():
        assert count == warps * expected.get(category, 0), category
    assert counters.total == executed == 9 * warps


def test_accesses_count_for_the_argument_whose_memory_they_touch(piece):
    body = (
        "ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1]; mad.wide.u32 %a0, %t, 4, %a0; "
        "mad.wide.u32 %a2, %t, 32, %a1; ld.global.b32 %r1, [%a0]; ld.global.b32 %r2, [%a2]; "
        "st.global.b32 [%a0], %r2;"
    )
    counters = Counters()
    arrays = {"near": np.zeros(32, np.uint32), "far": np.zeros(32 * 8, np.uint32)}
    execute(piece(body, 2), arrays, (1,), warps=1, shared_bytes=0, counters=counters)
    assert {name: each.sectors for name, each in counters.loads_of.items()} == {
        "near": 4,
        "far": 32,
    }
    assert {name: each.sectors for name, each in counters.stores_of.items()} == {"near": 4}
    assert (counters.loads.sectors, counters.stores.sectors) == (36, 4)


def test_launches_add_up(piece):
    first, second = _global_access(piece, 4, 4), _global_access(piece, 32, 4, store=True)
    total = Counters()
    for each in (first, second, second):
        total.add(each)
    assert (total.loads.sectors, total.stores.sectors) == (4, 2 * 32)
    assert total.total == first.total + 2 * second.total
    assert second.stores.sectors == 32


def test_nothing_counted_is_perfect():
    assert (Counters().loads.coalescing, Counters().shared.slowdown) == (1, 1)
