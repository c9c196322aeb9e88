"""A rung's merge in Triton; the maths is in ``reference.py``.

Forward: one launch a tap. A program holds the projection of a block of tokens to a block of
channels; it walks once along the tap's rows, multiplies them *as they are* by ``down`` and adds up
their squares on the way, and the factor that normalises a row is applied to its finished sum:

    n(x) @ down^T = (x @ down^T) / sqrt(mean(x^2) + eps)

so nothing is rounded before the products, which are summed in float32. The last tap's launch merges
with the side stream and rounds once. With several taps the sum so far is carried from launch to
launch in a float32 ``[T, d]``: any number of taps of any widths and dtypes, and only one of them
has to be on the device at a time; one kernel over all of them would need a list of pointers.

Backward, four kernels:

    scale    1 / rms of each row of a tap, float32 ``[T]``. To keep it from the forward would spare
             one reading of the tap and cost every backend an output.
    product  G = e^T @ n(tap), the factor multiplied onto e. e is float16 or bfloat16 and its
             product with the factor is not: it is split into two numbers of that type, whose
             products with the tap are both summed, since the gradient of the gate subtracts what
             G holds from something nearly equal. Where d and D give too few programs, tokens are
             split too, and each split has its own float32 ``[d, D]``.
    down     adds the splits in order; writes ddown, and sum_k G * down in float64 for the gate.
    side     writes dside, and sums e * side over tokens in float64 for the gate.

Never in memory: normalised rows, forward or backward, and anything else of ``[T, D]``. All sums are
in an order that depends on shapes alone: the same bits in every run.

Layout: rows of adjacent elements, any distance apart. Operands of one dtype are multiplied in it
(float32: in float32 proper, not in TF32); a tap of another dtype than the side stream's and its
``down`` are both widened to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.ops import _triton

__all__ = ["rung_merge", "rung_merge_backward", "unsupported"]


@dataclass(frozen=True)
class _Tile:
    """What a program holds: tokens, channels of the side stream, channels of the tap."""

    tokens: int
    narrow: int
    wide: int
    warps: int
    stages: int


# By whether products are of float32, which no tensor core multiplies exactly, and by architecture:
# RDNA has fewer registers. Modelled, but for what sm_90 has of its own, which was measured. Forward
# blocks are small, or a micro-batch of 2K tokens would not occupy a GPU.
_FORWARD = {
    False: {
        "": _Tile(64, 64, 64, 4, 3),
        "gfx1": _Tile(64, 32, 32, 4, 2),
        "sm_90": _Tile(32, 64, 128, 4, 4),
    },
    True: {"": _Tile(32, 32, 32, 4, 3)},
}
_PRODUCT = {
    False: {"": _Tile(64, 64, 128, 8, 3), "gfx1": _Tile(32, 64, 64, 8, 2)},
    True: {"": _Tile(32, 32, 64, 4, 3)},
}
# The channels of a side stream that is narrower than a tile's, at least what a product takes.
_NARROWEST = 16

# Enough programs to occupy a GPU; the product's splits of T add up to no more than that.
_PROGRAMS = 256
_ROWWISE = _Tile(16, 128, 256, 4, 2)


def unsupported(first: Tensor, *rest: object) -> str | None:
    """Say why a call cannot run in Triton; ``None`` if it can.

    Args:
        first: The side stream, or its gradient.
        *rest: What comes after it, the taps being the first sequence.
    """
    taps: Sequence[Tensor] = next(value for value in rest if isinstance(value, (list, tuple)))
    if any(tap.shape[-1] == 0 for tap in taps):
        return "a tap has no channels"
    return _triton.unsupported(first, *taps, products=True) or _triton.without_matrix_units(
        first.device
    )


@triton.jit
def _rung_merge_forward_kernel(
    tap,  # [T, D]
    down,  # [d, D]
    carried,  # [T, d] float32, the projections of the taps before this one, or None
    side,  # [T, d], or None where more taps follow
    gate,  # [1] or [d], or None
    out,  # [T, d], the merged stream; where more taps follow, the projections' sum in float32
    tap_stride,
    down_stride,
    side_stride,
    gate_stride,
    T,
    D,
    d,
    eps,
    TOKENS: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
):
    MIXED: tl.constexpr = tap.dtype.element_ty != down.dtype.element_ty
    tokens = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    channels = (tl.program_id(1) * NARROW + tl.arange(0, NARROW)).to(tl.int64)
    along = tl.arange(0, WIDE)
    is_token, is_channel = tokens < T, channels < d
    at_tap = tap + tokens[:, None] * tap_stride + along[None, :]
    at_down = down + channels[:, None] * down_stride + along[None, :]
    product = tl.zeros((TOKENS, NARROW), tl.float32)
    squares = tl.zeros((TOKENS, WIDE), tl.float32)
    for start in range(0, D, WIDE):
        left = along < D - start
        x = tl.load(at_tap + start, mask=is_token[:, None] & left[None, :], other=0.0)
        weight = tl.load(at_down + start, mask=is_channel[:, None] & left[None, :], other=0.0)
        wide = x.to(tl.float32)
        squares += wide * wide
        if MIXED:
            product = tl.dot(wide, tl.trans(weight.to(tl.float32)), product, input_precision="ieee")
        else:
            # Selected once more, or the compiler would read one tile of shared memory for the
            # squares and for the product, laid out without regard to banks.
            x = tl.where(left[None, :], x, 0.0)
            product = tl.dot(x, tl.trans(weight), product, input_precision="ieee")
    product *= tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None]
    inside = is_token[:, None] & is_channel[None, :]
    at_out = tokens[:, None] * d + channels[None, :]
    if carried is not None:
        product += tl.load(carried + at_out, mask=inside, other=0.0)
    if side is not None:
        at_side = side + tokens[:, None] * side_stride + channels[None, :]
        stream = tl.load(at_side, mask=inside, other=0.0).to(tl.float32)
        if gate is None:
            product += stream
        else:
            kept = tl.load(gate + channels * gate_stride, mask=is_channel, other=0.0)
            product += kept.to(tl.float32)[None, :] * (stream - product)
    tl.store(out + at_out, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rung_merge_scale_kernel(
    tap,  # [T, D]
    scale,  # [T] float32
    tap_stride,
    D,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        value = tl.load(
            tap + row * tap_stride + start + columns, mask=columns < D - start, other=0.0
        ).to(tl.float32)
        squares += value * value
    tl.store(scale + row, tl.rsqrt(tl.sum(squares) / D + eps))


@triton.jit
def _rung_merge_product_kernel(
    grad,  # [T, d]
    tap,  # [T, D]
    scale,  # [T] float32
    partial,  # [splits, d, D] float32
    grad_stride,
    tap_stride,
    T,
    D,
    d,
    share,  # tokens of a split, a multiple of TOKENS
    TOKENS: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
):
    dtype = grad.dtype.element_ty
    MIXED: tl.constexpr = tap.dtype.element_ty != grad.dtype.element_ty
    columns = (tl.program_id(0) * WIDE + tl.arange(0, WIDE)).to(tl.int64)
    channels = (tl.program_id(1) * NARROW + tl.arange(0, NARROW)).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    is_column, is_channel = columns < D, channels < d
    tokens = split * share + tl.arange(0, TOKENS).to(tl.int64)
    at_grad = grad + tokens[:, None] * grad_stride + channels[None, :]
    at_tap = tap + tokens[:, None] * tap_stride + columns[None, :]
    product = tl.zeros((NARROW, WIDE), tl.float32)
    for start in range(0, share, TOKENS):
        left = tokens < T - start
        e = tl.load(at_grad, mask=left[:, None] & is_channel[None, :], other=0.0)
        x = tl.load(at_tap, mask=left[:, None] & is_column[None, :], other=0.0)
        at_grad += TOKENS * grad_stride
        at_tap += TOKENS * tap_stride
        factor = tl.load(scale + tokens + start, mask=left, other=0.0)
        scaled = e.to(tl.float32) * factor[:, None]
        if not MIXED and dtype != tl.float32:
            high = scaled.to(dtype)
            low = (scaled - high.to(tl.float32)).to(dtype)
            product = tl.dot(tl.trans(high), x, product)
            product = tl.dot(tl.trans(low), x, product)
        else:
            product = tl.dot(tl.trans(scaled), x.to(tl.float32), product, input_precision="ieee")
    at_partial = partial + split * d * D + channels[:, None] * D + columns[None, :]
    tl.store(at_partial, product, mask=is_channel[:, None] & is_column[None, :])


@triton.jit
def _rung_merge_down_kernel(
    partial,  # [splits, d, D] float32
    down,  # [d, D]
    gate,  # [1] or [d], or None
    ddown,  # [d, D], or None
    crossed,  # [d] float64, the sum of G * down along D, or None
    down_stride,
    gate_stride,
    splits,
    D,
    d,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    summed = tl.zeros((BLOCK,), tl.float64)
    factor = 1.0
    if gate is not None:
        factor = 1.0 - tl.load(gate + channel * gate_stride).to(tl.float32)
    for start in range(0, D, BLOCK):
        inside = columns < D - start
        product = tl.zeros((BLOCK,), tl.float32)
        for split in range(0, splits):
            at = partial + (channel + split * d) * D + start + columns
            product += tl.load(at, mask=inside, other=0.0)
        if crossed is not None:
            weight = tl.load(down + channel * down_stride + start + columns, mask=inside, other=0.0)
            summed += product.to(tl.float64) * weight.to(tl.float64)
        if ddown is not None:
            at = ddown + channel * D + start + columns
            tl.store(at, (product * factor).to(ddown.dtype.element_ty), mask=inside)
    if crossed is not None:
        tl.store(crossed + channel, tl.sum(summed))


@triton.jit
def _rung_merge_side_kernel(
    grad,  # [T, d]
    side,  # [T, d]
    gate,  # [1] or [d], or None
    dside,  # [T, d], or None
    partial,  # [programs, d] float64, sums of grad * side over tokens, or None
    grad_stride,
    side_stride,
    gate_stride,
    T,
    d,
    TOKENS: tl.constexpr,
    NARROW: tl.constexpr,
):
    program = tl.program_id(0)
    channels = (tl.program_id(1) * NARROW + tl.arange(0, NARROW)).to(tl.int64)
    is_channel = channels < d
    kept = tl.full((NARROW,), 1.0, tl.float32)
    if gate is not None:
        kept = tl.load(gate + channels * gate_stride, mask=is_channel, other=0.0).to(tl.float32)
    summed = tl.zeros((TOKENS, NARROW), tl.float64)
    for start in range(program * TOKENS, T, tl.num_programs(0) * TOKENS):
        tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)
        inside = (tokens < T)[:, None] & is_channel[None, :]
        e = tl.load(
            grad + tokens[:, None] * grad_stride + channels[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        if partial is not None:
            stream = tl.load(
                side + tokens[:, None] * side_stride + channels[None, :], mask=inside, other=0.0
            )
            summed += e.to(tl.float64) * stream.to(tl.float64)
        if dside is not None:
            at = dside + tokens[:, None] * d + channels[None, :]
            tl.store(at, (e * kept[None, :]).to(dside.dtype.element_ty), mask=inside)
    if partial is not None:
        at = partial + program.to(tl.int64) * d + channels
        tl.store(at, tl.sum(summed, 0), mask=is_channel)


def _narrow(tile: _Tile, width: int) -> int:
    return max(_NARROWEST, min(tile.narrow, triton.next_power_of_2(width)))


def _in_float32(tap: Tensor, other: Tensor) -> bool:
    """Whether the two are multiplied in float32."""
    return tap.dtype != other.dtype or tap.dtype == torch.float32


def _gate_stride(gate: Tensor | None) -> int:
    """From one channel's gate to the next."""
    return 0 if gate is None or gate.numel() == 1 else gate.stride(0)


def rung_merge(
    side: Tensor,
    taps: Sequence[Tensor],
    downs: Sequence[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
) -> Tensor:
    """Return ``u``, ``[..., d]`` in side's dtype; as the reference's."""
    out = torch.empty(side.shape, dtype=side.dtype, device=side.device)
    if side.numel() == 0:
        return out
    stream, merged = _triton.rows(side), _triton.rows(out)
    carried = None
    for tap, down in zip(taps[:-1], downs[:-1], strict=True):
        target = carried
        if target is None:
            target = torch.empty(stream.shape, dtype=torch.float32, device=side.device)
        # In place from the second tap on: a program reads only what it writes.
        _project(tap, down, carried, None, None, eps, target)
        carried = target
    _project(taps[-1], downs[-1], carried, stream, gate, eps, merged)
    return out


def _project(
    tap: Tensor,
    down: Tensor,
    carried: Tensor | None,
    side: Tensor | None,
    gate: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    rows, weight = _triton.rows(tap), _triton.rows(down)
    tile = _triton.by_architecture(_FORWARD[_in_float32(rows, weight)], rows.device)
    narrow = _narrow(tile, weight.shape[0])
    _triton.launch(
        _rung_merge_forward_kernel,
        (triton.cdiv(rows.shape[0], tile.tokens), triton.cdiv(weight.shape[0], narrow)),
        rows,
        weight,
        carried,
        side,
        gate,
        out,
        rows.stride(0),
        weight.stride(0),
        0 if side is None else side.stride(0),
        _gate_stride(gate),
        *rows.shape,
        weight.shape[0],
        eps,
        TOKENS=tile.tokens,
        NARROW=narrow,
        WIDE=tile.wide,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def rung_merge_backward(
    grad: Tensor,
    side: Tensor,
    taps: Sequence[Tensor],
    downs: Sequence[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
    need_side: bool,
    need_downs: Sequence[bool],
    need_gate: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return ``(dside, ddowns, dgate)``; as the reference's."""
    need_gate = need_gate and gate is not None
    along, stream = _triton.rows(grad), _triton.rows(side)
    shape = side.shape if need_side else (0,)
    dside = torch.empty(shape, dtype=side.dtype, device=side.device)
    # A value per channel; the gradient of a scalar gate is their sum.
    dgate = torch.zeros(along.shape[1], dtype=torch.float64, device=side.device)
    if need_side or need_gate:
        partial = _side_gradient(along, stream, gate, dside if need_side else None, need_gate)
        if partial is not None:
            dgate += partial.sum(0)
    ddowns = []
    for tap, down, needed in zip(taps, downs, need_downs, strict=True):
        ddown = torch.empty(down.shape if needed else (0,), dtype=down.dtype, device=down.device)
        ddowns.append(ddown)
        if needed or need_gate:
            wanted = ddown if needed else None
            crossed = _down_gradient(along, tap, down, gate, eps, wanted, need_gate)
            if crossed is not None:
                dgate -= crossed
    if gate is None or not need_gate:
        return dside, ddowns, side.new_empty(0)
    if mode == "gate":
        dgate = dgate.sum()
    return dside, ddowns, dgate.to(gate.dtype).reshape(gate.shape)


def _side_gradient(
    grad: Tensor, side: Tensor, gate: Tensor | None, dside: Tensor | None, need_gate: bool
) -> Tensor | None:
    """Write ``dside``; return sums of ``grad * side`` over tokens, ``[programs, d]`` float64."""
    T, d = grad.shape
    if grad.numel() == 0:
        return None
    tile = _ROWWISE
    blocks = triton.cdiv(d, tile.narrow)
    programs = max(1, min(triton.cdiv(T, tile.tokens), _PROGRAMS // blocks))
    partial = None
    if need_gate:
        partial = torch.empty(programs, d, dtype=torch.float64, device=grad.device)
    _triton.launch(
        _rung_merge_side_kernel,
        (programs, blocks),
        grad,
        side,
        gate,
        dside,
        partial,
        grad.stride(0),
        side.stride(0),
        _gate_stride(gate),
        T,
        d,
        TOKENS=tile.tokens,
        NARROW=tile.narrow,
        num_warps=tile.warps,
    )
    return partial


def _down_gradient(
    grad: Tensor,
    tap: Tensor,
    down: Tensor,
    gate: Tensor | None,
    eps: float,
    ddown: Tensor | None,
    need_gate: bool,
) -> Tensor | None:
    """Write ``ddown``; return the sums of ``G * down`` along ``D``, ``[d]`` float64."""
    rows, weight = _triton.rows(tap), _triton.rows(down)
    (T, D), d = rows.shape, weight.shape[0]
    if d == 0:
        return None
    crossed = torch.empty(d, dtype=torch.float64, device=down.device) if need_gate else None
    tile = _triton.by_architecture(_PRODUCT[_in_float32(rows, grad)], grad.device)
    narrow = _narrow(tile, d)
    blocks = triton.cdiv(D, tile.wide), triton.cdiv(d, narrow)
    splits = max(1, min(_PROGRAMS // (blocks[0] * blocks[1]), triton.cdiv(T, tile.tokens)))
    share = triton.cdiv(triton.cdiv(T, splits), tile.tokens) * tile.tokens
    scale = torch.empty(T, dtype=torch.float32, device=tap.device)
    partial = torch.empty(splits, d, D, dtype=torch.float32, device=tap.device)
    if T > 0:
        _triton.launch(
            _rung_merge_scale_kernel,
            (T,),
            rows,
            scale,
            rows.stride(0),
            D,
            eps,
            BLOCK=_ROWWISE.wide,
            num_warps=_ROWWISE.warps,
        )
    _triton.launch(
        _rung_merge_product_kernel,
        (*blocks, splits),
        grad,
        rows,
        scale,
        partial,
        grad.stride(0),
        rows.stride(0),
        T,
        D,
        d,
        share,
        TOKENS=tile.tokens,
        NARROW=narrow,
        WIDE=tile.wide,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    _triton.launch(
        _rung_merge_down_kernel,
        (d,),
        partial,
        weight,
        gate,
        ddown,
        crossed,
        weight.stride(0),
        _gate_stride(gate),
        splits,
        D,
        d,
        BLOCK=_ROWWISE.wide,
        num_warps=_ROWWISE.warps,
    )
    return crossed
