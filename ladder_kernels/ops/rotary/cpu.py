"""Rotary position embeddings on the native CPU kernel (``csrc/src/rotary.inc``).

Equal to the reference by bits. float64 has no native kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.ops import _native

__all__ = ["rotary_", "unsupported"]


def unsupported(q: Tensor, *_: object) -> str | None:
    """Say why a call with ``q`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(q)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the heads of ``q`` and ``k`` in place; as the reference's."""
    cos, sin = cos.contiguous(), sin.contiguous()
    for x in (q, k):
        heads = x if x.stride(-1) == 1 else x.contiguous()
        _turn(heads, cos, sin)
        if heads is not x:
            x.copy_(heads)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, length, heads, width = x.shape
    table = native.Strides(0 if cos.shape[0] == 1 else cos.stride(0), 0, cos.stride(1))
    code = _native.library().lk_rotary(
        *(_native.DTYPES[x.dtype], batch, length, heads, width // 2),
        *(x.data_ptr(), native.Strides(x.stride(0), x.stride(2), x.stride(1))),
        *(cos.data_ptr(), sin.data_ptr(), table),
        torch.get_num_threads(),
    )
    _native.check(code)
