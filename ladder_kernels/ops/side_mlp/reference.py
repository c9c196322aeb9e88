"""The gated MLP of a side block in plain PyTorch, with its norm and its residual.

    x = rms_norm(u, norm_weight)         a = x @ gate^T        b = x @ up^T
    h = silu(a) * b                      y = u + h @ down^T

Every step is rounded to u's dtype, as modules of PyTorch do it one after the other.

Gradients, with ``e`` the gradient of ``y``, ``s = sigmoid(a)`` and ``f = e @ down``:

    db = f * a * s                       da = f * b * s * (1 + a * (1 - s))
    dx = da @ gate + db @ up             du = e + the norm's gradient of dx
    dgate = da^T @ x                     dup = db^T @ x        ddown = e^T @ h

Nothing but ``u`` and the weights is kept for the backward pass, which computes the rest again.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ladder_kernels.ops._numeric import accumulation_dtype, flatten_rows
from ladder_kernels.ops.rms_norm.reference import rms_norm, rms_norm_backward

__all__ = ["side_mlp", "side_mlp_backward"]


def side_mlp(
    u: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """Return ``y``, ``[..., d]`` in u's dtype, always a new contiguous tensor."""
    x = rms_norm(u, norm_weight, eps)
    y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return y.add_(u)


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
    """Return ``(du, dnorm_weight, dgate, dup, ddown)``; those that are not needed are empty."""
    dtype = accumulation_dtype(u.dtype)
    e, stream = flatten_rows(grad), flatten_rows(u)
    x = rms_norm(stream, norm_weight, eps)
    a, b, f = F.linear(x, gate), F.linear(x, up), e @ down
    wide = a.to(dtype)
    s = wide.sigmoid()
    silu = wide * s
    db = (f * silu).to(u.dtype)
    da = (f * b * s * (1 + wide * (1 - s))).to(u.dtype)
    du, dnorm, dgate, dup, ddown = (u.new_empty(0) for _ in range(5))
    if need_stream or need_norm:
        dx = da @ gate + db @ up
        through, dnorm = rms_norm_backward(dx, stream, norm_weight, eps, need_norm)
        if need_stream:
            du = through.add_(e).view(u.shape)
    if need_matrices:
        dgate, dup, ddown = da.t() @ x, db.t() @ x, e.t() @ (silu * b).to(u.dtype)
    return du, dnorm, dgate, dup, ddown
