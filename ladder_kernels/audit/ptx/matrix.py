"""Tensor-core instructions: ``mma.sync``, ``ldmatrix``, ``stmatrix``.

A product is accumulated in float64 (int64 for integers) and rounded once, so that the last bits
differ from those of the hardware, which keeps fewer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.access import count
from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering, Reader, Writer, items
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import WARP, Threads
from ladder_kernels.audit.ptx.types import FP8_VALUES, UNSIGNED, Array, bf16_to_float
from ladder_kernels.audit.ptx.warps import whole_warps

__all__ = ["BUILDERS"]

# Of the fragments' layout: each lane's row of eight, and its place among the four of a row.
_ROW = np.arange(WARP) >> 2
_ROW.flags.writeable = False
_PLACE = np.arange(WARP) & 3
_PLACE.flags.writeable = False

_M, _N = 16, 8


def _decode_tf32(raw: Array) -> Array:
    # The hardware ignores the low 13 bits.
    return (raw & np.uint32(0xFFFF_E000)).view(np.float32)


_DECODERS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "bf16": bf16_to_float,
        "e4m3": lambda raw: FP8_VALUES["e4m3"][raw],
        "e5m2": lambda raw: FP8_VALUES["e5m2"][raw],
        "f16": lambda raw: raw.view(np.float16),
        "s8": lambda raw: raw.view(np.int8),
        "tf32": _decode_tf32,
        "u8": lambda raw: raw,
    }
)
_WIDTHS: Mapping[str, int] = MappingProxyType(
    {"bf16": 16, "e4m3": 8, "e5m2": 8, "f16": 16, "s8": 8, "tf32": 32, "u8": 8}
)


@dataclass(frozen=True)
class _Shape:
    """A product's types and depth.

    Attributes:
        result: The type of the result and of what is added.
        left: The type of ``A``, row-major 16 by ``depth``.
        right: The type of ``B``, ``depth`` by 8.
        depth: Its inner size.
        wrap: For integers, whether overflow wraps around rather than saturates.
    """

    result: str
    left: str
    right: str
    depth: int
    wrap: bool

    @property
    def accumulator(self) -> np.dtype:
        """What sums are kept in."""
        return np.dtype(np.int64 if self.result == "s32" else np.float64)


def _shape(instruction: Instruction) -> _Shape:
    size = next((m for m in instruction.modifiers if re.match(r"m\d+n\d+k\d+$", m)), "none")
    result, left, right, added = (kind.name for kind in instruction.types[-4:])
    depth = int(size.rsplit("k", 1)[-1]) if size.startswith(f"m{_M}n{_N}k") else 0
    known = left in _DECODERS and right in _DECODERS and _WIDTHS[left] == _WIDTHS[right]
    results = ("s32",) if left in ("s8", "u8") else ("f32", "f16")
    if not depth or not known or result not in results or added != result:
        raise UnsupportedInstructionError(f"mma {size} of {left} and {right} is not modelled")
    if instruction.has("sp", "block_scale") or not instruction.has("sync"):
        raise UnsupportedInstructionError("sparse and scaled mma are not modelled")
    return _Shape(result, left, right, depth, not instruction.has("satfinite"))


def _multiply(instruction: Instruction, lowering: Lowering) -> Action:
    """``mma.sync.aligned.m16n8k*.row.col``."""
    shape = _shape(instruction)
    left, right, added = (
        lowering.read_all(items(operand), "b32") for operand in instruction.operands[1:4]
    )
    writers = lowering.write_all(items(instruction.operands[0]), "b32")
    per = 32 // _WIDTHS[shape.left]
    if len(left) * per * WARP != _M * shape.depth or len(right) * per * WARP != _N * shape.depth:
        raise UnsupportedInstructionError("mma with fragments of another size")

    def action(threads: Threads, mask: Array | None) -> None:
        whole_warps(threads, mask)
        a = _gather_left(threads, left, shape)
        b = _gather_right(threads, right, shape)
        total = np.matmul(a, b) + _gather_added(threads, added, shape)
        _scatter(threads, writers, total, shape, mask)

    return action


def _elements(threads: Threads, read: Reader, kind: str) -> Array:
    """``[warps, 32, elements of a register]``, lowest bits first."""
    width = _WIDTHS[kind]
    raw = np.ascontiguousarray(threads.each(read(threads))).view(UNSIGNED[width])
    return _DECODERS[kind](raw).reshape(threads.warps, WARP, 32 // width)


def _gather_left(threads: Threads, readers: list[Reader], shape: _Shape) -> Array:
    """``A`` as ``[warps, 16, depth]``: registers alternate between the upper and lower 8 rows."""
    matrix = np.empty((threads.warps, _M, shape.depth), shape.accumulator)
    for index, read in enumerate(readers):
        part = _elements(threads, read, shape.left)
        for position in range(part.shape[2]):
            columns = (4 * (index >> 1) + _PLACE) * part.shape[2] + position
            matrix[:, _ROW + 8 * (index & 1), columns] = part[:, :, position]
    return matrix


def _gather_right(threads: Threads, readers: list[Reader], shape: _Shape) -> Array:
    """``B`` as ``[warps, depth, 8]``."""
    matrix = np.empty((threads.warps, shape.depth, _N), shape.accumulator)
    for index, read in enumerate(readers):
        part = _elements(threads, read, shape.right)
        for position in range(part.shape[2]):
            rows = (4 * index + _PLACE) * part.shape[2] + position
            matrix[:, rows, _ROW] = part[:, :, position]
    return matrix


def _gather_added(threads: Threads, readers: list[Reader], shape: _Shape) -> Array:
    """``C`` as ``[warps, 16, 8]``."""
    matrix = np.empty((threads.warps, _M, _N), shape.accumulator)
    for index, read in enumerate(readers):
        raw = np.ascontiguousarray(threads.each(read(threads)))
        if shape.result == "f16":
            pairs = raw.view(np.float16).reshape(threads.warps, WARP, 2)
            for position in range(2):
                matrix[:, _ROW + 8 * index, 2 * _PLACE + position] = pairs[:, :, position]
        else:
            values = raw.view(np.int32 if shape.result == "s32" else np.float32)
            matrix[:, _ROW + 8 * (index >> 1), 2 * _PLACE + (index & 1)] = values.reshape(-1, WARP)
    return matrix


def _scatter(
    threads: Threads, writers: list[Writer], total: Array, shape: _Shape, mask: Array | None
) -> None:
    if shape.result == "f16":
        halves = total.astype(np.float16)
        for index, write in enumerate(writers):
            rows = _ROW + 8 * index
            pairs = np.stack([halves[:, rows, 2 * _PLACE], halves[:, rows, 2 * _PLACE + 1]], -1)
            write(threads, pairs.view(np.uint32).ravel(), mask)
        return
    if shape.result == "f32":
        raw = total.astype(np.float32).view(np.uint32)
    elif shape.wrap:
        raw = (total & 0xFFFF_FFFF).astype(np.uint32)
    else:
        raw = np.clip(total, -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)
    for index, write in enumerate(writers):
        values = raw[:, _ROW + 8 * (index >> 1), 2 * _PLACE + (index & 1)]
        write(threads, values.ravel(), mask)


def _matrices(instruction: Instruction) -> int:
    if not instruction.has("m8n8") or not instruction.has("b16"):
        raise UnsupportedInstructionError("matrices are modelled as 8 by 8 of 16 bits alone")
    return int(instruction.one_of("x1", "x2", "x4")[1:])


def _locate_rows(
    threads: Threads, address: Reader, mask: Array | None, matrices: int, what: str
) -> Array:
    """``[warps that take part, matrices, 8]``: where each row lies, in units of two bytes.

    The address of a matrix's row comes from one lane: the first eight lanes for the first matrix.
    """
    chosen = whole_warps(threads, mask)
    shared = threads.memories["shared"]
    giving = np.zeros((threads.warps, WARP), bool)
    giving[chosen, : 8 * matrices] = True
    lanes = giving.ravel()
    addresses = address(threads)
    places = shared.locate(threads, addresses, lanes, 16, what)
    count(threads, "shared", addresses, lanes, 16, load=True)
    return places.reshape(-1, matrices, 8) // 2


def _columns(instruction: Instruction) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Row and column of each lane's lower and upper element."""
    if instruction.has("trans"):
        return (2 * _PLACE, _ROW), (2 * _PLACE + 1, _ROW)
    return (_ROW, 2 * _PLACE), (_ROW, 2 * _PLACE + 1)


def _load_matrix(instruction: Instruction, lowering: Lowering) -> Action:
    matrices = _matrices(instruction)
    address = lowering.address(instruction.operands[1])
    writers = lowering.write_all(items(instruction.operands[0]), "b32")
    lower, upper = _columns(instruction)

    def action(threads: Threads, mask: Array | None) -> None:
        rows = _locate_rows(threads, address, mask, matrices, "ldmatrix")
        words = threads.memories["shared"].words[16]
        content = words[rows[..., None] + np.arange(8)]
        chosen = whole_warps(threads, mask)
        for index, write in enumerate(writers):
            low = content[:, index, lower[0], lower[1]].astype(np.uint32)
            high = content[:, index, upper[0], upper[1]].astype(np.uint32)
            everyone = np.zeros((threads.warps, WARP), np.uint32)
            everyone[chosen] = low | (high << np.uint32(16))
            write(threads, everyone.ravel(), mask)

    return action


def _store_matrix(instruction: Instruction, lowering: Lowering) -> Action:
    matrices = _matrices(instruction)
    address = lowering.address(instruction.operands[0])
    readers = lowering.read_all(items(instruction.operands[1]), "b32")
    lower, upper = _columns(instruction)

    def action(threads: Threads, mask: Array | None) -> None:
        rows = _locate_rows(threads, address, mask, matrices, "stmatrix")
        chosen = whole_warps(threads, mask)
        content = np.empty((len(rows), matrices, 8, 8), np.uint16)
        for index, read in enumerate(readers):
            values = threads.by_warp(read(threads))[chosen]
            content[:, index, lower[0], lower[1]] = values.astype(np.uint16)
            content[:, index, upper[0], upper[1]] = (values >> np.uint32(16)).astype(np.uint16)
        threads.memories["shared"].words[16][rows[..., None] + np.arange(8)] = content

    return action


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {"ldmatrix": _load_matrix, "mma": _multiply, "stmatrix": _store_matrix}
)
"""Builders by opcode."""
