"""Cross entropy of a linear head, in plain PyTorch, without the ``[T, V]`` logits.

For the ``T`` tokens that count (ignored ones are dropped before anything is computed),

    z = logit_scale * hidden @ head^T         l = softcap * tanh(z / softcap), or z
    loss_t = logsumexp(l_t) - l_t[label_t]

The vocabulary is swept once, ``VOCABULARY`` rows of the head at a time, for ``TOKENS`` tokens at a
time. The logsumexp is kept online: a running maximum ``m`` and a running sum of ``exp(l - m)``,
rescaled whenever ``m`` grows (Milakov and Gimelshein 2018, arXiv:1805.02867). The gradient of
``hidden`` is summed in the same sweep under the same rescaling,

    dhidden_t = logit_scale * (sum_{v != label} p_tv * s_tv * head_v
                               - (1 - p_t,label) * s_t,label * head_label)
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

__all__ = ["TOKENS", "VOCABULARY", "head_grad", "kept_tokens", "linear_cross_entropy"]

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
    kept = kept_tokens(labels, ignore_index, head.shape[0])
    loss = hidden.new_zeros(labels.shape, dtype=dtype)
    lse = torch.zeros_like(loss)
    grad = hidden.new_zeros((hidden.shape[0] if need_grad else 0, hidden.shape[1]))
    for start, stop in blocks(kept.shape[0], TOKENS):
        tokens = kept[start:stop]
        rows = hidden[tokens].to(dtype) * logit_scale
        sweep = _Sweep(rows, labels[tokens], softcap, need_grad)
        for first, last in blocks(head.shape[0], VOCABULARY):
            sweep.add(_head_rows(head, first, last, hidden.dtype).to(dtype), first)
        loss[tokens], lse[tokens] = sweep.losses()
        if need_grad:
            grad[tokens] = sweep.gradient().mul_(logit_scale).to(hidden.dtype)
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
    kept = kept_tokens(labels, ignore_index, head.shape[0])
    result = torch.empty_like(head, memory_format=torch.contiguous_format)
    for first, last in blocks(head.shape[0], VOCABULARY):
        weight = head[first:last].to(dtype)
        total = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        for start, stop in blocks(kept.shape[0], TOKENS):
            tokens = kept[start:stop]
            rows = hidden[tokens].to(dtype) * logit_scale
            scale = grad_loss[tokens].to(dtype)
            change = _logits_grad(rows, weight, labels[tokens], lse[tokens], first, softcap)
            total.addmm_(change.mul_(scale.unsqueeze(1)).t(), rows)
        result[first:last] = total
    return result


def kept_tokens(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """Return the indices of the tokens that count, int64.

    Raises:
        ConfigError: A label is neither ``ignore_index`` nor a row of the head.
    """
    kept = (labels != ignore_index).nonzero().squeeze(1)
    if kept.numel() > 0:
        low, high = (int(bound) for bound in labels[kept].aminmax())
        if low < 0 or high >= vocabulary:
            raise ConfigError(
                f"linear_cross_entropy: labels holds {low if low < 0 else high}; allowed are 0 to "
                f"{vocabulary - 1} and ignore_index ({ignore_index})"
            )
    return kept


class _Sweep:
    """One pass over the vocabulary for one block of tokens; its fields are what the pass carries.

    A token's label is kept out of the sums and joins them at the end: a loss near zero is the
    logarithm of one plus the others' share, which a difference of large logits would lose.

    Shapes, for ``T`` tokens: ``rows`` ``[T, D]`` (scaled by ``logit_scale``), ``maximum``,
    ``total`` (of ``exp(l - maximum)``) and ``at_label`` (the label's logit) ``[T, 1]``,
    ``expected`` (sum of ``exp(l - maximum) * s * head_v``) and ``label_rows`` (``s * head_label``)
    ``[T, D]``.
    """

    def __init__(
        self, rows: Tensor, labels: Tensor, softcap: float | None, need_grad: bool
    ) -> None:
        self.rows = rows
        self.labels = labels
        self.softcap = softcap
        self.maximum = rows.new_full((rows.shape[0], 1), torch.finfo(rows.dtype).min)
        self.total = torch.zeros_like(self.maximum)
        self.at_label = torch.zeros_like(self.maximum)
        self.need_grad = need_grad
        if need_grad:
            self.expected = torch.zeros_like(rows)
            self.label_rows = torch.zeros_like(rows)

    def add(self, weight: Tensor, first: int) -> None:
        """Take in the head's rows from ``first`` on, ``weight`` ``[rows, D]``."""
        logits, slope = _logits(self.rows, weight, self.softcap)
        column, inside = _columns(self.labels, first, weight.shape[0])
        own = logits.gather(1, column)
        self.at_label = torch.where(inside, own, self.at_label)
        logits.scatter_(1, column, torch.where(inside, -torch.inf, own))
        highest = torch.maximum(self.maximum, logits.amax(1, keepdim=True))
        shrink = self.maximum.sub_(highest).exp_()
        self.maximum = highest
        share = logits.sub_(highest).exp_()
        self.total.mul_(shrink).add_(share.sum(1, keepdim=True))
        if self.need_grad:
            label_rows = weight[column.squeeze(1)]
            if slope is not None:
                share *= slope
                label_rows *= slope.gather(1, column)
            self.expected.mul_(shrink).addmm_(share, weight)
            self.label_rows = torch.where(inside, label_rows, self.label_rows)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Return the losses and the logsumexps, each ``[T]``."""
        highest, _, others, whole = self._shares()
        # Where the label leads, the rest is whole minus exactly one.
        log = torch.where(self.at_label == highest, others.log1p(), whole.log())
        loss = log + (highest - self.at_label)
        return loss.squeeze(1), (log + highest).squeeze(1)

    def gradient(self) -> Tensor:
        """Return the gradient of each token's loss to ``rows``, ``[T, D]``; call it once."""
        _, shrink, others, whole = self._shares()
        self.expected.mul_(shrink / whole)
        return self.expected.sub_(self.label_rows.mul_(others / whole))

    def _shares(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With the label: the maximum, how that shrinks the sums, these without and with it."""
        highest = torch.maximum(self.maximum, self.at_label)
        shrink = (self.maximum - highest).exp()
        others = self.total * shrink
        return highest, shrink, others, others + (self.at_label - highest).exp()


def _logits_grad(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    first: int,
    softcap: float | None,
) -> Tensor:
    """The gradient of each token's loss to a block of ``z``: ``(p - [v = label]) * s``."""
    logits, slope = _logits(rows, weight, softcap)
    column, inside = _columns(labels, first, weight.shape[0])
    change = logits.sub_(lse.unsqueeze(1)).exp_()
    change.scatter_(1, column, change.gather(1, column) - inside.to(change.dtype))
    return change if slope is None else change.mul_(slope)


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


def _columns(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Each label's column in the block of ``width`` from ``first`` on, and whether it is in it.

    Both are ``[T, 1]``; labels outside are moved to the block's edge.
    """
    column = (labels - first).unsqueeze(1)
    inside = (column >= 0) & (column < width)
    return column.clamp_(0, width - 1), inside
