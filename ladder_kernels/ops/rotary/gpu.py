"""Rotary position embeddings in Triton, in place; the maths is in ``reference.py``.

Pipeline: one program for some heads of one token. It reads the token's cosines and sines once, both
halves of its heads, and writes both halves. Queries and keys are a launch each. Never in memory:
the products, which the reference writes as tensors of half of ``q``.

Layout: any strides, of the tables as well. Equal to the reference by bits: each product and each
sum is rounded to x's dtype, so the compiler may not contract a product and a sum into one rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.ops import _triton

__all__ = ["rotary_", "unsupported"]

_WIDEST = 65536
_ELEMENTS = 2048
"""Half a head times how many heads a program turns, where a head is not wider by itself."""
_WARPS = 4


def unsupported(q: Tensor, *_: object) -> str | None:
    """Say why a call with ``q`` cannot run in Triton; ``None`` if it can."""
    if q.shape[-1] > _WIDEST:
        return f"a head of {q.shape[-1]} channels is wider than the {_WIDEST} that a program holds"
    return _triton.unsupported(q)


@triton.jit
def _rotary_turn_kernel(
    x,  # [B, S, H, 2 * half], turned in place
    cos,  # [B or 1, S, 1, half]
    sin,  # as cos
    x_batch,
    x_token,
    x_head,
    x_channel,
    cos_batch,  # 0 where the batch shares one table
    cos_token,
    cos_channel,
    sin_batch,
    sin_token,
    sin_channel,
    S,
    H,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    dtype = x.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // S, program % S
    channels = tl.arange(0, HALF).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    turned = channels < half
    angle = cos + batch * cos_batch + token * cos_token + channels * cos_channel
    c = tl.load(angle, mask=turned, other=0.0).to(tl.float32)[None, :]
    angle = sin + batch * sin_batch + token * sin_token + channels * sin_channel
    s = tl.load(angle, mask=turned, other=0.0).to(tl.float32)[None, :]

    start = x + batch * x_batch + token * x_token
    at_first = start + heads[:, None] * x_head + channels[None, :] * x_channel
    at_second = start + heads[:, None] * x_head + (channels + half)[None, :] * x_channel
    inside = (heads < H)[:, None] & turned[None, :]
    first = tl.load(at_first, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at_second, mask=inside, other=0.0).to(tl.float32)
    own, other = (first * c).to(dtype).to(tl.float32), (second * s).to(dtype).to(tl.float32)
    tl.store(at_first, (own - other).to(dtype), mask=inside)
    own, other = (second * c).to(dtype).to(tl.float32), (first * s).to(dtype).to(tl.float32)
    tl.store(at_second, (own + other).to(dtype), mask=inside)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the heads of ``q`` and ``k`` in place; as the reference's."""
    for x in (q, k):
        _turn(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.numel() == 0:
        return
    batch, length, heads, width = x.shape
    block = triton.next_power_of_2(width // 2)
    at_once = max(1, min(triton.next_power_of_2(heads), _ELEMENTS // block))
    _triton.launch(
        _rotary_turn_kernel,
        (batch * length, triton.cdiv(heads, at_once)),
        x,
        cos,
        sin,
        *x.stride(),
        *_strides(cos),
        *_strides(sin),
        length,
        heads,
        width // 2,
        HEADS=at_once,
        HALF=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


def _strides(table: Tensor) -> tuple[int, int, int]:
    """From one batch entry, token and channel to the next."""
    return 0 if table.shape[0] == 1 else table.stride(0), table.stride(1), table.stride(3)
