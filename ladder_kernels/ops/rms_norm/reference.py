"""Root-mean-square normalisation in plain PyTorch (Zhang and Sennrich 2019, arXiv:1910.07467).

    r = 1 / sqrt(mean(x^2) + eps)    over the last dimension, in float32
    y = weight * round(x * r)        rounded to x's dtype before the weight, as in transformers

Gradients, with ``g`` the gradient of ``y``, ``h = x * r`` and ``a = g * weight``, all in float32:

    dx      = r * (a - h * mean(a * h))
    dweight = sum over rows of g * h

Float64 inputs are computed in float64 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.ops._numeric import accumulation_dtype, flatten_rows

__all__ = ["add_rms_norm", "normalize", "rms_norm", "rms_norm_backward"]


def normalize(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return ``x / rms(x)`` of ``[..., D]``, computed in ``dtype``; a new tensor."""
    # Contiguous, or the order of the sum, and so its last bits, would depend on the strides.
    wide = x.contiguous().to(dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.mul_(scale) if wide is not x else wide * scale


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return the normalised ``x``, ``[..., D]`` in x's dtype, always a new contiguous tensor."""
    y = normalize(x, eps, accumulation_dtype(x.dtype))
    y = y.to(x.dtype)
    return y if weight is None else y.mul_(weight)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(x + residual), x + residual)``, the sum rounded to x's dtype."""
    total = (x + residual).contiguous()
    return rms_norm(total, weight, eps), total


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(dx, dweight)``; ``dweight`` is empty unless ``need_weight``."""
    wide_dtype = accumulation_dtype(x.dtype)
    wide = x.contiguous().to(wide_dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normalized = wide * scale
    along = grad.contiguous().to(wide_dtype)
    dweight = x.new_empty(0)
    if need_weight:
        dweight = flatten_rows(along * normalized).sum(0).to(x.dtype)
    if weight is not None:
        along = along * weight.to(wide_dtype)
    shared = (along * normalized).mean(-1, keepdim=True)
    dx = normalized.mul_(-shared).add_(along).mul_(scale)
    return dx.to(x.dtype), dweight
