"""Attention over ranges of keys on PyTorch's ``scaled_dot_product_attention``, and its gradients.

Neighbouring queries that share the beginning of their range, a document, are attended at once over
their keys alone, so that the cost is that of the documents and not of the whole row. Where ranges
begin anew too often, as in a sliding window, one mask over all keys says who sees whom.

The gradients, with ``p = exp(scale * q @ k^T - lse)`` over a query's range, ``lse`` the logarithm
of what softmax divides by and ``e`` the gradient of ``out``,

    dv = p^T @ e        ds = scale * p * (e @ v^T - (e * out).sum(-1))
    dk = ds^T @ q       dq = ds @ k

compute the weights ``p`` again, a block of queries at a time (FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ladder_kernels.ops._numeric import accumulation_dtype, blocks

__all__ = [
    "attend_under_mask",
    "differentiable_attention",
    "ranged_attention",
    "ranged_attention_backward",
]

_SHORTEST_RUN = 16
_QUERIES = 128  # of which scores exist at a time


def ranged_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale * q @ k^T) @ v`` over ranges, and what its gradients need.

    Args:
        q: ``[B, H, S, hd]``.
        k: ``[B, Hkv, T, hd]``.
        v: ``[B, Hkv, T, hd]``.
        first: int64 ``[B, S]``, or ``None``.
        scale: Factor on the scores.
        need_grad: Whether gradients are wanted.

    Returns:
        ``[B, S, H * hd]``, and the logarithm of each query's sum of exponentials, ``[B, H, S]`` in
        float32 (float64 for float64), or ``[0]`` without ``need_grad``.
    """
    out = differentiable_attention(q, k, v, first, scale)
    lse = q.new_empty(q.shape[:3] if need_grad else (0,), dtype=accumulation_dtype(q.dtype))
    if need_grad:
        for queries, _, scores in _score_blocks(q, k, first, scale):
            lse[:, :, queries] = scores.logsumexp(-1).flatten(1, 2)
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
    """Return the gradients to ``q``, ``k`` and ``v``.

    Args:
        grad: The gradient of ``out``, ``[B, S, H * hd]``.
        q: ``[B, H, S, hd]``.
        k: ``[B, Hkv, T, hd]``.
        v: ``[B, Hkv, T, hd]``.
        first: int64 ``[B, S]``, or ``None``.
        scale: Factor on the scores.
        out: As :func:`ranged_attention` returned it.
        lse: As :func:`ranged_attention` returned it.

    Returns:
        ``[B, S, H, hd]`` and twice ``[B, T, Hkv, hd]``, in q's dtype.
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    along = grad.unflatten(2, (q.shape[1], -1)).transpose(1, 2).unflatten(1, groups).to(lse.dtype)
    delta = along * out.unflatten(2, (q.shape[1], -1)).transpose(1, 2).unflatten(1, groups)
    delta = delta.sum(-1, keepdim=True)
    wide_q, dq = q.unflatten(1, groups).to(lse.dtype), torch.zeros_like(along)
    wide_k, wide_v = k.to(lse.dtype), v.to(lse.dtype)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for queries, keys, scores in _score_blocks(q, k, first, scale):
        weights = (scores - lse.unflatten(1, groups)[..., queries, None]).exp_()
        e = along[..., queries, :]
        dv[:, :, keys] += (weights.transpose(-1, -2) @ e).sum(2)
        slopes = e @ wide_v[:, :, None, keys].transpose(-1, -2) - delta[..., queries, :]
        slopes *= weights * scale
        dk[:, :, keys] += (slopes.transpose(-1, -2) @ wide_q[..., queries, :]).sum(2)
        dq[..., queries, :] = slopes @ wide_k[:, :, None, keys]
    dq, dk, dv = (value.transpose(1, 2).to(q.dtype) for value in (dq.flatten(1, 2), dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _score_blocks(
    q: Tensor, k: Tensor, first: Tensor | None, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys up to their last one, and their scores.

    Those are ``[B, Hkv, H // Hkv, queries, keys]`` in the dtype of sums; ``-inf`` out of range.
    """
    dtype = accumulation_dtype(q.dtype)
    past, grouped = k.shape[2] - q.shape[2], q.unflatten(1, (k.shape[1], -1))
    first = q.new_zeros((1, q.shape[2]), dtype=torch.int64) if first is None else first
    for start, stop in blocks(q.shape[2], _QUERIES):
        queries, keys = slice(start, stop), slice(0, past + stop)
        scores = grouped[..., queries, :].to(dtype) @ k[:, :, None, keys].transpose(-1, -2).to(
            dtype
        )
        hidden = ~_seen(first[:, queries], past + stop)
        yield queries, keys, (scores * scale).masked_fill_(hidden[:, None, None], float("-inf"))


def differentiable_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float | None
) -> Tensor:
    """Return ``softmax(scale * q @ k^T) @ v`` over ranges, ``[B, S, H * hd]``.

    PyTorch's attention and its gradients, which is the one to take on a GPU.

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
