"""Quantising and dequantising in Triton, to the bits of ``quantize.py`` and ``dequantize.py``.

    value = round(centroid * scale)           float32 product, rounded once to the output dtype
    scale = absmax, or round(map[q8] * absmax2) + offset with double quantisation
    index = how many of the 15 midpoints are smaller than element / absmax

Decoding: all elements of a block share a scale, so a block has only 16 values. They are computed
and rounded once for each block, one value a lane, and a lane fetches the values of its nibbles from
the others (``tl.gather``: one shuffle a nibble, no multiplication, no conversion). Where bytes can
be permuted (``permute.py``), lanes hold all 16 values and fetch nothing. The products with NF4
weights decode by the same functions, in registers.

Layout: elements in row-major order, two a byte, the even one in the high nibble; blocks run over
the flattened tensor. A piece that does not begin with a block, or whose rows do not, takes a
slower way that finds the byte and the scale of each element. Never in memory: the scales of
double quantisation in float32, the centroids, indices of a byte each.

All kernels are compiled without contraction of products and sums, which changes the last bit of a
scale.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.errors import BackendError
from ladder_kernels.launch import host, launch
from ladder_kernels.nf4.codebook import NF4_VALUES
from ladder_kernels.nf4.permute import can_permute, permuted
from ladder_kernels.nf4.quantize import (
    NESTED_BLOCKSIZE,
    SMALLEST_DIVISOR,
    non_finite,
    quantize_absmax,
)

if TYPE_CHECKING:
    from ladder_kernels.nf4.weight import NF4Weight

__all__ = [
    "EXACT",
    "block_scales",
    "centroids",
    "decode",
    "decode_anywhere",
    "decoding",
    "dequantize",
    "dequantize_into",
    "is_aligned",
    "load_offset",
    "pack_blocks",
    "quantize_absmax",
    "quantize_blocks",
    "tensors",
    "unsupported",
    "weight_tables",
    "weight_tile",
]

EXACT: dict[str, bool] = {"enable_fp_fusion": False}
"""Compile options of every kernel that computes scales."""

# Elements a program; enough bytes for a warp to read at once.
_ELEMENTS = 4096
_WARPS = 4

_VALUES = tl.constexpr(NF4_VALUES)
_MIDDLES = tl.constexpr(
    tuple(
        float((np.float32(low) + np.float32(high)) / np.float32(2))
        for low, high in itertools.pairwise(NF4_VALUES)
    )
)
_NESTED = tl.constexpr(NESTED_BLOCKSIZE)
_SMALLEST_BITS = tl.constexpr(int(np.float32(SMALLEST_DIVISOR).view(np.int32)))


def unsupported(dtype: torch.dtype) -> str | None:
    """Say why floats of ``dtype`` cannot be written here; ``None`` if they can."""
    if dtype == torch.bfloat16 and host() == "interpreter":
        return "Triton's interpreter cuts numbers to bfloat16 instead of rounding them"
    return None


def tensors(weight: NF4Weight) -> tuple[Tensor | None, ...]:
    """Return packed, absmax, nested_absmax, nested_code and nested_offset, as kernels take them."""
    return (
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_code,
        weight.nested_offset,
    )


def is_aligned(weight: NF4Weight) -> bool:
    """Whether each row begins with a block."""
    return weight.shape[-1] % weight.blocksize == 0


def decoding(dtype: torch.dtype, *weights: NF4Weight) -> dict[str, bool]:
    """Return how kernels decode these weights to numbers of ``dtype``: their constants for it."""
    aligned = all(is_aligned(weight) for weight in weights)
    return {"ALIGNED": aligned, "PERMUTE": aligned and _permutes(dtype, *weights)}


def _permutes(dtype: torch.dtype, *weights: NF4Weight) -> bool:
    # Words are read at addresses that are multiples of their size, and no part of one.
    return host() != "nobody" and all(
        weight.packed.data_ptr() % 4 == 0
        and weight.packed.numel() % 4 == 0
        and can_permute(weight.device, dtype)
        for weight in weights
    )


@triton.jit
def centroids() -> tl.tensor:
    """Return [16] float32, from constants: no memory is read for them."""
    index = tl.arange(0, 16)
    values = tl.full((16,), _VALUES[0], tl.float32)
    for i in tl.static_range(1, 16):  # pyright: ignore[reportGeneralTypeIssues]
        values = tl.where(index == i, _VALUES[i], values)
    return values


@triton.constexpr_function
def log2(power: Any) -> Any:
    """Return the exponent of a power of two."""
    return power.bit_length() - 1


@triton.jit
def block_scales(
    absmax,  # [blocks] float32, or uint8 with double quantisation
    nested_absmax,  # [ceil(blocks / 256)] float32 or None
    nested_code,  # [256] float32 or None
    offset,  # [] float32, of load_offset
    block,  # which blocks, int64
    further,  # this many blocks further
    inside,  # which of them are there
) -> tl.tensor:
    """Return the float32 scales of blocks, in their shape."""
    scale = tl.load(absmax + further + block, mask=inside, other=0)
    if nested_absmax is not None:
        largest = tl.load(
            nested_absmax + (block + further >> log2(_NESTED)), mask=inside, other=0.0
        )
        scale = tl.load(nested_code + scale.to(tl.int32)) * largest + offset
    return scale


@triton.jit
def load_offset(
    nested_offset,  # [] float32 or None
) -> tl.tensor:
    """Return the offset of the scales, [] float32, once for all blocks; 0 without one."""
    offset = tl.full((), 0.0, tl.float32)
    if nested_offset is not None:
        offset = tl.load(nested_offset)
    return offset


@triton.jit
def weight_tables(
    code,  # [16] float32: the centroids
    absmax,  # as for block_scales, the next three too
    nested_absmax,
    nested_code,
    offset,
    row,  # [ROWS] int64: the element that each row begins with, the beginning of a block
    column,  # of the tile: the beginning of a block, or the tile lies in one block
    inside,  # [ROWS]: which rows are there
    columns,  # how many columns of them, a number or [ROWS, 1]
    BLOCKSIZE: tl.constexpr,
    WHOLE: tl.constexpr,  # rows of the tile are there as a whole or not at all
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, 32 or more
    DTYPE: tl.constexpr,
    PERMUTE: tl.constexpr,  # decode by permutations of bytes
) -> tl.tensor:
    """Return the 16 values of each block of a tile: [ROWS * blocks of a row, 16] in DTYPE.

    Or, to decode by permutations, the blocks' scales: [ROWS, blocks of a row] float32.
    """
    GROUPS: tl.constexpr = (COLUMNS + BLOCKSIZE - 1) // BLOCKSIZE
    block = row >> log2(BLOCKSIZE)
    block_inside = inside
    if GROUPS > 1:
        group = tl.arange(0, GROUPS)[None, :]
        block = block[:, None] + group
        block_inside = inside[:, None]
        if not WHOLE:
            block_inside &= group * BLOCKSIZE < columns
    scale = block_scales(
        absmax, nested_absmax, nested_code, offset, block, column >> log2(BLOCKSIZE), block_inside
    )
    if PERMUTE:
        values = scale.reshape(ROWS, GROUPS)
    else:
        values = (code[None, :] * scale.reshape(ROWS * GROUPS)[:, None]).to(DTYPE)
    return values


@triton.jit
def decode(
    table,  # of weight_tables
    packed,  # [ceil(numel / 2)] uint8
    row,  # [ROWS] int64: the element that each row begins with
    column,  # of the tables' tile
    inside,  # [ROWS]: which rows are there
    columns,  # how many columns of them, a number or [ROWS, 1]
    PART: tl.constexpr,  # the tile begins PART * COLUMNS columns after that of the tables
    WHOLE: tl.constexpr,  # rows of the tile are there as a whole or not at all
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    PERMUTE: tl.constexpr,  # as for weight_tables
) -> tl.tensor:
    """Return [ROWS, COLUMNS] in DTYPE, that of the tables."""
    LOG_EACH: tl.constexpr = log2(8 if PERMUTE else 2)
    PIECES: tl.constexpr = COLUMNS >> LOG_EACH
    if PERMUTE:
        packed = packed.to(tl.pointer_type(tl.int32), bitcast=True)
    piece = tl.arange(0, PIECES)[None, :]
    piece_inside = inside[:, None]
    if not WHOLE:
        piece_inside &= piece << LOG_EACH < columns
    # Apart, so that the sum over rows does not change from tile to tile and that of parts is known.
    # Shifts, since a division of signed numbers rounds towards zero, which takes longer.
    place = (row >> LOG_EACH)[:, None] + piece
    pieces = tl.load(
        packed + (column >> LOG_EACH) + PART * PIECES + place, mask=piece_inside, other=0
    )
    if PERMUTE:
        value = permuted(pieces, table, DTYPE)
    else:
        # With as many columns as entries, entries and nibbles lie in the same lanes of one warp.
        # Nibbles are cut out as bytes: from wider numbers the compiler makes pairs and unmakes
        # them.
        TABLES: tl.constexpr = table.shape[0]
        EACH: tl.constexpr = ROWS * PIECES // (TABLES * 16)
        index = pieces.reshape(TABLES, 16, EACH)
        table = tl.broadcast_to(table[:, :, None], (TABLES, 16, EACH))
        high = tl.gather(table, (index >> 4).to(tl.int32), 1)
        low = tl.gather(table, (index & 15).to(tl.int32), 1)
        value = tl.join(high, low).reshape(ROWS, COLUMNS)
    return value


@triton.jit
def decode_anywhere(
    code,  # [16] float32: the centroids
    packed,  # [ceil(numel / 2)] uint8
    absmax,  # as for block_scales, the next three too
    nested_absmax,
    nested_code,
    offset,
    row,  # [ROWS] int64: the element that each row begins with
    column,  # the first column of the tile: its rows begin with the elements row + column
    inside,  # [ROWS]: which rows are there
    columns,  # how many columns of them, a number or [ROWS, 1]
    BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Return [ROWS, COLUMNS] in DTYPE, wherever blocks and bytes begin."""
    index = tl.arange(0, COLUMNS)[None, :]
    there = inside[:, None] & (index < columns)
    element = row[:, None] + column + index
    pairs = tl.load(packed + element // 2, mask=there, other=0).to(tl.int32)
    index = tl.where((element & 1) == 0, pairs >> 4, pairs & 15)
    block = element // BLOCKSIZE
    scale = block_scales(absmax, nested_absmax, nested_code, offset, block, 0, there)
    table = tl.broadcast_to(code[None, :], (ROWS, 16))
    return (tl.gather(table, index, 1) * scale).to(DTYPE)


@triton.jit
def weight_tile(
    code,  # [16] float32: the centroids
    packed,  # [ceil(numel / 2)] uint8
    absmax,  # as for block_scales, the next three too
    nested_absmax,
    nested_code,
    offset,
    row,  # [ROWS] int64: the element that each row begins with
    column,  # the first column of the tile: its rows begin with the elements row + column
    inside,  # [ROWS]: which rows are there
    columns,  # how many columns of them, a number or [ROWS, 1]
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # row is the beginning of a block; column too, or the tile is in one
    WHOLE: tl.constexpr,  # rows of the tile are there as a whole or not at all
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, 32 or more
    DTYPE: tl.constexpr,
    PERMUTE: tl.constexpr,  # as for weight_tables
) -> tl.tensor:
    """Return [ROWS, COLUMNS] in DTYPE; elements that are not there are any finite number."""
    if ALIGNED:
        table = weight_tables(
            code,
            absmax,
            nested_absmax,
            nested_code,
            offset,
            row,
            column,
            inside,
            columns,
            BLOCKSIZE,
            WHOLE,
            ROWS,
            COLUMNS,
            DTYPE,
            PERMUTE,
        )
        value = decode(
            table,
            packed,
            row,
            column,
            inside,
            columns,
            0,  # pyright: ignore[reportArgumentType]
            WHOLE,
            ROWS,
            COLUMNS,
            DTYPE,
            PERMUTE,
        )
    else:
        value = decode_anywhere(
            code,
            packed,
            absmax,
            nested_absmax,
            nested_code,
            offset,
            row,
            column,
            inside,
            columns,
            BLOCKSIZE,
            ROWS,
            COLUMNS,
            DTYPE,
        )
    return value


@triton.jit
def _nf4_dequantize_kernel(
    packed,  # [ceil(numel / 2)] uint8
    absmax,  # [blocks] float32, or uint8 with double quantisation
    nested_absmax,  # [ceil(blocks / 256)] float32 or None
    nested_code,  # [256] float32 or None
    nested_offset,  # [] float32 or None
    out,  # [rows, width]
    first,  # the element that the first row begins with
    row_stride,  # elements from the beginning of one row to that of the next
    width,
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PERMUTE: tl.constexpr,
    SEGMENTS: tl.constexpr,  # what one program decodes: segments that lie in one block each
    SEGMENT: tl.constexpr,
):
    pieces = tl.cdiv(width, SEGMENTS * SEGMENT)
    program = tl.program_id(0).to(tl.int64)
    row = program // pieces
    begin = ((program % pieces) * SEGMENTS + tl.arange(0, SEGMENTS)) * SEGMENT
    value = weight_tile(
        centroids(),
        packed,
        absmax,
        nested_absmax,
        nested_code,
        load_offset(nested_offset),
        first + row * row_stride + begin,
        0,
        begin < width,
        (width - begin)[:, None],
        BLOCKSIZE,
        ALIGNED,
        False,  # pyright: ignore[reportArgumentType]
        SEGMENTS,
        SEGMENT,
        out.dtype.element_ty,
        PERMUTE,
    )
    column = begin[:, None] + tl.arange(0, SEGMENT)[None, :]
    tl.store(out + row * width + column, value, mask=column < width)


@triton.jit
def _nf4_quantize_kernel(
    weight,  # [numel]
    packed,  # [ceil(numel / 2)] uint8
    absmax,  # [blocks] float32; NaN and infinity are seen there
    numel,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # how many one program takes
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    start = block * BLOCKSIZE
    element = start[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    value = tl.load(weight + element, mask=element < numel, other=0.0).to(tl.float32)
    # As integers, magnitudes have the order that they have as floats, and NaN is above infinity.
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, 1)
    divisor = tl.maximum(largest, _SMALLEST_BITS)
    # A short last block is divided by its scale, full ones are multiplied by its inverse.
    short = start + BLOCKSIZE > numel
    stored = tl.where(short, divisor, largest).to(tl.float32, bitcast=True)
    divisor = divisor.to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)
    divided = tl.div_rn(value, tl.broadcast_to(divisor[:, None], (BLOCKS, BLOCKSIZE)))
    unit = tl.where(short[:, None], divided, value * inverse[:, None])
    index = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for i in tl.static_range(15):  # pyright: ignore[reportGeneralTypeIssues]
        index += (unit > _MIDDLES[i]).to(tl.int32)
    tl.store(absmax + block, stored, mask=start < numel)
    high, low = tl.split(index.reshape(BLOCKS, BLOCKSIZE // 2, 2))
    byte = (start // 2)[:, None] + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed + byte, (high * 16 + low).to(tl.uint8), mask=byte * 2 < numel)


def quantize_blocks(weight: Tensor, blocksize: int, *, name: str) -> tuple[Tensor, Tensor]:
    """Return ``packed`` and ``absmax``; as the reference's. Only a strided weight is copied."""
    packed, absmax = pack_blocks(weight, blocksize)
    if not bool(torch.isfinite(absmax).all()):
        raise non_finite(weight, name)
    return packed, absmax


def pack_blocks(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return ``packed`` and ``absmax`` of a weight that nobody has checked; no synchronisation."""
    flat = weight.reshape(-1).contiguous()
    numel = flat.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=flat.device)
    if numel == 0:
        return packed, absmax
    blocks = max(1, _ELEMENTS // blocksize)
    launch(
        _nf4_quantize_kernel,
        (triton.cdiv(absmax.numel(), blocks),),
        flat,
        packed,
        absmax,
        numel,
        BLOCKSIZE=blocksize,
        BLOCKS=blocks,
        num_warps=_WARPS,
        **EXACT,
    )
    return packed, absmax


def dequantize(weight: NF4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return the elements ``start`` to ``stop`` (exclusive) of the flattened tensor.

    Args:
        weight: Any.
        start: First element.
        stop: One past the last element.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[stop - start]``, a new tensor. No other memory is used.

    Raises:
        BackendError: The interpreter runs the kernel, and ``dtype`` is bfloat16.
    """
    reason = unsupported(dtype)
    if reason is not None:
        raise BackendError(f"nf4: backend 'triton' cannot run this call: {reason}")
    out = torch.empty(stop - start, dtype=dtype, device=weight.device)
    dequantize_into(out.view(1, -1), weight, start)
    return out


def dequantize_into(out: Tensor, weight: NF4Weight, first: int, row_stride: int = 0) -> None:
    """Write a rectangle of a weight.

    Args:
        out: ``[rows, width]``, contiguous; float32, bfloat16 or float16.
        weight: Any.
        first: Element of the flattened weight that becomes ``out[0, 0]``.
        row_stride: How many elements further ``out[1, 0]`` is.
    """
    if row_stride == out.shape[1]:
        # Whole rows are one piece.
        out = out.view(1, -1)
    rows, width = out.shape
    if out.numel() == 0:
        return
    segment = min(weight.blocksize, _ELEMENTS)
    segments = max(1, min(_ELEMENTS, triton.next_power_of_2(width)) // segment)
    aligned = first % weight.blocksize == 0 and (rows == 1 or row_stride % weight.blocksize == 0)
    launch(
        _nf4_dequantize_kernel,
        (rows * triton.cdiv(width, segments * segment),),
        *tensors(weight),
        out,
        first,
        row_stride,
        width,
        BLOCKSIZE=weight.blocksize,
        ALIGNED=aligned,
        PERMUTE=aligned and _permutes(out.dtype, weight),
        SEGMENTS=segments,
        SEGMENT=segment,
        num_warps=_WARPS,
        **EXACT,
    )
