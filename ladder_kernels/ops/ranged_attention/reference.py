"""Attention over ranges of keys on PyTorch's ``scaled_dot_product_attention``; differentiable.

Neighbouring queries that share the beginning of their range, a document, are attended at once over
their keys alone, so that the cost is that of the documents and not of the whole row. Where ranges
begin anew too often, as in a sliding window, one mask over all keys says who sees whom.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["attend_under_mask", "ranged_attention"]

_SHORTEST_RUN = 16


def ranged_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float | None
) -> Tensor:
    """Return ``softmax(scale * q @ k^T) @ v`` over ranges, ``[B, S, H * hd]``.

    Args:
        q: ``[B, H, S, hd]``.
        k: ``[B, Hkv, T, hd]``.
        v: ``[B, Hkv, T, hd]``.
        first: int64 ``[B, S]``, or ``None``.
        scale: Factor on the scores; ``None`` for ``hd ** -0.5``.
    """
    past = k.shape[2] - q.shape[2]
    if first is None:
        out = attend_under_mask(q, k, v, _causal(q, past), scale)
    elif torch.compiler.is_compiling():  # into a graph, which may not depend on numbers
        out = attend_under_mask(q, k, v, _seen(first[:, None], k.shape[2]), scale)
    else:
        rows = [
            _row(q[b : b + 1], k[b : b + 1], v[b : b + 1], first[b], scale)
            for b in range(q.shape[0])
        ]
        out = torch.cat(rows) if rows else q
    return out.transpose(1, 2).flatten(2)


def _row(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float | None) -> Tensor:
    """One sequence, ``[1, H, S, hd]``."""
    past = k.shape[2] - q.shape[2]
    starts, lengths = first.unique_consecutive(return_counts=True)
    if starts.numel() * _SHORTEST_RUN > first.numel():
        return attend_under_mask(q, k, v, _seen(first, k.shape[2]), scale)
    pieces, begin = [], 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        end = begin + length
        queries, seen = q[:, :, begin:end], slice(start, past + end)
        mask = _causal(queries, past + begin - start)
        pieces.append(attend_under_mask(queries, k[:, :, seen], v[:, :, seen], mask, scale))
        begin = end
    return torch.cat(pieces, dim=2)


def _seen(first: Tensor, keys: int) -> Tensor:
    """The mask ``[..., S, keys]`` of ranges that begin at ``first`` ``[..., S]``."""
    places = torch.arange(keys, device=first.device)
    last = places[keys - first.shape[-1] :, None]
    return (places <= last) & (places >= first[..., None])


def _causal(q: Tensor, past: int) -> Tensor | None:
    """The mask of queries behind ``past`` keys; ``None`` where PyTorch needs none."""
    queries = q.shape[2]
    if past == 0 or queries == 1:
        return None
    keys = torch.arange(past + queries, device=q.device)
    return keys <= keys[past:, None]


def attend_under_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attend under a mask, bool ``[..., S, T]``.

    Without one, causally (a single query: to all keys).

    Returns:
        ``[B, H, S, hd]``.
    """
    groups = q.shape[1] // k.shape[1]
    # CPU attention reads shared heads in place. On a GPU only the flash kernel does (half
    # precision, no mask); the others would fall back to materialised scores, which cost far more
    # than repeated heads.
    in_place = q.device.type == "cpu" or (
        mask is None and q.dtype in (torch.float16, torch.bfloat16)
    )
    if groups > 1 and not in_place:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    causal = mask is None
    if q.shape[2] == 1:  # a branch: under a compiler, the comparison itself is no plain bool
        causal = False
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=groups > 1 and in_place,
    )
