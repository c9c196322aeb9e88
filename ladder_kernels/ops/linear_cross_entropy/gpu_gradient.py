"""Kernels of the gradients to ``hidden`` and to a dense head; see ``gpu.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ladder_kernels.ops.linear_cross_entropy.gpu_forward import tile_of_logits


@triton.jit
def _linear_cross_entropy_expected_kernel(
    share,  # [block, chunk]
    factor,  # [tiles, block] float32
    shrink,  # [block] float32
    head,  # [rows, D], the chunk that begins with row ``first``
    labels,  # [T] int64
    order,  # [T] int64
    count,  # [] int64
    expected,  # [block, D] float32, updated: the sum of exp(l - maximum) * s * head, label apart
    label_rows,  # [block, D], where the label is in the chunk: its row of the head
    share_stride,
    head_stride,
    begin,
    block,
    first,
    rows,
    D,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    MIXED: tl.constexpr = share.dtype.element_ty != head.dtype.element_ty
    positions = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    counted = tl.minimum(tl.load(count) - begin, block)
    if tl.program_id(0) * ROWS >= counted:
        return
    is_token = positions < counted
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    is_column = columns < D
    along = tl.arange(0, INNER)
    at_share = share + positions[:, None] * share_stride + along[None, :]
    at_head = head + along.to(tl.int64)[:, None] * head_stride + columns[None, :]
    summed = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, INNER):
        left = along < rows - start
        shares = tl.load(at_share, mask=is_token[:, None] & left[None, :], other=0.0)
        weight = tl.load(at_head, mask=left[:, None] & is_column[None, :], other=0.0)
        at_factor = factor + (start // TILE) * block + positions
        scale = tl.load(at_factor, mask=is_token, other=0.0)
        if MIXED:
            weight = weight.to(tl.float32)
        summed += tl.dot(shares, weight, input_precision="ieee") * scale[:, None]
        at_share += INNER
        at_head += INNER * head_stride
    inside = is_token[:, None] & is_column[None, :]
    at_sum = positions[:, None] * D + columns[None, :]
    scale = tl.load(shrink + positions, mask=is_token, other=0.0)
    summed += tl.load(expected + at_sum, mask=inside, other=0.0) * scale[:, None]
    tl.store(expected + at_sum, summed, mask=inside)
    tokens = tl.load(order + begin + positions, mask=is_token, other=0)
    row = tl.load(labels + tokens, mask=is_token, other=-1) - first
    inside = inside & ((row >= 0) & (row < rows))[:, None]
    label_row = tl.load(head + row[:, None] * head_stride + columns[None, :], mask=inside)
    tl.store(label_rows + at_sum, label_row, mask=inside)


@triton.jit
def _linear_cross_entropy_hidden_kernel(
    expected,  # [block, D] float32
    label_rows,  # [block, D]
    maximum,  # [T] float32
    total,  # [T] float32
    at_label,  # [T] float32
    order,  # [T] int64
    count,  # [] int64
    dhidden,  # [T, D], only tokens that count are written
    begin,
    D,
    softcap,
    logit_scale,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    if position >= tl.load(count) - begin:
        return
    token = tl.load(order + begin + position)
    own, before = tl.load(at_label + token), tl.load(maximum + token)
    top = tl.maximum(before, own)
    shrunk = tl.exp(before - top)
    others = tl.load(total + token) * shrunk
    whole = others + tl.exp(own - top)
    slope = 1.0
    if softcap is not None:
        slope = 1.0 - (own / softcap) * (own / softcap)
    expected_scale = logit_scale * (shrunk / whole)
    label_scale = logit_scale * (others / whole) * slope
    columns = tl.arange(0, BLOCK)
    for start in range(0, D, BLOCK):
        inside = columns < D - start
        at = position * D + start + columns
        found = tl.load(expected + at, mask=inside, other=0.0) * expected_scale
        row = tl.load(label_rows + at, mask=inside, other=0.0).to(tl.float32)
        found -= row * label_scale
        at = dhidden + token * D + start + columns
        tl.store(at, found.to(dhidden.dtype.element_ty), mask=inside)


@triton.jit
def _linear_cross_entropy_change_kernel(
    hidden,  # [T, D]
    head,  # [rows, D], the chunk that begins with row ``first``
    labels,  # [T] int64
    order,  # [T] int64
    count,  # [] int64
    lse,  # [T] float32
    scale,  # [T] float32, what each token's change is multiplied by
    change,  # [T, chunk]
    hidden_stride,
    head_stride,
    change_stride,
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
    counted = tl.load(count)
    if tl.program_id(0) * ROWS >= counted:
        return
    is_token = positions < counted
    tokens = tl.load(order + positions, mask=is_token, other=0)
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
    logits = tl.where((entries < rows)[None, :], logits, float("-inf"))
    column = tl.load(labels + tokens, mask=is_token, other=-1) - first
    own = column[:, None] == entries[None, :]
    shares = tl.exp(logits - tl.load(lse + tokens, mask=is_token, other=0.0)[:, None])
    shares = tl.where(own, shares - 1.0, shares) * slope
    shares *= tl.load(scale + tokens, mask=is_token, other=0.0)[:, None]
    at_change = change + positions.to(tl.int64)[:, None] * change_stride + entries[None, :]
    inside = is_token[:, None] & (entries < rows)[None, :]
    tl.store(at_change, shares.to(change.dtype.element_ty), mask=inside)


@triton.jit
def _linear_cross_entropy_head_kernel(
    change,  # [T, chunk]
    hidden,  # [T, D]
    order,  # [T] int64
    count,  # [] int64
    unit,  # [] float32, what the products are multiplied by
    dhead,  # [rows, D]
    change_stride,
    hidden_stride,
    rows,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    MIXED: tl.constexpr = change.dtype.element_ty != hidden.dtype.element_ty
    entries = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    is_entry, is_column = entries < rows, columns < D
    positions = tl.arange(0, INNER)
    at_change = change + positions.to(tl.int64)[:, None] * change_stride + entries[None, :]
    counted = tl.load(count).to(tl.int32)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, counted, INNER):
        left = positions < counted - start
        changes = tl.load(at_change, mask=left[:, None] & is_entry[None, :], other=0.0)
        tokens = tl.load(order + start + positions, mask=left, other=0)
        at_hidden = hidden + tokens[:, None] * hidden_stride + columns[None, :]
        x = tl.load(at_hidden, mask=left[:, None] & is_column[None, :], other=0.0)
        if MIXED:
            x = x.to(tl.float32)
        product = tl.dot(tl.trans(changes), x, product, input_precision="ieee")
        at_change += INNER * change_stride
    product *= tl.load(unit)
    at = dhead + entries[:, None] * D + columns[None, :]
    tl.store(at, product.to(dhead.dtype.element_ty), mask=is_entry[:, None] & is_column[None, :])
