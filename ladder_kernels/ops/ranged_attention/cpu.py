"""Attention over ranges of keys on the native CPU kernel (``csrc/src/attention.inc``).

Scores exist for a block of queries and keys at a time; blocks that no query sees are not computed.
Sums are float32; the softmax is rounded to bfloat16 where q is and the processor multiplies pairs
of it (AVX512-BF16), as PyTorch rounds it too. float64 has no native kernel.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.ops import _native

__all__ = ["ranged_attention", "unsupported"]


def unsupported(q: Tensor, *_: object) -> str | None:
    """Say why a call with ``q`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(q)


def ranged_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
    """Return ``softmax(scale * q @ k^T) @ v`` over ranges; as the reference's."""
    q, k, v = (value if value.stride(-1) == 1 else value.contiguous() for value in (q, k, v))
    first = None if first is None else first.contiguous()
    batch, heads, queries, width = q.shape
    out = q.new_empty((batch, queries, heads * width))
    code = _native.library().lk_ranged_attention(
        *(_native.DTYPES[q.dtype], batch, heads, k.shape[1], queries, k.shape[2], width),
        *(q.data_ptr(), ctypes.byref(_strides(q))),
        *(k.data_ptr(), ctypes.byref(_strides(k))),
        *(v.data_ptr(), ctypes.byref(_strides(v))),
        _native.pointer(first),
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    _native.check(code)
    return out


def _strides(value: Tensor) -> native.Strides:
    return native.Strides(*value.stride()[:3])
