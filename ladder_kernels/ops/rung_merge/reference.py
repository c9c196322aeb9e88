"""A rung's merge in plain PyTorch: design section 3's ``z_i`` and ``u_i``.

    z = sum_j n(tap_j) @ down_j^T        n(x) = x / sqrt(mean(x^2) + eps), no weight
    u = s + z                            mode "sum"
    u = g * s + (1 - g) * z              modes "gate" (scalar g) and "channel" (g of [d])

Everything inside is float32 (float64 for float64), rounded once at the end. Taps are normalised a
block of ``TOKENS`` rows at a time, never as a whole, and none is kept for the backward pass, which
normalises again.

Gradients, with ``e`` the gradient of ``u`` and ``G_j = e^T @ n(tap_j)`` ``[d, D]``:

    ds      = g * e
    ddown_j = (1 - g) * G_j
    dg      = sum over tokens of e * (s - z)
            = sum_t e * s  -  sum_j sum_k G_j * down_j

so the gradient of the gate needs neither ``z`` nor a second projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ladder_kernels.ops._numeric import accumulation_dtype, blocks, flatten_rows
from ladder_kernels.ops.rms_norm.reference import normalize

__all__ = ["TOKENS", "rung_merge", "rung_merge_backward"]

TOKENS = 1024
"""Rows of a tap that are normalised at a time: a workspace of at most 3 x TOKENS x D numbers."""


def rung_merge(
    side: Tensor,
    taps: Sequence[Tensor],
    downs: Sequence[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
) -> Tensor:
    """Return ``u``, ``[..., d]`` in side's dtype."""
    dtype = accumulation_dtype(side.dtype)
    stream = flatten_rows(side).to(dtype)
    merged = torch.zeros_like(stream, memory_format=torch.contiguous_format)
    for tap, down in zip(taps, downs, strict=True):
        rows, weight = flatten_rows(tap), down.to(dtype).t()
        for start, stop in blocks(rows.shape[0], TOKENS):
            merged[start:stop].addmm_(normalize(rows[start:stop], eps, dtype), weight)
    if mode == "sum" or gate is None:
        merged += stream
    else:
        merged.lerp_(stream, gate.to(dtype))
    return merged.to(side.dtype).view(side.shape)


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
    """Return ``(dside, ddowns, dgate)``; those that are not needed are empty."""
    dtype = accumulation_dtype(side.dtype)
    along = flatten_rows(grad).to(dtype)
    weight = None if mode == "sum" or gate is None else gate.to(dtype).reshape(-1)

    dside = side.new_empty(0)
    if need_side:
        wide = along if weight is None else along * weight
        dside = torch.empty_like(side, memory_format=torch.contiguous_format)
        dside.view(along.shape).copy_(wide)

    # A value per channel; the gradient of a scalar gate is their sum. Its two halves nearly cancel:
    # they are multiplied and summed in float64.
    dgate = along.new_zeros(along.shape[1], dtype=torch.float64)
    if need_gate:
        dgate += (along.double() * flatten_rows(side)).sum(0)
    ddowns = []
    for tap, down, needed in zip(taps, downs, need_downs, strict=True):
        if not (needed or need_gate):
            ddowns.append(down.new_empty(0))
            continue
        rows = flatten_rows(tap)
        product = along.new_zeros(down.shape)
        for start, stop in blocks(rows.shape[0], TOKENS):
            product.addmm_(along[start:stop].t(), normalize(rows[start:stop], eps, dtype))
        if need_gate:
            dgate -= (product.double() * down).sum(1)
        if weight is not None:
            product *= (1 - weight).unsqueeze(1)
        ddowns.append(product.to(down.dtype) if needed else down.new_empty(0))
    if gate is None or not need_gate:
        return dside, ddowns, side.new_empty(0)
    if mode == "gate":
        dgate = dgate.sum()
    return dside, ddowns, dgate.to(gate.dtype).reshape(gate.shape)
