"""Kernels of the loss: the logits of a tile, and what is kept of them; see ``gpu.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["tile_of_logits"]

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _tanh(x):
    # The exact formula loses digits near zero, where the series has enough of them.
    square = x * x
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = x + x * square * (-1.0 / 3.0 + square * series)
    shrunk = tl.exp(-2.0 * tl.abs(x))
    exact = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -exact, exact))


@triton.jit
def tile_of_logits(
    hidden,  # [T, D]
    head,  # [rows, D]
    tokens,  # [ROWS], of which those of is_token are read
    is_token,
    entries,  # [COLUMNS], of which those below rows are read
    hidden_stride,
    head_stride,
    rows,
    D,
    softcap,
    logit_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor | float]:
    """A tile of logits and their slopes dl/dz, ``[ROWS, COLUMNS]``, 0 and 1 where it reads none."""
    MIXED: tl.constexpr = hidden.dtype.element_ty != head.dtype.element_ty
    along = tl.arange(0, INNER)
    at_hidden = hidden + tokens[:, None] * hidden_stride + along[None, :]
    at_head = head + entries.to(tl.int64)[:, None] * head_stride + along[None, :]
    is_entry = entries < rows
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, INNER):
        left = along < D - start
        x = tl.load(at_hidden + start, mask=is_token[:, None] & left[None, :], other=0.0)
        weight = tl.load(at_head + start, mask=is_entry[:, None] & left[None, :], other=0.0)
        if MIXED:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        logits = tl.dot(x, tl.trans(weight), logits, input_precision="ieee")
    logits *= logit_scale
    slope = 1.0
    if softcap is not None:
        capped = _tanh(logits / softcap)
        logits = capped * softcap
        slope = 1.0 - capped * capped
    return logits, slope


@triton.jit
def _linear_cross_entropy_logits_kernel(
    hidden,  # [T, D]
    head,  # [rows, D], the chunk that begins with row ``first``
    labels,  # [T] int64
    order,  # [T] int64, tokens that count come first
    count,  # [] int64, how many count
    at_label,  # [T] float32, the label's logit
    highest,  # [tiles, block] float32, the maximum of each tile, the label apart
    summed,  # [tiles, block] float32, sums of exp(l - highest)
    share,  # [block, chunk], exp(l - highest) * slope, or None
    hidden_stride,
    head_stride,
    share_stride,
    begin,  # the block's first position in order
    block,
    first,
    rows,
    D,
    softcap,
    logit_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counted = tl.minimum(tl.load(count) - begin, block)
    if tl.program_id(0) * ROWS >= counted:
        return
    is_token = positions < counted
    tokens = tl.load(order + begin + positions, mask=is_token, other=0)
    entries = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    logits, slope = tile_of_logits(
        hidden,
        head,
        tokens,
        is_token,
        entries,
        hidden_stride,
        head_stride,
        rows,
        D,
        softcap,
        logit_scale,
        ROWS,
        COLUMNS,
        INNER,
    )
    column = tl.load(labels + tokens, mask=is_token, other=-1) - first
    own = column[:, None] == entries[None, :]
    found = tl.sum(tl.where(own, logits, 0.0), 1)
    here = column - tl.program_id(1) * COLUMNS
    is_here = (here >= 0) & (here < COLUMNS) & (column < rows)
    tl.store(at_label + tokens, found, mask=is_token & is_here)
    logits = tl.where(own | (entries >= rows)[None, :], float("-inf"), logits)
    # A tile may hold nothing but the label.
    maximum = tl.maximum(tl.max(logits, 1), _LOWEST)
    shares = tl.exp(logits - maximum[:, None])
    at_tile = tl.program_id(1).to(tl.int64) * block + positions
    tl.store(highest + at_tile, maximum, mask=is_token)
    tl.store(summed + at_tile, tl.sum(shares, 1), mask=is_token)
    if share is not None:
        at_share = share + positions.to(tl.int64)[:, None] * share_stride + entries[None, :]
        tl.store(
            at_share,
            (shares * slope).to(share.dtype.element_ty),
            mask=is_token[:, None] & (entries < rows)[None, :],
        )


@triton.jit
def _linear_cross_entropy_combine_kernel(
    order,  # [T] int64
    count,  # [] int64
    highest,  # [tiles, block] float32; becomes each tile's factor
    summed,  # [tiles, block] float32
    maximum,  # [T] float32, updated
    total,  # [T] float32, updated: the sum of exp(l - maximum), the label apart
    shrink,  # [block] float32, the factor of what was summed before
    begin,
    block,
    tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counted = tl.minimum(tl.load(count) - begin, block)
    if tl.program_id(0) * ROWS >= counted:
        return
    is_token = positions < counted
    tokens = tl.load(order + begin + positions, mask=is_token, other=0)
    lines = tl.arange(0, TILES)
    inside = (lines < tiles)[:, None] & is_token[None, :]
    at_tile = lines.to(tl.int64)[:, None] * block + positions[None, :]
    of_tiles = tl.load(highest + at_tile, mask=inside, other=_LOWEST)
    sums = tl.load(summed + at_tile, mask=inside, other=0.0)
    before = tl.load(maximum + tokens, mask=is_token, other=0.0)
    after = tl.maximum(before, tl.max(of_tiles, 0))
    factors = tl.exp(of_tiles - after[None, :])
    shrunk = tl.exp(before - after)
    whole = tl.load(total + tokens, mask=is_token, other=0.0) * shrunk + tl.sum(sums * factors, 0)
    tl.store(highest + at_tile, factors, mask=inside)
    tl.store(maximum + tokens, after, mask=is_token)
    tl.store(total + tokens, whole, mask=is_token)
    tl.store(shrink + positions, shrunk, mask=is_token)
