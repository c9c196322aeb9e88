"""Rotary position embeddings in place, in plain PyTorch (RoFormer, arXiv:2104.09864).

Channel ``i`` of a head turns with channel ``i + hd / 2``, as in transformers' llama:

    x[i]          = x[i] * cos[i] - x[i + hd / 2] * sin[i]
    x[i + hd / 2] = x[i + hd / 2] * cos[i] + x[i] * sin[i]

Each product and each sum is rounded to x's dtype, as transformers rounds them.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["rotary_"]


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the heads of ``q`` and ``k`` in place.

    Args:
        q: ``[B, S, H, hd]``.
        k: ``[B, S, Hkv, hd]``.
        cos: ``[B or 1, S, 1, hd / 2]``.
        sin: As ``cos``.
    """
    for x in (q, k):
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        from_second, from_first = second * sin, first * sin
        first.mul_(cos).sub_(from_second)
        second.mul_(cos).add_(from_first)
