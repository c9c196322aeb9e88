from __future__ import annotations

import numpy as np
import pytest

from ladder_kernels.audit.ptx import MemoryAccessError, Schedule, execute

_SHARED = ".extern .shared .align 16 .b8 memory[];"
_START = "ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1]; "
_EACH = _START + "mad.wide.u32 %a2, %t, 4, %a0; mad.wide.u32 %a3, %t, 4, %a1; "


def _run(piece, body, *arrays, warps=1, shared=0, **options):
    kernel = piece(body, len(arrays), _SHARED)
    named = dict(zip(("source", "target"), arrays, strict=False))
    return execute(kernel, named, (1,), warps=warps, shared_bytes=shared, **options)


def test_vectors(piece):
    source, target = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = _START + (
        "mad.wide.u32 %a2, %t, 16, %a0; mad.wide.u32 %a3, %t, 16, %a1; "
        "ld.global.L1::evict_last.v4.b32 {%r1,%r2,%r3,%r4}, [%a2]; "
        "st.global.v4.b32 [%a3], {%r4,%r3,%r2,%r1};"
    )
    _run(piece, body, source, target)
    assert np.array_equal(target.reshape(32, 4), source.reshape(32, 4)[:, ::-1])


def test_bytes_and_signs(piece):
    source, target = np.arange(224, 256, dtype=np.uint8), np.zeros(32, np.int32)
    body = _START + (
        "cvt.u64.u32 %d1, %t; add.s64 %a2, %a0, %d1; mad.wide.u32 %a3, %t, 4, %a1; "
        "ld.global.s8 %r1, [%a2]; st.global.b32 [%a3], %r1;"
    )
    _run(piece, body, source, target)
    assert np.array_equal(target, source.view(np.int8))


@pytest.mark.parametrize("opcode", ["ld", "st"])
def test_out_of_bounds_names_argument_and_byte(piece, opcode):
    source, target = np.zeros(20, np.uint32), np.zeros(32, np.uint32)
    access = "ld.global.b32 %r1, [%a2];" if opcode == "ld" else "st.global.b32 [%a2], %r1;"
    with pytest.raises(MemoryAccessError, match=r"out-of-bounds global") as caught:
        _run(piece, _EACH + access, source, target)
    error = caught.value
    assert (error.argument, error.offset) == ("source", 80)
    assert error.instruction == access.rstrip(";")
    text = str(error)
    assert "argument 'source', byte 80 of 80" in text
    assert "12 thread(s), first thread 20 of block (0, 0, 0)" in text
    assert ("read" if opcode == "ld" else "write") in text
    assert not source.any()


def test_below_an_argument(piece):
    source, target = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(MemoryAccessError) as caught:
        _run(piece, _EACH + "ld.global.b32 %r1, [%a3+-4];", source, target)
    assert (caught.value.argument, caught.value.offset) == ("target", -4)


@pytest.mark.parametrize(
    ("size", "vector", "registers"),
    [
        (63, ".v2", "{%r1,%r2}"),
        (125, ".v4", "{%r1,%r2,%r3,%r4}"),
        (126, ".v4", "{%r1,%r2,%r3,%r4}"),
    ],
)
def test_part_of_a_vector_out_of_bounds(piece, size, vector, registers):
    source, target = np.zeros(size, np.uint32), np.zeros(1, np.uint32)
    step = 8 if vector == ".v2" else 16
    body = _START + (
        f"mad.wide.u32 %a2, %t, {step}, %a0; ld.global{vector}.b32 {registers}, [%a2];"
    )
    with pytest.raises(MemoryAccessError, match="1 thread"):
        _run(piece, body, source, target)


def test_only_the_threads_of_a_mask_load_and_store(piece):
    source, target = np.arange(1, 33, dtype=np.uint32), np.zeros(32, np.uint32)
    body = _EACH + (
        "mov.u32 %r1, 99; setp.ge.u32 %p1, %t, 8; @%p1 ld.global.b32 %r1, [%a2]; "
        "setp.lt.u32 %p1, %t, 30; @%p1 st.global.b32 [%a3], %r1;"
    )
    _run(piece, body, source, target)
    assert target.tolist() == [99] * 8 + list(range(9, 31)) + [0, 0]


def test_misaligned(piece):
    source, target = np.zeros(64, np.uint32), np.zeros(1, np.uint32)
    with pytest.raises(MemoryAccessError, match="misaligned global read of 8 bytes") as caught:
        _run(piece, _EACH + "ld.global.v2.b32 {%r1,%r2}, [%a2];", source, target)
    assert (caught.value.argument, caught.value.offset) == ("source", 4)


def test_a_null_pointer_is_near_no_argument(piece):
    with pytest.raises(MemoryAccessError, match="near no argument") as caught:
        _run(piece, "mov.b64 %a0, 64; ld.global.b32 %r1, [%a0];", np.zeros(4), np.zeros(4))
    assert caught.value.argument is None


@pytest.mark.parametrize("address", [0, 4 + 4 * 32])
def test_shared_memory_has_bounds(piece, address):
    # Its own addresses do not begin at zero, where a null pointer would point.
    body = f"mov.b32 %r8, memory; mad.lo.u32 %r9, %t, 4, %r8; st.shared.b32 [%r9+{address}], %t;"
    if address == 0:
        _run(piece, body, shared=128)
        body = "mov.b32 %r9, 0; st.shared.b32 [%r9], %t;"
    with pytest.raises(MemoryAccessError, match="out-of-bounds shared write"):
        _run(piece, body, shared=128)


def test_shared_memory_starts_as_garbage(piece):
    target = np.zeros(32, np.float32)
    body = (
        "ld.param.b64 %a1, [p0]; mad.wide.u32 %a3, %t, 4, %a1; mov.b32 %r8, memory; "
        "mad.lo.u32 %r9, %t, 4, %r8; ld.shared.b32 %r1, [%r9]; st.global.b32 [%a3], %r1;"
    )
    _run(piece, body, target, shared=128)
    assert np.isnan(target).all()


@pytest.mark.parametrize(
    ("form", "expected"),
    [("add.u32", 32), ("max.s32", 32), ("exch.b32", 32), ("or.b32", 63), ("inc.u32", 4)],
)
def test_atomics_on_one_word(piece, form, expected):
    word, found = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    value = {"add.u32": "1", "inc.u32": "6"}.get(form, "%r1")
    body = _START + (
        "add.s32 %r1, %t, 1; mad.wide.u32 %a3, %t, 4, %a1; "
        f"atom.global.{form} %r2, [%a0], {value}; st.global.b32 [%a3], %r2;"
    )
    _run(piece, body, word, found)
    assert word[0] == expected
    if form == "add.u32":
        assert found.tolist() == list(range(32))


def test_compare_and_swap_lets_one_thread_through(piece):
    word, found = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    body = _START + (
        "add.s32 %r1, %t, 1; mad.wide.u32 %a3, %t, 4, %a1; "
        "atom.global.cas.b32 %r2, [%a0], 0, %r1; st.global.b32 [%a3], %r2;"
    )
    _run(piece, body, word, found)
    assert word[0] == 1
    assert found.tolist() == [0] + [1] * 31


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(lockstep=False, reverse=True)])
def test_atomics_of_packed_halves(piece, schedule):
    word = np.zeros(2, np.float16)
    body = "ld.param.b64 %a0, [p0]; mov.b32 %r1, 0x40003C00; red.global.add.noftz.f16x2 [%a0], %r1;"
    _run(piece, body, word, warps=2, schedule=schedule)
    assert word.tolist() == [64, 128]


def test_atomics_of_vectors(piece):
    words = np.zeros(2, np.float32)
    body = (
        "ld.param.b64 %a0, [p0]; mov.b32 %r1, 0f3F800000; mov.b32 %r2, 0f40000000; "
        "atom.global.add.v2.f32 {%r3,%r4}, [%a0], {%r1,%r2};"
    )
    _run(piece, body, words)
    assert words.tolist() == [32, 64]


def test_atomics_in_shared_memory_are_each_blocks_own(piece):
    totals = np.zeros(5, np.uint32)
    body = """
        ld.param.b64 %a0, [p0]; mov.u32 %r5, %ctaid.x; mad.wide.u32 %a0, %r5, 4, %a0;
        mov.b32 %r8, memory; st.shared.b32 [%r8], 0; bar.sync 0;
        atom.shared.add.u32 %r1, [%r8], %r5; bar.sync 0;
        ld.shared.b32 %r2, [%r8]; st.global.b32 [%a0], %r2;
    """
    kernel = piece(body, 1, _SHARED)
    execute(kernel, [totals], (5,), warps=2, shared_bytes=16)
    assert totals.tolist() == [64 * block for block in range(5)]


def test_local_memory_is_each_threads_own(piece):
    target = np.zeros(32, np.uint32)
    body = """
        .local .align 4 .b8 stack[16];
        ld.param.b64 %a0, [p0]; mad.wide.u32 %a0, %t, 4, %a0;
        mov.b32 %r8, stack; st.local.b32 [%r8+4], %t; ld.local.b32 %r1, [%r8+4];
        st.global.b32 [%a0], %r1;
    """
    _run(piece, body, target)
    assert np.array_equal(target, np.arange(32))
    with pytest.raises(MemoryAccessError, match="out-of-bounds local"):
        _run(piece, body.replace("[%r8+4], %t", "[%r8+16], %t"), target)


def test_data_of_the_module(piece):
    target = np.zeros(32, np.uint32)
    kernel = piece(
        "ld.param.b64 %a0, [p0]; mad.wide.u32 %a0, %t, 4, %a0; mov.b64 %a1, table; "
        "ld.global.b32 %r1, [%a1+4]; st.global.b32 [%a0], %r1;",
        1,
        ".global .align 4 .b32 table[2] = {5, -6};",
    )
    execute(kernel, [target], (1,), warps=1, shared_bytes=0)
    assert (target.view(np.int32) == -6).all()
