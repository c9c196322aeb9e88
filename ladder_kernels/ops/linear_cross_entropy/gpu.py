"""Cross entropy of a linear head in Triton, without the ``[T, V]`` logits; see ``reference.py``.

Here are the launchers, in ``gpu_forward.py`` and ``gpu_gradient.py`` the kernels.

As in the reference, the vocabulary is swept once, a chunk of the head at a time, for a block of
tokens at a time, and every logit is computed once, for the loss and for the gradient of ``hidden``.
(To store only logsumexps and to compute logits again for the gradient, as attention does, costs a
third matrix product of this size, and since no program can hold a ``[tokens, D]`` sum, it would
need the workspace below all the same.) For each chunk:

    logits    a program makes a tile of logits and keeps, of the tokens' labels apart, each token's
              maximum ``m`` in the tile, its sum of exp(l - m), and the tile's share exp(l - m) * s
              in the dtype of the products: at most 1, the largest of a token exactly 1, so that
              float16 and bfloat16 keep what is small as long as it matters
    combine   the running maximum and sum of each token, and the factor of each tile
    expected  sum of share @ head, scaled tile by tile, onto a float32 sum; the rows of labels are
              put aside as they come by, so an NF4 head is dequantised once

and after the sweep ``hidden`` puts the gradient together: labels join the sums at the end, so tiny
losses and their gradients are right. The gradient of a dense head has two kernels of its own:
``change`` makes (p - [v = label]) * s * dloss of a chunk anew, ``head`` multiplies it by hidden.

Nothing waits for the device. Tokens that count are put first by a stable sort, and kernels read
from memory how many these are: blocks of ignored tokens end at once, without a product (memory and
an NF4 head's dequantisation are for all tokens). A label out of range is a device assertion on a
GPU, as in PyTorch's own cross entropy.

Memory: at most ``TOKENS`` x ``VOCABULARY`` shares and two [TOKENS, D] (float32, and the head's
dtype), for an NF4 head ``VOCABULARY`` dequantised rows, and a few numbers a token and tile. No
atomics, every sum in an order that depends on shapes alone: the same bits in every run.

Layout: rows of adjacent elements, any distance apart. If hidden and head have one dtype, products
are of it (float32: in float32 proper, not in TF32), else of float32; sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _triton
from ladder_kernels.ops._numeric import blocks
from ladder_kernels.ops.linear_cross_entropy.gpu_forward import (
    _linear_cross_entropy_combine_kernel,
    _linear_cross_entropy_logits_kernel,
)
from ladder_kernels.ops.linear_cross_entropy.gpu_gradient import (
    _linear_cross_entropy_change_kernel,
    _linear_cross_entropy_expected_kernel,
    _linear_cross_entropy_head_kernel,
    _linear_cross_entropy_hidden_kernel,
)
from ladder_kernels.ops.linear_cross_entropy.reference import kept_tokens

__all__ = ["TOKENS", "VOCABULARY", "head_grad", "linear_cross_entropy", "unsupported"]

TOKENS = 4096
"""Tokens of one block."""
VOCABULARY = 4096
"""Rows of the head in one chunk."""


@dataclass(frozen=True)
class _Tile:
    """What a program makes, ``rows x columns``, ``inner`` numbers of each sum at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By whether products are of float32, which no tensor core multiplies exactly, and by architecture:
# RDNA has fewer registers. Modelled, but for what sm_90 has of its own, which was measured.
_LOGITS = {
    False: {"": _Tile(128, 128, 64, 8, 3), "gfx1": _Tile(64, 64, 32, 8, 2)},
    True: {"": _Tile(64, 64, 32, 8, 3)},
}
_PRODUCT = {
    False: {
        "": _Tile(128, 128, 32, 8, 4),
        "gfx1": _Tile(64, 64, 32, 8, 2),
        "sm_90": _Tile(128, 128, 64, 8, 3),
    },
    True: {"": _Tile(64, 64, 16, 8, 2)},
}
# Tokens of a program that combines tiles; numbers of a gradient's row at a time; warps of both.
_COMBINED = 32
_GRADIENT = 1024
_WARPS = 4

# A power of two that keeps small probabilities of float16 from vanishing; the largest is 1.
_CHANGE_SCALE = 2.0**14


def unsupported(*args: object) -> str | None:
    """Say why a call cannot run in Triton; ``None`` if it can."""
    tensors = [value for value in args if isinstance(value, Tensor) and value.is_floating_point()]
    return _triton.unsupported(*tensors, products=True) or _triton.without_matrix_units(
        tensors[0].device
    )


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor | NF4Weight,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each token, its logsumexp, and the loss's gradient to ``hidden``.

    As the reference's, ``loss`` and ``lse`` in float32.
    """
    hidden, labels = _triton.rows(hidden), labels.contiguous()
    T, D = hidden.shape
    grad = hidden.new_zeros((T if need_grad else 0, D))
    kept, order, count = _sorted(labels, ignore_index, head.shape[0])
    maximum = hidden.new_full((T,), torch.finfo(torch.float32).min, dtype=torch.float32)
    total, at_label = torch.zeros_like(maximum), torch.zeros_like(maximum)
    tokens = _Tokens(hidden, labels, order, count, maximum, total, at_label, softcap, logit_scale)
    for begin, end in blocks(T, TOKENS):
        _sweep(tokens, begin, end - begin, head, grad if need_grad and D > 0 else None)
    return *_losses(kept, maximum, total, at_label), grad


@dataclass(frozen=True)
class _Tokens:
    """What is known of all tokens; the last three tensors are filled by the sweeps."""

    hidden: Tensor
    labels: Tensor
    order: Tensor
    count: Tensor
    maximum: Tensor
    total: Tensor
    at_label: Tensor
    softcap: float | None
    logit_scale: float


class _Sums:
    """What the gradient of a block of tokens is made of: see the kernels that fill it."""

    def __init__(self, hidden: Tensor, head: Tensor | NF4Weight, block: int) -> None:
        of_head = hidden.dtype if isinstance(head, NF4Weight) else head.dtype
        shape = block, hidden.shape[1]
        self.label_rows = torch.empty(shape, dtype=of_head, device=hidden.device)
        self.expected = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        width = min(VOCABULARY, triton.next_power_of_2(head.shape[0]))
        dtype = _product_dtype(hidden.dtype, of_head)
        self.share = torch.empty(block, width, dtype=dtype, device=hidden.device)


def _sweep(
    tokens: _Tokens, begin: int, block: int, head: Tensor | NF4Weight, grad: Tensor | None
) -> None:
    """Pass over the vocabulary for the ``block`` tokens at positions from ``begin`` on."""
    sums = None if grad is None else _Sums(tokens.hidden, head, block)
    for first, last in blocks(head.shape[0], VOCABULARY):
        # Not bound to a name, so that no two chunks are in memory.
        _add_chunk(
            tokens, begin, block, _head_rows(head, first, last, tokens.hidden.dtype), first, sums
        )
    if grad is None or sums is None:
        return
    _triton.launch(
        _linear_cross_entropy_hidden_kernel,
        (block,),
        sums.expected,
        sums.label_rows,
        tokens.maximum,
        tokens.total,
        tokens.at_label,
        tokens.order,
        tokens.count,
        grad,
        begin,
        grad.shape[1],
        tokens.softcap,
        tokens.logit_scale,
        BLOCK=_GRADIENT,
        num_warps=_WARPS,
    )


def _add_chunk(
    tokens: _Tokens, begin: int, block: int, head: Tensor, first: int, sums: _Sums | None
) -> None:
    """Take in the head's rows from ``first`` on, ``head`` ``[rows, D]``."""
    rows, D = head.shape
    in_float32 = _product_dtype(tokens.hidden.dtype, head.dtype) == torch.float32
    device = head.device
    tile = _triton.by_architecture(_LOGITS[in_float32], device)
    tiles = triton.cdiv(rows, tile.columns)
    shrink = torch.empty(block, dtype=torch.float32, device=device)
    highest = torch.empty(tiles, block, dtype=torch.float32, device=device)
    summed = torch.empty_like(highest)
    share = None if sums is None else sums.share
    _triton.launch(
        _linear_cross_entropy_logits_kernel,
        (triton.cdiv(block, tile.rows), tiles),
        tokens.hidden,
        head,
        tokens.labels,
        tokens.order,
        tokens.count,
        tokens.at_label,
        highest,
        summed,
        share,
        tokens.hidden.stride(0),
        head.stride(0),
        0 if share is None else share.stride(0),
        begin,
        block,
        first,
        rows,
        D,
        tokens.softcap,
        tokens.logit_scale,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    _triton.launch(
        _linear_cross_entropy_combine_kernel,
        (triton.cdiv(block, _COMBINED),),
        tokens.order,
        tokens.count,
        highest,
        summed,
        tokens.maximum,
        tokens.total,
        shrink,
        begin,
        block,
        tiles,
        ROWS=_COMBINED,
        TILES=triton.next_power_of_2(tiles),
        num_warps=_WARPS,
    )
    if sums is None:
        return
    product = _triton.by_architecture(_PRODUCT[in_float32], device)
    _triton.launch(
        _linear_cross_entropy_expected_kernel,
        (triton.cdiv(block, product.rows), triton.cdiv(D, product.columns)),
        sums.share,
        highest,
        shrink,
        head,
        tokens.labels,
        tokens.order,
        tokens.count,
        sums.expected,
        sums.label_rows,
        sums.share.stride(0),
        head.stride(0),
        begin,
        block,
        first,
        rows,
        D,
        TILE=tile.columns,
        ROWS=product.rows,
        COLUMNS=product.columns,
        INNER=product.inner,
        num_warps=product.warps,
        num_stages=product.stages,
    )


def head_grad(
    grad_loss: Tensor,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Return the gradient of a dense head, ``[V, D]`` in its dtype; as the reference's."""
    hidden, head, labels = _triton.rows(hidden), _triton.rows(head), labels.contiguous()
    (T, D), V = hidden.shape, head.shape[0]
    result = torch.empty(head.shape, dtype=head.dtype, device=head.device)
    if T == 0 or result.numel() == 0:
        return result.zero_()
    kept, order, count = _sorted(labels, ignore_index, V)
    # Relative to the largest, or a mean over many tokens would leave the range of float16.
    weights = grad_loss.float().masked_fill(~kept, 0.0)
    largest = weights.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    scale = (weights / largest * _CHANGE_SCALE).contiguous()
    unit = largest * (logit_scale / _CHANGE_SCALE)
    dtype = _product_dtype(hidden.dtype, head.dtype)
    tile, product = (
        _triton.by_architecture(table[dtype == torch.float32], head.device)
        for table in (_LOGITS, _PRODUCT)
    )
    # All tokens at once, so that their sum is a program's; as much workspace as the loss's.
    tiles = min(VOCABULARY, TOKENS * VOCABULARY // T) // tile.columns
    width = max(1, min(tiles, triton.cdiv(V, tile.columns))) * tile.columns
    change = torch.empty(T, width, dtype=dtype, device=head.device)
    for first, last in blocks(V, width):
        rows = head[first:last]
        _triton.launch(
            _linear_cross_entropy_change_kernel,
            (triton.cdiv(T, tile.rows), triton.cdiv(last - first, tile.columns)),
            hidden,
            rows,
            labels,
            order,
            count,
            lse,
            scale,
            change,
            hidden.stride(0),
            rows.stride(0),
            change.stride(0),
            first,
            last - first,
            D,
            softcap,
            logit_scale,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            INNER=tile.inner,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _triton.launch(
            _linear_cross_entropy_head_kernel,
            (triton.cdiv(last - first, product.rows), triton.cdiv(D, product.columns)),
            change,
            hidden,
            order,
            count,
            unit,
            result[first:last],
            change.stride(0),
            hidden.stride(0),
            last - first,
            D,
            ROWS=product.rows,
            COLUMNS=product.columns,
            INNER=product.inner,
            num_warps=product.warps,
            num_stages=product.stages,
        )
    return result


def _product_dtype(hidden: torch.dtype, head: torch.dtype) -> torch.dtype:
    return hidden if hidden == head else torch.float32


def _head_rows(head: Tensor | NF4Weight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if isinstance(head, NF4Weight):
        return head.dequantize_rows(first, last, dtype)
    return _triton.rows(head[first:last])


def _sorted(labels: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens count, ``[T]``; the tokens with those first, ``[T]``; how many those are."""
    kept = labels != ignore_index
    if labels.device.type == "cpu":
        kept_tokens(labels, ignore_index, vocabulary)
    else:
        fits = ((labels >= 0) & (labels < vocabulary)) | ~kept
        torch.ops.aten._assert_async.msg(
            fits.all(), f"linear_cross_entropy: labels must be 0 to {vocabulary - 1} or ignored"
        )
    return kept, torch.argsort((~kept).to(torch.uint8), stable=True), kept.sum()


def _losses(
    kept: Tensor, maximum: Tensor, total: Tensor, at_label: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses and the logsumexps of a sweep, each ``[T]``; 0 at tokens that do not count."""
    highest = torch.maximum(maximum, at_label)
    others = total * (maximum - highest).exp()
    whole = others + (at_label - highest).exp()
    # Where the label leads, the rest is whole minus exactly one.
    log = torch.where(at_label == highest, others.log1p(), whole.log())
    loss, lse = log + (highest - at_label), log + highest
    return loss.masked_fill(~kept, 0.0), lse.masked_fill(~kept, 0.0)
