"""The gated MLP of a side block on a CPU; the maths is in ``reference.py``.

Matrix products are PyTorch's, which are as fast as the processor for weights that are plain
matrices. What is around them are native kernels (``csrc/src/swiglu.inc`` and ``rms_norm.inc``): one
pass each, where PyTorch makes up to ten. They work in place: three tensors of ``[T, m]`` are in
memory at most, and two in the forward pass.

The backward makes 8 products, where 6 would do had the forward kept three tensors of that size.

Rounded to u's dtype where the reference rounds, but for what lies between two products, and the
residual, which joins its product before the one rounding. float64 has no native kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ladder_kernels.ops import _native
from ladder_kernels.ops._numeric import flatten_rows
from ladder_kernels.ops.rms_norm.cpu import rms_norm, rms_norm_backward

__all__ = ["side_mlp", "side_mlp_backward", "unsupported"]


def unsupported(first: Tensor, *_: object) -> str | None:
    """Say why a call cannot run natively; ``None`` if it can.

    Args:
        first: The side stream, or its gradient.
        *_: What comes after it.
    """
    return _native.unsupported(first)


def side_mlp(
    u: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """Return ``y``, ``[..., d]`` in u's dtype; as the reference's."""
    stream = flatten_rows(u)
    x = rms_norm(stream, norm_weight, eps)
    joined, b = F.linear(x, gate), F.linear(x, up)
    del x
    code = _native.library().lk_swiglu(
        *(_native.DTYPES[u.dtype], joined.numel(), joined.data_ptr(), b.data_ptr()),
        torch.get_num_threads(),
    )
    _native.check(code)
    return torch.addmm(stream, joined, down.t()).view(u.shape)


def side_mlp_backward(
    grad: Tensor,
    u: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    need_stream: bool,
    need_norm: bool,
    need_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(du, dnorm_weight, dgate, dup, ddown)``; as the reference's."""
    e, stream = flatten_rows(grad), flatten_rows(u)
    x = rms_norm(stream, norm_weight, eps)
    a, b, f = F.linear(x, gate), F.linear(x, up), torch.mm(e, down)
    code = _native.library().lk_swiglu_backward(
        *(_native.DTYPES[u.dtype], a.numel(), a.data_ptr(), b.data_ptr(), f.data_ptr()),
        torch.get_num_threads(),
    )
    _native.check(code)
    da, db, joined = a, b, f
    du, dnorm, dgate, dup, ddown = (u.new_empty(0) for _ in range(5))
    if need_matrices:
        dgate, dup, ddown = da.t() @ x, db.t() @ x, e.t() @ joined
    if need_stream or need_norm:
        dx = torch.mm(da, gate).addmm_(db, up)
        through, dnorm = rms_norm_backward(dx, stream, norm_weight, eps, need_norm)
        if need_stream:
            du = through.add_(e).view(u.shape)
    return du, dnorm, dgate, dup, ddown
