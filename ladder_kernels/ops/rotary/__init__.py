"""Rotary position embeddings, in place: what the frozen pass does to queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.ops import _checks
from ladder_kernels.ops._dispatch import run

__all__ = ["rotary_"]

_OP = "rotary_"


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn each head of queries and keys by its token's position, in place.

    Channel ``i`` turns with channel ``i + hd / 2`` (RoFormer, arXiv:2104.09864, in the layout of
    llama); each product and sum is rounded to q's dtype, exactly as in transformers. Not
    differentiable: it serves the frozen pass.

    Args:
        q: ``[B, S, H, hd]``, float16, bfloat16, float32 or float64, ``hd`` even; overwritten.
        k: ``[B, S, Hkv, hd]`` in q's dtype; overwritten. It may not overlap ``q``.
        cos: Cosines of the angles, ``[B or 1, S, 1, hd / 2]`` in q's dtype.
        sin: Sines, as ``cos``.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: a backend forced by name cannot run this call.
    """
    _checks.check_floating(_OP, "q", q)
    if q.dim() != 4 or q.shape[-1] % 2:
        raise _checks.refuse(
            _OP, "q", f"has shape {list(q.shape)}", "it must be [B, S, H, hd], hd even"
        )
    batch, length, _, width = q.shape
    for name, value in (("k", k), ("cos", cos), ("sin", sin)):
        _checks.check_same_dtype(_OP, name, value, "q", q)
        _checks.check_same_device(_OP, name, value, "q", q)
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, length, width):
        raise _checks.refuse(
            _OP,
            "k",
            f"has shape {list(k.shape)}",
            f"it must be [{batch}, {length}, 'Hkv', {width}]",
        )
    rows = 1 if cos.dim() > 0 and cos.shape[0] == 1 else batch
    _checks.check_shape(_OP, "cos", cos, (rows, length, 1, width // 2), "B or 1, S, 1, hd / 2")
    _checks.check_shape(_OP, "sin", sin, cos.shape, "the shape of cos")
    _rotary(q, k, cos, sin)


@torch.library.custom_op(
    "ladder_kernels::rotary_",
    mutates_args=("q", "k"),
    schema="(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()",
)
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    run("rotary", "rotary_", q, k, cos, sin)


@_rotary.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None
