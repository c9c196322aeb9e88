"""The gated MLP of a side block in Triton; the maths is in ``reference.py``.

Forward: a program holds a block of whole rows of the side stream, normalised, and walks once along
the width m inside the MLP; of each piece of m it makes both products, joins them, and adds the
piece's product with ``down`` to its sum, onto which the stream is added at the end.

Backward, three kernels:

    rows      as the forward; of each piece it makes both products again, and their gradients. It
              writes du, partial sums of the norm weight's gradient, float32 ``[programs, d]``, and
              the normalised rows ``[T, d]``, which the next kernel reads many times.
    matrices  a program owns a slice of m and walks over rows, whose products with its slice it
              makes once more. Where m gives too few programs, rows are split too, and each split
              has its own float32 ``[3, m, d]``.
    sum       adds the splits in order, and writes dgate, dup and ddown.

Never in memory: anything of ``[T, m]``, forward or backward. The price is that the backward makes
11 products, where 6 would do had the forward kept four tensors of that size; rows of a width that
is no power of two pay for the wider block too. All sums are in an order that depends on shapes
alone: the same bits in every run.

Layout: everything contiguous; other inputs are copied. Products are of u's dtype (float32: in
float32 proper, not in TF32), all else is float32, rounded once. ``d`` is a constant of a kernel, so
that loads are as wide as its divisors allow; a block of rows is as wide as the next power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.launch import architecture
from ladder_kernels.ops import _triton
from ladder_kernels.ops._numeric import flatten_rows

__all__ = ["side_mlp", "side_mlp_backward", "unsupported"]


@dataclass(frozen=True)
class _Tile:
    """What a program holds: tokens, and channels inside the MLP at a time."""

    tokens: int
    inner: int
    warps: int
    stages: int


_Table = Mapping[bool, Mapping[str, Mapping[int, _Tile]]]

# By whether products are of float32, which no tensor core multiplies exactly, by architecture, and
# by the widest stream that it serves. A program's rows of 256 channels fill the registers; what
# RDNA's matrix instructions read is in registers twice. Modelled: nothing was timed.
_FORWARD: _Table = {
    False: {
        "": {64: _Tile(64, 32, 4, 2), 128: _Tile(32, 32, 4, 2), 256: _Tile(32, 32, 8, 2)},
        "gfx9": {256: _Tile(32, 16, 4, 1)},
        "gfx1": {64: _Tile(32, 16, 4, 1)},
    },
    True: {
        "": {256: _Tile(16, 16, 8, 1)},
        "gfx9": {256: _Tile(16, 16, 4, 1)},
        "gfx1": {32: _Tile(16, 16, 8, 1)},
    },
}
_ROWS: _Table = {
    False: {
        "": {64: _Tile(32, 32, 4, 2), 128: _Tile(16, 64, 4, 2), 256: _Tile(16, 32, 4, 2)},
        "gfx9": {256: _Tile(16, 16, 4, 1)},
        "gfx1": {64: _Tile(16, 16, 4, 1)},
    },
    True: {
        "": {256: _Tile(16, 16, 8, 1)},
        "gfx9": {256: _Tile(16, 16, 4, 1)},
        "gfx1": {32: _Tile(16, 16, 8, 1)},
    },
}
_MATRICES: _Table = {
    False: {
        "": {128: _Tile(64, 16, 4, 2), 256: _Tile(64, 16, 8, 2)},
        "gfx9": {256: _Tile(32, 16, 4, 1)},
        "gfx1": {64: _Tile(16, 16, 4, 1)},
    },
    True: {"": {256: _Tile(16, 16, 4, 1)}, "gfx1": {32: _Tile(16, 16, 8, 1)}},
}
# What a matrix product takes at least.
_NARROWEST = 16
# Enough programs to occupy a GPU; the matrices' splits of T add up to no more than that.
_PROGRAMS = 128
# Channels inside the MLP of a program that adds up splits.
_SUMMED = 16
_SUM_WARPS = 4


def unsupported(first: Tensor, *rest: object) -> str | None:
    """Say why a call cannot run in Triton; ``None`` if it can.

    Args:
        first: The side stream, or its gradient.
        *rest: What comes after it.
    """
    reason = _triton.unsupported(first, products=True) or _triton.without_matrix_units(first.device)
    if reason is not None:
        return reason
    width, widest = first.shape[-1], max(_tiles(_FORWARD, first))
    if width > widest:
        return (
            f"a side stream of {width} channels is wider than the {widest} that a program holds on "
            f"{architecture(first.device)}"
        )
    return None


@triton.jit
def _side_mlp_stream(
    u,  # [T, D]
    norm_weight,  # [D]
    tokens,  # [TOKENS] int64
    T,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows of u ``[TOKENS, WIDTH]``, what normalises them, and the weights, all in float32."""
    columns = tl.arange(0, WIDTH)
    inside = (tokens < T)[:, None] & (columns < D)[None, :]
    at = tokens[:, None] * D + columns[None, :]
    stream = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(stream * stream, 1) / D + eps)
    weight = tl.load(norm_weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    return stream, scale, weight


@triton.jit
def _side_mlp_forward_kernel(
    u,  # [T, D]
    norm_weight,  # [D]
    gate,  # [m, D]
    up,  # [m, D]
    down,  # [D, m]
    y,  # [T, D]
    T,
    m,
    eps,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    dtype = u.dtype.element_ty
    tokens = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    along = tl.arange(0, INNER)
    is_column = columns < D
    stream, scale, weight = _side_mlp_stream(u, norm_weight, tokens, T, eps, D, WIDTH)
    x = (stream * scale[:, None] * weight[None, :]).to(dtype)
    at_rows = along[:, None].to(tl.int64) * D + columns[None, :]
    at_gate, at_up = gate + at_rows, up + at_rows
    at_down = down + columns[:, None].to(tl.int64) * m + along[None, :]
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for start in range(0, m, INNER):
        left = along < m - start
        in_rows = left[:, None] & is_column[None, :]
        of_gate = tl.load(at_gate, mask=in_rows, other=0.0)
        of_up = tl.load(at_up, mask=in_rows, other=0.0)
        of_down = tl.load(at_down, mask=is_column[:, None] & left[None, :], other=0.0)
        at_gate += INNER * D
        at_up += INNER * D
        at_down += INNER
        a = tl.dot(x, tl.trans(of_gate), input_precision="ieee")
        b = tl.dot(x, tl.trans(of_up), input_precision="ieee")
        joined = (a * tl.sigmoid(a) * b).to(dtype)
        total = tl.dot(joined, tl.trans(of_down), total, input_precision="ieee")
    at = tokens[:, None] * D + columns[None, :]
    inside = (tokens < T)[:, None] & is_column[None, :]
    total += tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(dtype), mask=inside)


@triton.jit
def _side_mlp_slopes(a, b, f, dtype: tl.constexpr):
    """What is inside, and its gradients to a and b, from the gradient f to it, all rounded."""
    s = tl.sigmoid(a)
    silu = a * s
    joined = (silu * b).to(dtype)
    da = (f * b * s * (1.0 + a * (1.0 - s))).to(dtype)
    db = (f * silu).to(dtype)
    return joined, da, db


@triton.jit
def _side_mlp_rows_kernel(
    grad,  # [T, D]
    u,  # [T, D]
    norm_weight,  # [D]
    gate,  # [m, D]
    up,  # [m, D]
    down,  # [D, m]
    du,  # [T, D]
    partial,  # [programs, D] float32, sums over tokens of the norm weight's gradient
    normalized,  # [T, D]
    T,
    m,
    eps,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    dtype = u.dtype.element_ty
    tokens = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    along = tl.arange(0, INNER)
    is_column = columns < D
    at = tokens[:, None] * D + columns[None, :]
    inside = (tokens < T)[:, None] & is_column[None, :]
    stream, scale, weight = _side_mlp_stream(u, norm_weight, tokens, T, eps, D, WIDTH)
    x = (stream * scale[:, None] * weight[None, :]).to(dtype)
    tl.store(normalized + at, x, mask=inside)
    e = tl.load(grad + at, mask=inside, other=0.0)
    at_rows = along[:, None].to(tl.int64) * D + columns[None, :]
    at_gate, at_up = gate + at_rows, up + at_rows
    at_down = down + columns[:, None].to(tl.int64) * m + along[None, :]
    dx = tl.zeros((TOKENS, WIDTH), tl.float32)
    for start in range(0, m, INNER):
        left = along < m - start
        in_rows = left[:, None] & is_column[None, :]
        of_gate = tl.load(at_gate, mask=in_rows, other=0.0)
        of_up = tl.load(at_up, mask=in_rows, other=0.0)
        of_down = tl.load(at_down, mask=is_column[:, None] & left[None, :], other=0.0)
        at_gate += INNER * D
        at_up += INNER * D
        at_down += INNER
        a = tl.dot(x, tl.trans(of_gate), input_precision="ieee")
        b = tl.dot(x, tl.trans(of_up), input_precision="ieee")
        f = tl.dot(e, of_down, input_precision="ieee")
        _, da, db = _side_mlp_slopes(a, b, f, dtype)
        dx = tl.dot(da, of_gate, dx, input_precision="ieee")
        dx = tl.dot(db, of_up, dx, input_precision="ieee")
    stream, scale, weight = _side_mlp_stream(u, norm_weight, tokens, T, eps, D, WIDTH)
    stream *= scale[:, None]
    at_partial = partial + tl.program_id(0).to(tl.int64) * D + columns
    tl.store(at_partial, tl.sum(dx * stream, 0), mask=is_column)
    dx *= weight[None, :]
    shared = tl.sum(dx * stream, 1) / D
    dx = (dx - stream * shared[:, None]) * scale[:, None]
    dx += tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(du + at, dx.to(dtype), mask=inside)


@triton.jit
def _side_mlp_matrices_kernel(
    grad,  # [T, D]
    normalized,  # [T, D]
    gate,  # [m, D]
    up,  # [m, D]
    down,  # [D, m]
    partial,  # [splits, 3, m, D] float32
    T,
    m,
    size,  # m * D
    share,  # tokens of a split, a multiple of TOKENS
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    dtype = normalized.dtype.element_ty
    inner = (tl.program_id(0) * INNER + tl.arange(0, INNER)).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    is_column = columns < D
    inside = (inner < m)[:, None] & is_column[None, :]
    at = inner[:, None] * D + columns[None, :]
    of_gate = tl.load(gate + at, mask=inside, other=0.0)
    of_up = tl.load(up + at, mask=inside, other=0.0)
    at_down = down + columns[None, :].to(tl.int64) * m + inner[:, None]
    of_down = tl.load(at_down, mask=inside, other=0.0)
    dgate = tl.zeros((INNER, WIDTH), tl.float32)
    dup = tl.zeros((INNER, WIDTH), tl.float32)
    ddown = tl.zeros((INNER, WIDTH), tl.float32)
    tokens = split * share + tl.arange(0, TOKENS)
    for start in range(0, share, TOKENS):
        is_row = (tokens < T - start)[:, None] & is_column[None, :]
        at_row = (tokens + start)[:, None] * D + columns[None, :]
        x = tl.load(normalized + at_row, mask=is_row, other=0.0)
        e = tl.load(grad + at_row, mask=is_row, other=0.0)
        a = tl.dot(of_gate, tl.trans(x), input_precision="ieee")
        b = tl.dot(of_up, tl.trans(x), input_precision="ieee")
        f = tl.dot(of_down, tl.trans(e), input_precision="ieee")
        joined, da, db = _side_mlp_slopes(a, b, f, dtype)
        dgate = tl.dot(da, x, dgate, input_precision="ieee")
        dup = tl.dot(db, x, dup, input_precision="ieee")
        ddown = tl.dot(joined, e, ddown, input_precision="ieee")
    at_partial = partial + split * 3 * size + at
    tl.store(at_partial, dgate, mask=inside)
    tl.store(at_partial + size, dup, mask=inside)
    tl.store(at_partial + 2 * size, ddown, mask=inside)


@triton.jit
def _side_mlp_sum_kernel(
    partial,  # [splits, 3, m, D] float32
    dgate,  # [m, D]
    dup,  # [m, D]
    ddown,  # [D, m]
    splits,
    m,
    size,  # m * D
    D: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    inner = (tl.program_id(0) * INNER + tl.arange(0, INNER)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = (inner < m)[:, None] & (columns < D)[None, :]
    at = inner[:, None] * D + columns[None, :]
    of_gate = tl.zeros((INNER, WIDTH), tl.float32)
    of_up = tl.zeros((INNER, WIDTH), tl.float32)
    of_down = tl.zeros((INNER, WIDTH), tl.float32)
    at_partial = partial + at
    for _ in range(0, splits):
        of_gate += tl.load(at_partial, mask=inside, other=0.0)
        of_up += tl.load(at_partial + size, mask=inside, other=0.0)
        of_down += tl.load(at_partial + 2 * size, mask=inside, other=0.0)
        at_partial += 3 * size
    dtype = dgate.dtype.element_ty
    tl.store(dgate + at, of_gate.to(dtype), mask=inside)
    tl.store(dup + at, of_up.to(dtype), mask=inside)
    at_down = ddown + columns[:, None].to(tl.int64) * m + inner[None, :]
    tl.store(at_down, tl.trans(of_down).to(dtype), mask=tl.trans(inside))


def _width(d: int) -> int:
    """How wide a block of rows of ``d`` channels is."""
    return max(_NARROWEST, triton.next_power_of_2(d))


def _tiles(table: _Table, u: Tensor) -> Mapping[int, _Tile]:
    return _triton.by_architecture(table[u.dtype == torch.float32], u.device)


def _tile(table: _Table, u: Tensor) -> _Tile:
    tiles = _tiles(table, u)
    width = _width(u.shape[-1])
    return tiles[min(each for each in tiles if each >= width)]


def _matrix(value: Tensor) -> Tensor:
    """``[..., d]`` as contiguous ``[T, d]``."""
    return flatten_rows(value).contiguous()


def side_mlp(
    u: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """Return ``y``, ``[..., d]`` in u's dtype; as the reference's."""
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if u.numel() == 0:
        return out
    stream = _matrix(u)
    (T, d), m = stream.shape, gate.shape[0]
    tile = _tile(_FORWARD, stream)
    _triton.launch(
        _side_mlp_forward_kernel,
        (triton.cdiv(T, tile.tokens),),
        stream,
        *(value.contiguous() for value in (norm_weight, gate, up, down)),
        out,
        T,
        m,
        eps,
        **_constants(tile, d),
    )
    return out


def _constants(tile: _Tile, d: int) -> dict[str, int]:
    return {
        "D": d,
        "TOKENS": tile.tokens,
        "INNER": tile.inner,
        "WIDTH": _width(d),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def side_mlp_backward(
    grad: Tensor,
    u: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    need_stream: bool,
    need_norm: bool,
    need_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(du, dnorm_weight, dgate, dup, ddown)``; as the reference's."""
    weights = [value.contiguous() for value in (gate, up, down)]
    # Zeros are right where there is nothing to sum over.
    found = [
        torch.zeros(value.shape if need else (0,), dtype=u.dtype, device=u.device)
        for value, need in (
            (u, need_stream),
            (norm_weight, need_norm),
            *((value, need_matrices) for value in weights),
        )
    ]
    if u.numel() > 0:
        e = _matrix(grad)
        norm_weight = norm_weight.contiguous()
        du, partial, normalized = _row_gradients(e, _matrix(u), norm_weight, weights, eps)
        if need_stream:
            found[0] = du.view(u.shape)
        if need_norm:
            found[1] = partial.sum(0).to(u.dtype)
        if need_matrices and gate.shape[0] > 0:
            _write_matrix_gradients(e, normalized, weights, found[2:])
    du, dnorm, dgate, dup, ddown = found
    return du, dnorm, dgate, dup, ddown


def _row_gradients(
    grad: Tensor, u: Tensor, norm_weight: Tensor, weights: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel ``rows`` writes: du, the partial sums, the normalised rows."""
    T, d = u.shape
    tile = _tile(_ROWS, u)
    programs = triton.cdiv(T, tile.tokens)
    du, normalized = torch.empty_like(u), torch.empty_like(u)
    partial = torch.empty(programs, d, dtype=torch.float32, device=u.device)
    _triton.launch(
        _side_mlp_rows_kernel,
        (programs,),
        grad,
        u,
        norm_weight,
        *weights,
        du,
        partial,
        normalized,
        T,
        weights[0].shape[0],
        eps,
        **_constants(tile, d),
    )
    return du, partial, normalized


def _write_matrix_gradients(
    grad: Tensor, normalized: Tensor, weights: list[Tensor], found: list[Tensor]
) -> None:
    """Write dgate, dup and ddown, in this order, into ``found``."""
    (T, d), m = grad.shape, weights[0].shape[0]
    tile = _tile(_MATRICES, grad)
    slices = triton.cdiv(m, tile.inner)
    splits = max(1, min(_PROGRAMS // slices, triton.cdiv(T, tile.tokens)))
    share = triton.cdiv(triton.cdiv(T, splits), tile.tokens) * tile.tokens
    partial = torch.empty(splits, 3, m, d, dtype=torch.float32, device=grad.device)
    _triton.launch(
        _side_mlp_matrices_kernel,
        (slices, splits),
        grad,
        normalized,
        *weights,
        partial,
        T,
        m,
        m * d,
        share,
        **_constants(tile, d),
    )
    _triton.launch(
        _side_mlp_sum_kernel,
        (triton.cdiv(m, _SUMMED),),
        partial,
        *found,
        splits,
        m,
        m * d,
        D=d,
        INNER=_SUMMED,
        WIDTH=_width(d),
        num_warps=_SUM_WARPS,
    )
