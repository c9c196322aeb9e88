"""Root-mean-square normalisation on the native CPU kernels (``csrc/src/rms_norm.inc``).

Rounded where the reference rounds; its statistics are float32 sums in another order. A row is read
from memory once. float64 has no native kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.ops import _native
from ladder_kernels.ops._numeric import flatten_rows

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_backward", "unsupported"]


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(x)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return the normalised ``x``; as the reference's."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(x, None, weight, eps, None, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(x + residual), x + residual)``; as the reference's."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(out)
    _run(x, residual, weight, eps, total, out)
    return out, total


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    total: Tensor | None,
    out: Tensor,
) -> None:
    rows = _native.adjacent_columns(flatten_rows(x))
    added = None if residual is None else _native.adjacent_columns(flatten_rows(residual))
    weight = None if weight is None else weight.contiguous()
    code = _native.library().lk_rms_norm(
        _native.DTYPES[x.dtype],
        *rows.shape,
        rows.data_ptr(),
        rows.stride(0),
        _native.pointer(added),
        0 if added is None else added.stride(0),
        _native.pointer(weight),
        eps,
        _native.pointer(total),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    _native.check(code)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(dx, dweight)``; as the reference's."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = x.new_empty(x.shape[-1] if need_weight else 0)
    along, rows = (_native.adjacent_columns(flatten_rows(value)) for value in (grad, x))
    weight = None if weight is None else weight.contiguous()
    code = _native.library().lk_rms_norm_backward(
        _native.DTYPES[x.dtype],
        *rows.shape,
        along.data_ptr(),
        along.stride(0),
        rows.data_ptr(),
        rows.stride(0),
        _native.pointer(weight),
        eps,
        dx.data_ptr(),
        dweight.data_ptr() if need_weight else None,
        torch.get_num_threads(),
    )
    _native.check(code)
    return dx, dweight
