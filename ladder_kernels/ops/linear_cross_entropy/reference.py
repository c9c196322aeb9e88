"""Cross entropy of a linear head, in plain PyTorch, without the ``[T, V]`` logits.

For the ``T`` tokens that count (ignored ones are dropped before anything is computed),

    z = logit_scale * hidden @ head^T         l = softcap * tanh(z / softcap), or z
    loss_t = logsumexp(l_t) - l_t[label_t]

The vocabulary is swept once, ``VOCABULARY`` rows of the head at a time, for ``TOKENS`` tokens at a
time. The logsumexp is kept online: a running maximum ``m`` and a running sum of ``exp(l - m)``,
rescaled whenever ``m`` grows (Milakov and Gimelshein 2018, arXiv:1805.02867). The gradient of
``hidden`` is summed in the same sweep under the same rescaling,

    dhidden_t = logit_scale * (sum_v p_tv * s_tv * head_v  -  s_t,label * head_label)
    p = softmax(l),  s = dl/dz = 1 - (l / softcap)^2, or 1

so each block of logits is computed once, used for both, and overwritten.

Everything inside is float32 (float64 where ``hidden`` is float64), whatever the inputs are. The
workspace, in numbers of that dtype, is at most 2 x TOKENS x VOCABULARY (3 with a softcap) plus
5 x TOKENS x D plus 2 x VOCABULARY x D; it depends on neither T nor V. The order of all sums is
fixed, so the results are the same bits in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops._numeric import accumulation_dtype, blocks

__all__ = ["TOKENS", "VOCABULARY", "head_grad", "linear_cross_entropy"]

TOKENS = 1024
"""Tokens of one block."""
VOCABULARY = 1024
"""Rows of the head in one block."""


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

    Args:
        hidden: ``[T, D]``.
        head: ``[V, D]``; an NF4 head counts as dequantised to hidden's dtype.
        labels: int64 ``[T]``.
        ignore_index: the label of tokens that do not count.
        softcap: see above.
        logit_scale: see above.
        need_grad: whether the gradient is wanted.

    Returns:
        ``loss`` ``[T]`` and ``lse`` ``[T]`` in the accumulation dtype, and the gradient ``[T, D]``
        in hidden's dtype, or ``[0, D]`` if it is not needed. All are 0 at ignored tokens.

    Raises:
        ConfigError: a label is neither ``ignore_index`` nor a row of the head.
    """
    dtype = accumulation_dtype(hidden.dtype)
    kept = _kept(labels, ignore_index, head.shape[0])
    loss = hidden.new_zeros(labels.shape, dtype=dtype)
    lse = torch.zeros_like(loss)
    grad = hidden.new_zeros((hidden.shape[0] if need_grad else 0, hidden.shape[1]))
    for start, stop in blocks(kept.shape[0], TOKENS):
        tokens = kept[start:stop]
        rows = hidden[tokens].to(dtype) * logit_scale
        at_label, lse_block, grad_block = _sweep(
            rows, head, labels[tokens], softcap, hidden.dtype, need_grad
        )
        lse[tokens] = lse_block
        loss[tokens] = lse_block - at_label
        if grad_block is not None:
            grad[tokens] = grad_block.mul_(logit_scale).to(hidden.dtype)
    return loss, lse, grad


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
    """Return the gradient of a dense head, ``[V, D]`` in its dtype.

    ``grad_loss`` ``[T]`` is the gradient of each token's loss, ``lse`` ``[T]`` what the forward
    returned. Logits are computed again, block by block.
    """
    dtype = accumulation_dtype(hidden.dtype)
    kept = _kept(labels, ignore_index, head.shape[0])
    result = torch.empty_like(head, memory_format=torch.contiguous_format)
    for first, last in blocks(head.shape[0], VOCABULARY):
        weight = head[first:last].to(dtype)
        total = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        for start, stop in blocks(kept.shape[0], TOKENS):
            tokens = kept[start:stop]
            rows = hidden[tokens].to(dtype) * logit_scale
            logits, slope = _logits(rows, weight, softcap)
            column, inside = _columns(labels[tokens], first, last)
            change = logits.sub_(lse[tokens].unsqueeze(1)).exp_()
            change.scatter_(1, column, change.gather(1, column) - inside.to(dtype))
            if slope is not None:
                change *= slope
            change *= grad_loss[tokens].to(dtype).unsqueeze(1)
            total.addmm_(change.t(), rows)
        result[first:last] = total
    return result


def _kept(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """Indices of the tokens that count, after checking that their labels are rows of the head."""
    kept = (labels != ignore_index).nonzero().squeeze(1)
    if kept.numel() > 0:
        low, high = (int(bound) for bound in labels[kept].aminmax())
        if low < 0 or high >= vocabulary:
            raise ConfigError(
                f"linear_cross_entropy: labels holds {low if low < 0 else high}; allowed are 0 to "
                f"{vocabulary - 1} and ignore_index ({ignore_index})"
            )
    return kept


def _sweep(
    rows: Tensor,
    head: Tensor | NF4Weight,
    labels: Tensor,
    softcap: float | None,
    head_dtype: torch.dtype,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pass over the vocabulary: the label's logit, the logsumexp and the gradient to rows."""
    maximum = rows.new_full((rows.shape[0], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    at_label = torch.zeros_like(maximum)
    expected = torch.zeros_like(rows) if need_grad else None
    label_rows = torch.zeros_like(rows) if need_grad else None
    for first, last in blocks(head.shape[0], VOCABULARY):
        weight = _head_rows(head, first, last, head_dtype).to(rows.dtype)
        logits, slope = _logits(rows, weight, softcap)
        column, inside = _columns(labels, first, last)
        at_label = torch.where(inside, logits.gather(1, column), at_label)
        highest = torch.maximum(maximum, logits.amax(1, keepdim=True))
        shrink = (maximum - highest).exp_()
        share = logits.sub_(highest).exp_()
        total.mul_(shrink).add_(share.sum(1, keepdim=True))
        maximum = highest
        if expected is not None and label_rows is not None:
            label_row = weight[column.squeeze(1)]
            if slope is not None:
                share *= slope
                label_row *= slope.gather(1, column)
            expected.mul_(shrink).addmm_(share, weight)
            label_rows = torch.where(inside, label_row, label_rows)
    lse = total.log().add_(maximum)
    if expected is None or label_rows is None:
        return at_label.squeeze(1), lse.squeeze(1), None
    expected.div_(total).sub_(label_rows)
    return at_label.squeeze(1), lse.squeeze(1), expected


def _head_rows(head: Tensor | NF4Weight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if isinstance(head, NF4Weight):
        return head.dequantize_rows(first, last, dtype)
    return head[first:last]


def _logits(rows: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """A block of logits and, with a softcap, their slope dl/dz."""
    logits = rows @ weight.t()
    if softcap is None:
        return logits, None
    logits.div_(softcap).tanh_()
    slope = logits.square().neg_().add_(1)
    return logits.mul_(softcap), slope


def _columns(labels: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Each label's column in the block ``[first, last)``, ``[T, 1]``, and whether it is in it."""
    column = (labels - first).unsqueeze(1)
    inside = (column >= 0) & (column < last - first)
    return column.clamp_(0, last - first - 1), inside
