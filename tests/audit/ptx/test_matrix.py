from __future__ import annotations

import numpy as np
import pytest
import torch

from ladder_kernels.audit.ptx import (
    MemoryAccessError,
    PTXError,
    UnsupportedInstructionError,
    execute,
)
from ladder_kernels.audit.ptx.types import FP8_VALUES

_SHARED = ".extern .shared .align 16 .b8 memory[];"
_WIDTHS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}


def _random(kind: str, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw bits of a random matrix, and its values as float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "f16":
        values = normal.half()
        return values.view(torch.int16).numpy().view(np.uint16), values.double().numpy()
    if kind == "bf16":
        values = normal.bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16), values.double().numpy()
    if kind == "tf32":
        raw = normal.numpy().view(np.uint32)
        # What the tensor core takes of it.
        return raw, (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    raw = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    if kind == "s8":
        return raw, raw.view(np.int8).astype(np.float64)
    if kind == "u8":
        return raw, raw.astype(np.float64)
    raw = np.where(np.isfinite(FP8_VALUES[kind][raw]), raw, 0).astype(np.uint8)
    return raw, FP8_VALUES[kind][raw].astype(np.float64)


def _a_place(lane: int, index: int, per: int) -> tuple[int, int]:
    """The row and column of a lane's element ``index`` of A, as the PTX manual lists them."""
    group, member = lane >> 2, lane & 3
    # Registers take turns: rows 0-7, rows 8-15, then the same for the second half of the columns.
    register, within = divmod(index, per)
    row = group + (8 if register in (1, 3) else 0)
    return row, member * per + within + (4 * per if register >= 2 else 0)


def _b_place(lane: int, index: int, per: int) -> tuple[int, int]:
    register, within = divmod(index, per)
    return (lane & 3) * per + within + 4 * per * register, lane >> 2


def _registers(matrix: np.ndarray, place, per: int) -> np.ndarray:
    """``[32, registers]``: a matrix's raw elements as the lanes hold them."""
    count = matrix.size // 32
    elements = np.array(
        [[matrix[place(lane, index, per)] for index in range(count)] for lane in range(32)]
    )
    return np.ascontiguousarray(elements).view(np.uint32)


def _mma(piece, form: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Run one ``mma`` on registers ``[32, n]``; the result has the shape of ``c``."""
    groups, body, first = [], "", 0
    for position, values in enumerate((a, b, c)):
        count = values.shape[1]
        body += (
            f"ld.param.b64 %a{position}, [p{position}]; "
            f"mad.wide.u32 %a{position}, %t, {4 * count}, %a{position}; "
        )
        names = [f"%r{first + index}" for index in range(count)]
        for index, name in enumerate(names):
            body += f"ld.global.b32 {name}, [%a{position}+{4 * index}]; "
        groups.append("{" + ",".join(names) + "}")
        first += count
    results = [f"%r{first + index}" for index in range(c.shape[1])]
    body += f"mma.sync.aligned.{form} {{{','.join(results)}}}, {', '.join(groups)}; "
    body += f"ld.param.b64 %a3, [p3]; mad.wide.u32 %a3, %t, {4 * len(results)}, %a3; "
    for index, name in enumerate(results):
        body += f"st.global.b32 [%a3+{4 * index}], {name}; "
    target = np.zeros(c.shape, np.uint32)
    arguments = [np.ascontiguousarray(x) for x in (a, b, c)]
    execute(piece(body, 4), [*arguments, target], (1,), warps=1, shared_bytes=0)
    return target


def _c_places() -> tuple[np.ndarray, np.ndarray]:
    lane, index = np.arange(32)[:, None], np.arange(4)[None, :]
    return (lane >> 2) + 8 * (index >> 1), (lane & 3) * 2 + (index & 1)


@pytest.mark.parametrize(
    ("kinds", "depth", "result"),
    [
        (("f16", "f16"), 8, "f32"),
        (("f16", "f16"), 16, "f32"),
        (("bf16", "bf16"), 8, "f32"),
        (("bf16", "bf16"), 16, "f32"),
        (("tf32", "tf32"), 4, "f32"),
        (("tf32", "tf32"), 8, "f32"),
        (("s8", "s8"), 16, "s32"),
        (("s8", "s8"), 32, "s32"),
        (("s8", "u8"), 32, "s32"),
        (("e4m3", "e5m2"), 32, "f32"),
    ],
)
def test_products(piece, kinds, depth, result):
    left, right = kinds
    per = 32 // _WIDTHS[left]
    raw_a, a = _random(left, (16, depth), 0)
    raw_b, b = _random(right, (depth, 8), 1)
    c = np.random.default_rng(2).integers(-50, 50, (16, 8))
    dtype = np.int32 if result == "s32" else np.float32
    registers = c[_c_places()].astype(dtype).view(np.uint32)
    found = _mma(
        piece,
        f"m16n8k{depth}.row.col.{result}.{left}.{right}.{result}",
        _registers(raw_a, _a_place, per),
        _registers(raw_b, _b_place, per),
        registers,
    )
    expected = (a @ b + c)[_c_places()]
    np.testing.assert_allclose(found.view(dtype), expected, rtol=1e-6, atol=1e-4)


def test_half_precision_results(piece):
    raw_a, a = _random("f16", (16, 16), 0)
    raw_b, b = _random("f16", (16, 8), 1)
    c = np.arange(128).reshape(16, 8).astype(np.float16)
    registers = c[_c_places()].view(np.uint32)
    found = _mma(
        piece,
        "m16n8k16.row.col.f16.f16.f16.f16",
        _registers(raw_a, _a_place, 2),
        _registers(raw_b, _b_place, 2),
        registers,
    )
    expected = (a @ b + c)[_c_places()].astype(np.float16)
    assert np.array_equal(found.view(np.float16), expected)


@pytest.mark.parametrize(("saturate", "expected"), [("", -(2**31)), (".satfinite", 2**31 - 1)])
def test_integer_sums_wrap_unless_they_saturate(piece, saturate, expected):
    ones = np.ones((16, 32), np.uint8)
    a = _registers(ones * (np.arange(32) == 0).astype(np.uint8), _a_place, 4)
    b = _registers(np.ones((32, 8), np.uint8), _b_place, 4)
    most = np.full((32, 4), 2**31 - 1, np.uint32)
    found = _mma(piece, f"m16n8k32.row.col{saturate}.s32.s8.s8.s32", a, b, most)
    assert (found.view(np.int32) == expected).all()


@pytest.mark.parametrize(
    "form", ["m8n8k4.row.col.f64.f64.f64.f64", "sp.m16n8k32.row.col.f32.f16.f16.f32"]
)
def test_other_products_are_refused(piece, form):
    registers = np.zeros((32, 4), np.uint32)
    with pytest.raises(UnsupportedInstructionError, match="mma"):
        _mma(piece, form, registers, registers[:, :2], registers)


_FILL = """
    ld.param.b64 %a0, [p0]; mad.wide.u32 %a0, %t, 16, %a0;
    mov.b32 %r8, memory; mad.lo.u32 %r9, %t, 16, %r8;
    ld.global.v4.b32 {%r0,%r1,%r2,%r3}, [%a0];
"""
_GIVE = """
    ld.param.b64 %a1, [p1]; mad.wide.u32 %a1, %t, 16, %a1;
    st.global.v4.b32 [%a1], {%r0,%r1,%r2,%r3};
"""


def _fragments(matrices: np.ndarray, *, transposed: bool) -> np.ndarray:
    """``[32, 4, 2]``: a lane's row is a quarter of its number, its columns twice the rest."""
    lane = np.arange(32)
    row, column = lane >> 2, 2 * (lane & 3)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    pairs = [matrices[:, row, column], matrices[:, row, column + 1]]
    return np.stack(pairs, -1).transpose(1, 0, 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(piece, transposed):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    found = np.zeros((32, 4, 2), np.uint16)
    trans = ".trans" if transposed else ""
    body = (
        _FILL
        + "st.shared.v4.b32 [%r9], {%r0,%r1,%r2,%r3}; "
        + f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r0,%r1,%r2,%r3}}, [%r9];"
        + _GIVE
    )
    execute(piece(body, 2, _SHARED), [matrices, found], (1,), warps=1, shared_bytes=512)
    assert np.array_equal(found, _fragments(matrices, transposed=transposed))


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_to_shared_memory(piece, transposed):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    fragments = np.ascontiguousarray(_fragments(matrices, transposed=transposed))
    found = np.zeros_like(matrices)
    trans = ".trans" if transposed else ""
    body = (
        _FILL
        + f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r9], {{%r0,%r1,%r2,%r3}}; "
        + "ld.shared.v4.b32 {%r0,%r1,%r2,%r3}, [%r9];"
        + _GIVE
    )
    execute(piece(body, 2, _SHARED), [fragments, found], (1,), warps=1, shared_bytes=512)
    assert np.array_equal(found, matrices)


def test_only_the_lanes_that_give_addresses_are_checked(piece):
    # One matrix: eight rows, from the first eight lanes.
    body = (
        "mov.b32 %r8, memory; mad.lo.u32 %r9, %t, 16, %r8; "
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r9];"
    )
    kernel = piece(body, 0, _SHARED)
    execute(kernel, [], (1,), warps=1, shared_bytes=128)
    with pytest.raises(MemoryAccessError, match="1 thread"):
        execute(kernel, [], (1,), warps=1, shared_bytes=112)


def test_part_of_a_warp_cannot_load_matrices(piece):
    body = (
        "mov.b32 %r9, memory; setp.lt.u32 %p1, %t, 16; "
        "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r9];"
    )
    with pytest.raises(PTXError, match="part of a warp"):
        execute(piece(body, 0, _SHARED), [], (1,), warps=1, shared_bytes=128)
