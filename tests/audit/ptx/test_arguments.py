from __future__ import annotations

import numpy as np
import pytest
import torch

from ladder_kernels.audit.ptx import Kernel, MemoryAccessError, PTXError, execute

_DOUBLE = """
    ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1];
    mad.wide.u32 %a2, %t, {step}, %a0; mad.wide.u32 %a3, %t, 4, %a1;
    ld.global.b32 %r1, [%a2]; add.f32 %r1, %r1, %r1; st.global.b32 [%a3], %r1;
"""


def _double(piece, source, target, step=4):
    kernel = piece(_DOUBLE.format(step=step), 2)
    execute(kernel, {"source": source, "target": target}, (1,), warps=1, shared_bytes=0)


def test_tensors_change_in_place(piece):
    source, target = torch.randn(32), torch.zeros(32)
    before = source.clone()
    _double(piece, source, target)
    assert torch.equal(target, 2 * before)
    assert torch.equal(source, before)


def test_views_of_one_storage(piece):
    whole = torch.randn(100)
    before = whole.clone()
    _double(piece, whole[4:36], whole[20:52])
    assert torch.equal(whole[20:52], 2 * before[4:36])
    assert torch.equal(whole[:20], before[:20])
    assert torch.equal(whole[52:], before[52:])


def test_the_gaps_of_a_strided_view_are_out_of_bounds(piece):
    whole = torch.randn(32, 2)
    target = torch.zeros(32)
    _double(piece, whole[:, 1], target, step=8)
    assert torch.equal(target, 2 * whole[:, 1])
    with pytest.raises(MemoryAccessError) as caught:
        _double(piece, whole[:, 1], target, step=4)
    assert (caught.value.argument, caught.value.offset) == ("source", 4)


def test_a_view_ends_where_it_ends_though_its_storage_goes_on(piece):
    whole = torch.randn(64)
    with pytest.raises(MemoryAccessError, match="argument 'source', byte 80 of 80"):
        _double(piece, whole[:20], torch.zeros(32))


def test_expanded_and_empty_tensors(piece):
    target = torch.zeros(32)
    _double(piece, torch.full((1,), 3.0).expand(32), target, step=0)
    assert (target == 6).all()
    with pytest.raises(MemoryAccessError, match="argument 'source', byte 0 of 0"):
        _double(piece, torch.zeros(0), target)


def test_read_only_arrays_may_be_read(piece):
    source, target = np.ones(32, np.float32), np.zeros(32, np.float32)
    source.flags.writeable = False
    _double(piece, source, target)
    assert (target == 2).all()
    with pytest.raises(MemoryAccessError, match="'target' is read-only"):
        _double(piece, target, source)


def test_addresses_are_aligned_as_the_storage_is(piece):
    place = np.zeros(32, np.uint64)
    kernel = piece(
        "ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1]; mad.wide.u32 %a2, %t, 8, %a1; "
        "st.global.b64 [%a2], %a0;",
        2,
    )
    whole = torch.zeros(1000)
    for first in (0, 1, 4, 130):
        execute(kernel, [whole[first:], place], (1,), warps=1, shared_bytes=0)
        assert place[0] % 512 == 4 * first % 512


def _scalars() -> Kernel:
    return Kernel.parse(
        """
        .visible .entry scalars(.param .u64 p0, .param .u32 p1, .param .f32 p2, .param .u64 p3,
                                .param .u64 p4)
        {
        .reg .b32 %r<4>; .reg .b64 %d<4>;
        ld.param.b64 %d0, [p0]; ld.param.b32 %r1, [p1]; ld.param.b32 %r2, [p2];
        ld.param.b64 %d1, [p3]; ld.param.b64 %d2, [p4];
        st.global.b32 [%d0], %r1; st.global.b32 [%d0+4], %r2; st.global.b64 [%d0+8], %d1;
        st.global.b64 [%d0+16], %d2;
        ret;
        }
        """
    )


def test_numbers_and_missing_pointers():
    target = np.full(6, 7, np.int32)
    execute(_scalars(), [target, -3, 1.5, 2**40], (1,), warps=1, shared_bytes=0)
    assert target[0] == -3
    assert target[1:2].view(np.float32)[0] == 1.5
    assert target[2:4].view(np.int64)[0] == 2**40
    assert target[4:].view(np.int64)[0] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-3], "takes 5 arguments, not 2"),
        ([1, 1.0, 1, 1, 1], "takes 5 arguments, not 6"),
        ([2**33, 1.0, 1], "32 bits do not hold"),
        (["text", 1.0, 1], "of type str"),
        ([np.zeros(2), 1.0, 1], "is an array"),
    ],
)
def test_arguments_that_do_not_fit(values, message):
    with pytest.raises(PTXError, match=message):
        execute(_scalars(), [np.zeros(6), *values], (1,), warps=1, shared_bytes=0)


def test_tensors_of_other_devices():
    with pytest.raises(PTXError, match="on device 'meta'"):
        execute(
            _scalars(), [torch.zeros(6, device="meta"), 1, 1.0, 1], (1,), warps=1, shared_bytes=0
        )
