"""Attention over ranges of keys on the native CPU kernels.

Scores exist for a block of queries and keys at a time; blocks that no query sees are not computed
(``csrc/src/attention.inc``, ``csrc/src/attention_backward.inc``). Sums are float32; the softmax is
rounded to bfloat16 where q is and the processor multiplies pairs of it (AVX512-BF16), as PyTorch
rounds it too. float64 has no native kernel.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.ops import _native

__all__ = ["ranged_attention", "ranged_attention_backward", "unsupported"]


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call whose first argument is ``x`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(x)


def ranged_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale * q @ k^T) @ v`` over ranges, and the logsumexps; as the reference."""
    batch, heads, queries, width = q.shape
    out = q.new_empty((batch, queries, heads * width))
    lse = q.new_empty((batch, heads, queries) if need_grad else (0,), dtype=torch.float32)
    _call(
        "lk_ranged_attention",
        *(q, k, v, first, scale),
        out.data_ptr(),
        lse.data_ptr() if need_grad else None,
    )
    return out, lse


def ranged_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to ``q``, ``k`` and ``v``; as the reference's."""
    sums = [
        value.new_zeros((batch, tokens, heads, width), dtype=torch.float32)
        for value in (q, k, v)
        for batch, heads, tokens, width in (value.shape,)
    ]
    grad, out = grad.contiguous(), out.contiguous()
    pointers = [value.data_ptr() for value in (grad, out, lse.contiguous(), *sums)]
    _call("lk_ranged_attention_backward", q, k, v, first, scale, *pointers)
    dv, dk, dq = (sums.pop().to(q.dtype) for _ in range(3))  # one after another leaves float32
    return dq, dk, dv


def _call(
    entry: str, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, *rest: Any
) -> None:
    """Call an entry of the library whose arguments begin with the inputs of attention."""
    q, k, v = (value if value.stride(-1) == 1 else value.contiguous() for value in (q, k, v))
    first = None if first is None else first.contiguous()
    batch, heads, queries, width = q.shape
    code = getattr(_native.library(), entry)(
        *(_native.DTYPES[q.dtype], batch, heads, k.shape[1], queries, k.shape[2], width),
        *(q.data_ptr(), ctypes.byref(_strides(q))),
        *(k.data_ptr(), ctypes.byref(_strides(k))),
        *(v.data_ptr(), ctypes.byref(_strides(v))),
        _native.pointer(first),
        scale,
        *rest,
        torch.get_num_threads(),
    )
    _native.check(code)


def _strides(value: Tensor) -> native.Strides:
    return native.Strides(*value.stride()[:3])
