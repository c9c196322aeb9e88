"""Products with an NF4 weight in whole numbers, in Triton; the maths is in ``reference.py``.

One kernel rounds x to 8 bits, a second one multiplies: nibbles of the weight are decoded in
registers to centroids in int8, in the very registers that the tensor cores take them from where the
compiler can. Sums of a block are int32 and start at the bits of 1.5 * 2^23: read as a float32, such
a sum is 1.5 * 2^23 plus itself, exactly, for up to 256 products of 127^2. One multiplication with
addition takes that off again and applies the scale of the block of the weight, a second one applies
that of the block of x and adds to the result: no integer is converted. For the first to be exact,
scales of the weight are rounded to 22 bits. Those above 2^104 overflow.

Decoding: NVIDIA's ``prmt`` looks four nibbles up at once in eight bytes that two registers hold.
Elsewhere (AMD; the interpreter, which knows no assembly) each nibble shifts a 64-bit number. Upper
nibbles are the even elements and lower ones the odd: putting them in turns would cost more than
their decoding. What is summed is the same in any order, and so the first kernel writes x in this
one, even elements before odd ones in each piece that the second one takes at once.

Scales are loaded one turn of the loop ahead, for two blocks at once, so that each thread loads one;
with fewer than threads, the compiler would have every thread load and compute all that it needs.

With few rows, several programs share one sum: each writes a partial sum, float32 ``[splits, M,
N]``, and a kernel adds them up in a fixed order. Bias and residual are added before the only
rounding. Never in memory: the weight in any other form than packed, the sums of blocks. No atomics:
results are the same bits in every run.

Layout: x and residual have adjacent columns, rows any distance apart; x in int8 is ``[M, K]``, its
scales are ``[M, K / blocksize]``, both contiguous.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4 import gpu as nf4
from ladder_kernels.nf4.codebook import NF4_VALUES
from ladder_kernels.nf4.gpu import EXACT, block_scales, load_offset, tensors
from ladder_kernels.nf4.permute import picked, ptx_block, selectors, takes_ptx
from ladder_kernels.ops import _triton
from ladder_kernels.ops.nf4_linear.configurations import Configuration, choose
from ladder_kernels.ops.nf4_linear.gpu import add_splits, adjacent
from ladder_kernels.ops.nf4_linear_int8.reference import LARGEST

__all__ = [
    "INVERSE",
    "add_product",
    "columns_at_once",
    "decode",
    "next_scales",
    "next_steps",
    "nf4_linear_int8",
    "quantize_rows",
    "unsupported",
    "weight_bytes",
]

# Elements that a program of the first kernel rounds, or one block.
_ELEMENTS = 4096
# Products that a sum takes at most, so that it can be read as a float32.
_SUMMANDS = 256

_CODES = [round(LARGEST * value) for value in NF4_VALUES]


def _number(codes: list[int]) -> int:
    """Bytes as one number, the first the lowest."""
    return int.from_bytes(bytes(code & 0xFF for code in codes), "little")


def _bits(value: np.float32) -> int:
    return int(value.view(np.int32))


def _smallest_divisor() -> np.float32:
    """The smallest number that 127 divided by is finite."""
    largest, found = np.float32(LARGEST), np.float32(LARGEST / np.finfo(np.float32).max)
    with np.errstate(over="ignore"):
        while np.isfinite(largest / found):
            found = np.nextafter(found, np.float32(0))
        while not np.isfinite(largest / found):
            found = np.nextafter(found, np.float32(1))
    return found


_LARGEST = tl.constexpr(float(LARGEST))
INVERSE = tl.constexpr(1 / LARGEST)
_SMALLEST_BITS = tl.constexpr(_bits(_smallest_divisor()))
_INFINITY_BITS = tl.constexpr(_bits(np.float32(np.inf)))
_SHIFT = tl.constexpr(1.5 * 2**23)
_SHIFT_BITS = tl.constexpr(_bits(np.float32(1.5 * 2**23)))
_LOWER, _UPPER = (tl.constexpr(_number(_CODES[start : start + 8])) for start in (0, 8))


_CODE_WORDS = [hex(_number(_CODES[start : start + 4])) for start in range(0, 16, 4)]
# Four bytes to four numbers of their upper nibbles and four of their lower ones.
_DECODE = tl.constexpr(
    ptx_block(
        (
            ".reg .b32 first, second;",
            *selectors("$2"),
            *picked("first", _CODE_WORDS, 0),
            *picked("second", _CODE_WORDS, 1),
            "prmt.b32 $0, first, second, 0x7531;",
            "prmt.b32 $1, first, second, 0x6420;",
        )
    )
)


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run in Triton; ``None`` if it can."""
    return (
        _triton.unsupported(x) or nf4.unsupported(x.dtype) or _triton.without_matrix_units(x.device)
    )


@triton.jit
def _halves(
    value,  # [ROWS, COLUMNS]
    PIECE: tl.constexpr,
) -> tl.tensor:
    """Return the even elements of each piece of a row before the odd ones."""
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    pairs = value.reshape(ROWS * COLUMNS // PIECE, PIECE // 2, 2)
    return pairs.permute(0, 2, 1).reshape(ROWS, COLUMNS)


@triton.jit
def _nf4_linear_int8_quantize_kernel(
    x,  # [M, K]
    q,  # [M, K] int8
    steps,  # [M, K / BLOCKSIZE] float32
    K,
    x_stride,
    BLOCKSIZE: tl.constexpr,
    PIECE: tl.constexpr,  # columns that the second kernel takes at once, a share of a block
    BLOCKS: tl.constexpr,  # how many one program takes
):
    blocks = K // BLOCKSIZE
    programs = tl.cdiv(blocks, BLOCKS)
    m = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    value = tl.load(x + m * x_stride + place, mask=inside[:, None], other=0.0).to(tl.float32)
    # As integers, magnitudes have the order that they have as floats, and NaN is above infinity.
    most = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = most < _INFINITY_BITS
    counts = finite & (most >= _SMALLEST_BITS)
    most = tl.where(counts, most, _SHIFT_BITS).to(tl.float32, bitcast=True)
    largest = tl.full((BLOCKS,), _LARGEST, tl.float32)
    # The sum is rounded to a whole number, ties to even, and its lowest byte is that number's.
    rounded = value * tl.div_rn(largest, most)[:, None] + _SHIFT
    whole = tl.where(counts[:, None], rounded.to(tl.int32, bitcast=True), 0).to(tl.int8)
    tl.store(q + m * K + place, _halves(whole, PIECE), mask=inside[:, None])
    step = tl.where(counts, tl.div_rn(most, largest), 0.0)
    step = tl.where(finite, step, float("nan"))
    tl.store(steps + m * blocks + block, step, mask=inside)


@triton.jit
def _look_up(
    index,  # [...] uint8, below 16
) -> tl.tensor:
    """Return centroids as int8."""
    eight = tl.where(index < 8, tl.cast(_LOWER, tl.uint64), tl.cast(_UPPER, tl.uint64))
    return (eight >> ((index & 7) * 8).to(tl.uint64)).to(tl.int8)


@triton.jit
def weight_bytes(
    packed,  # [N * K / 2] uint8
    row,  # [ROWS] int64: the element that each row begins with
    column,  # the first column of the tile
    inside,  # [ROWS]: which rows are there
    COLUMNS: tl.constexpr,  # a power of two, 32 or more
) -> tl.tensor:
    """Return the bytes of a tile: [ROWS, COLUMNS / 2] uint8."""
    place = (row // 2)[:, None] + tl.arange(0, COLUMNS // 2)[None, :]
    # Rows and column apart: the sum over rows does not change from tile to tile.
    return tl.load(packed + column // 2 + place, mask=inside[:, None], other=0)


@triton.jit
def decode(
    pairs,  # [ROWS, COLUMNS / 2] uint8
    PTX: tl.constexpr,  # by prmt
) -> tl.tensor:
    """Return centroids, [ROWS, COLUMNS] int8, even ones before odd ones."""
    ROWS: tl.constexpr = pairs.shape[0]
    COLUMNS: tl.constexpr = 2 * pairs.shape[1]
    if PTX:
        even, odd = tl.inline_asm_elementwise(
            _DECODE,  # pyright: ignore[reportArgumentType]
            "=r,=r,r",
            [pairs],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        even = _look_up(pairs >> 4)
        odd = _look_up(pairs & 15)
    return tl.join(even, odd).permute(0, 2, 1).reshape(ROWS, COLUMNS)


@triton.jit
def next_scales(
    absmax,  # [blocks] float32, or uint8 with double quantisation
    nested_absmax,  # [ceil(blocks / 256)] float32 or None
    nested_code,  # [256] float32 or None
    offset,  # [] float32, of load_offset
    row,  # [ROWS] int64: the block that each row begins with
    inside,  # [ROWS]: which rows are there
    block,  # of each row
    blocks,  # of each row, how many
) -> tl.tensor:
    """Return [ROWS, 2] float32: the scales of a block of each row and of its neighbour."""
    group = block & -2
    both = tl.arange(0, 2)[None, :]
    there = inside[:, None] & (both < blocks - group)
    place = row[:, None] + both
    return block_scales(absmax, nested_absmax, nested_code, offset, place, group, there)


@triton.jit
def next_steps(
    steps,  # [M, K / BLOCKSIZE] float32
    row,  # [ROWS] int64: where each row begins
    inside,  # [ROWS]: which rows are there
    block,  # of each row
    blocks,  # of each row, how many
) -> tl.tensor:
    """Return [ROWS, 2] float32: the scales of a block of each row of x and of its neighbour."""
    group = block & -2
    both = tl.arange(0, 2)[None, :]
    there = inside[:, None] & (both < blocks - group)
    return tl.load(steps + group + row[:, None] + both, mask=there, other=0.0)


@triton.jit
def _of_block(
    pair,  # [ROWS, 2]
    block,  # one of the two
) -> tl.tensor:
    """Return that one's: [ROWS]."""
    both = tl.arange(0, 2)[None, :]
    chosen = tl.where(both == (block & 1), pair, 0.0)
    return tl.sum(chosen, 1)  # pyright: ignore[reportReturnType]


@triton.jit
def add_product(
    acc,  # [BLOCK_M, BLOCK_N] float32
    left,  # [BLOCK_M, BLOCK_K] int8
    right,  # [BLOCK_N, BLOCK_K] int8
    steps,  # [BLOCK_M, 2] of next_steps
    scales,  # [BLOCK_N, 2] of next_scales
    block,
) -> tl.tensor:
    """Return ``acc`` and the product of a piece of a block with both scales, times 127."""
    start = tl.full(acc.shape, _SHIFT_BITS, tl.int32)
    shifted = tl.dot(left, tl.trans(right), start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    # With 22 bits, 3 * 2^22 times a scale is exact.
    bits = (_of_block(scales, block).to(tl.int32, bitcast=True) + 2) & -4
    scale = tl.broadcast_to(bits.to(tl.float32, bitcast=True)[None, :], acc.shape)
    step = tl.broadcast_to(_of_block(steps, block)[:, None], acc.shape)
    return tl.fma(tl.fma(shifted, scale, scale * -_SHIFT), step, acc)


@triton.jit
def _nf4_linear_int8_forward_kernel(
    q,  # [M, K] int8
    steps,  # [M, K / BLOCKSIZE] float32
    packed,  # [N * K / 2] uint8
    absmax,  # [blocks] float32, or uint8 with double quantisation
    nested_absmax,  # [ceil(blocks / 256)] float32 or None
    nested_code,  # [256] float32 or None
    nested_offset,  # [] float32 or None
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N]; with several splits [splits, M, N] float32
    M,
    N,
    K,
    residual_stride,
    share,  # how many columns of x a split sums over
    BLOCKSIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a share of BLOCKSIZE
    PTX: tl.constexpr,  # decode by prmt
):
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m_inside = m < M
    n_inside = n < N
    blocks = K // BLOCKSIZE
    q_row = q + m.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    w_row = n.to(tl.int64) * K
    step_row = m.to(tl.int64) * blocks
    scale_row = n.to(tl.int64) * blocks
    offset = load_offset(nested_offset)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * share
    step = next_steps(steps, step_row, m_inside, first // BLOCKSIZE, blocks)
    scale = next_scales(
        absmax,
        nested_absmax,
        nested_code,
        offset,
        scale_row,
        n_inside,
        first // BLOCKSIZE,
        blocks,
    )
    for k in range(first, min(K, first + share), BLOCK_K):
        after = (k + BLOCK_K) // BLOCKSIZE
        step_after = next_steps(steps, step_row, m_inside, after, blocks)
        scale_after = next_scales(
            absmax,
            nested_absmax,
            nested_code,
            offset,
            scale_row,
            n_inside,
            after,
            blocks,
        )
        left = tl.load(q_row + k, mask=m_inside[:, None], other=0)
        right = weight_bytes(packed, w_row, k, n_inside, BLOCK_K)
        acc = add_product(acc, left, decode(right, PTX), step, scale, k // BLOCKSIZE)
        step = step_after
        scale = scale_after
    acc *= INVERSE
    inside = m_inside[:, None] & n_inside[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        place = m.to(tl.int64)[:, None] * residual_stride + n[None, :]
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    place = (split.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)


def columns_at_once(configuration: Configuration, weight: NF4Weight) -> int:
    """Return the columns of a turn of the loop: a share of a block, few enough for exact sums."""
    return min(configuration.block_k, weight.blocksize, _SUMMANDS)


def quantize_rows(x: Tensor, blocksize: int, piece: int) -> tuple[Tensor, Tensor]:
    """Round rows to 8 bits, block by block.

    Args:
        x: ``[M, K]``, float16, bfloat16 or float32; ``K`` is a multiple of ``blocksize``.
        blocksize: Elements that share a scale.
        piece: Columns that a product takes at once: even ones come before odd ones in each piece.

    Returns:
        ``q`` int8 ``[M, K]`` and ``t`` float32 ``[M, K / blocksize]``: to the bit those of the
        reference, but for the order.
    """
    x = adjacent(x)
    M, K = x.shape
    q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    steps = torch.empty((M, K // blocksize), dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, steps
    blocks = max(1, min(_ELEMENTS // blocksize, triton.next_power_of_2(K // blocksize)))
    _triton.launch(
        _nf4_linear_int8_quantize_kernel,
        (M * triton.cdiv(K // blocksize, blocks),),
        x,
        q,
        steps,
        K,
        x.stride(0),
        BLOCKSIZE=blocksize,
        PIECE=piece,
        BLOCKS=blocks,
        **EXACT,
    )
    return q, steps


def nf4_linear_int8(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return about ``x @ W^T (+ bias) (+ residual)``; as the reference's."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    if out.numel() == 0:
        return out
    configuration = choose("int8", x, weight)
    q, steps = quantize_rows(x, weight.blocksize, columns_at_once(configuration, weight))
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else adjacent(residual)
    _run(q, steps, weight, bias, residual, out, configuration)
    return out


def _run(
    q: Tensor,
    steps: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    configuration: Configuration,
) -> None:
    """Launch the product, and the sum of its splits."""
    M, N, K = out.shape[0], *weight.shape
    step = columns_at_once(configuration, weight)
    share = max(step, triton.cdiv(triton.cdiv(K, configuration.splits), step) * step)
    splits = max(1, triton.cdiv(K, share))
    target = out
    if splits > 1:
        target = torch.empty((splits, M, N), dtype=torch.float32, device=out.device)
    tiles = triton.cdiv(M, configuration.block_m) * triton.cdiv(N, configuration.block_n)
    _triton.launch(
        _nf4_linear_int8_forward_kernel,
        (tiles, splits),
        q,
        steps,
        *tensors(weight),
        *((bias, residual) if splits == 1 else (None, None)),
        target,
        M,
        N,
        K,
        0 if residual is None else residual.stride(0),
        share,
        BLOCKSIZE=weight.blocksize,
        BLOCK_M=configuration.block_m,
        BLOCK_N=configuration.block_n,
        BLOCK_K=step,
        PTX=takes_ptx(q.device),
        **configuration.options(),
        **EXACT,
    )
    if splits > 1:
        add_splits(target, bias, residual, out)
