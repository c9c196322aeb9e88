"""Cross entropy of a linear head on the native CPU kernel (``csrc/src/linear_cross_entropy.inc``).

Loss and gradient to ``hidden`` come from one sweep over the vocabulary, with float32 sums. For the
gradient the softmax is rounded to bfloat16 where hidden states and head are of it and the processor
multiplies pairs of it (AVX512-BF16), as PyTorch rounds it too. The gradient of a dense head has no
native kernel yet and is the reference's. float64 has none either.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _native
from ladder_kernels.ops.linear_cross_entropy.reference import kept_tokens

__all__ = ["linear_cross_entropy", "unsupported"]


def unsupported(hidden: Tensor, head: Tensor | NF4Weight, *_: object) -> str | None:
    """Say why a call cannot run natively; ``None`` if it can."""
    if isinstance(head, Tensor) and head.dtype not in _native.DTYPES:
        return f"there is no native kernel for a head of {head.dtype}"
    return _native.unsupported(hidden)


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
    kept = kept_tokens(labels, ignore_index, head.shape[0])
    hidden, labels = _native.adjacent_columns(hidden), labels.contiguous()
    loss = hidden.new_zeros(labels.shape, dtype=torch.float32)
    lse = torch.zeros_like(loss)
    grad = hidden.new_zeros((hidden.shape[0] if need_grad else 0, hidden.shape[1]))
    nf4 = isinstance(head, NF4Weight)
    dense = None if nf4 else _native.adjacent_columns(head.detach())
    code = _native.library().lk_linear_cross_entropy(
        ctypes.byref(_native.matrix(head)) if nf4 else None,
        None if dense is None else ctypes.byref(_native.dense_matrix(dense)),
        _native.DTYPES[hidden.dtype],
        hidden.data_ptr(),
        hidden.stride(0),
        kept.data_ptr(),
        labels.data_ptr(),
        kept.shape[0],
        0.0 if softcap is None else softcap,
        logit_scale,
        loss.data_ptr(),
        lse.data_ptr(),
        grad.data_ptr() if need_grad else None,
        grad.stride(0),
        torch.get_num_threads(),
    )
    _native.check(code)
    return loss, lse, grad
