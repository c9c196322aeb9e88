"""Root-mean-square normalisation in Triton; the maths is in ``reference.py``.

Pipeline: one program a row, which it keeps in registers. Forward: read x (and the residual, whose
rounded sum is written and is what is normalised), the mean square, write y. Backward: read the
gradient and x, two means, write dx. The gradient of the weight is a sum over rows: a program walks
over its share of the rows with one partial sum in registers, and the partial sums, float32
``[programs, D]``, are added up afterwards in a fixed order. Never in memory: the normalised rows,
the statistics.

Layout: rows of D adjacent elements, any distance apart. Sums and arithmetic are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.ops import _triton

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_backward", "unsupported"]

_WIDEST = 65536
# Enough for every multiprocessor of a GPU to be busy, few enough for the partial sums to be small.
_PROGRAMS = 512
_ELEMENTS_A_WARP = 512
_WARPS = (1, 16)


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run in Triton; ``None`` if it can."""
    if x.shape[-1] > _WIDEST:
        return f"a row of {x.shape[-1]} elements is wider than the {_WIDEST} that a program holds"
    return _triton.unsupported(x)


@triton.jit
def _rms_norm_forward_kernel(
    x,  # [rows, D]
    residual,  # [rows, D] or None
    weight,  # [D] or None
    total,  # [rows, D], x + residual, or None
    y,  # [rows, D]
    x_stride,
    residual_stride,
    D,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        other = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
        rounded = (value + other.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(total + row * D + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / D + eps)
    # Rounded before the weight is applied, as transformers does.
    normalized = (value * scale).to(y.dtype.element_ty).to(tl.float32)
    if weight is not None:
        normalized *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + columns, normalized.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    grad,  # [rows, D]
    x,  # [rows, D]
    weight,  # [D] or None
    dx,  # [rows, D]
    partial,  # [programs, D] float32, or None
    grad_stride,
    x_stride,
    rows,
    D,
    eps,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        along = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0)
        along = along.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value) / D + eps)
        normalized = value * scale
        summed += along * normalized
        along *= factor
        shared = tl.sum(along * normalized) / D
        found = (along - normalized * shared) * scale
        tl.store(dx + row * D + columns, found.to(dx.dtype.element_ty), mask=inside)
    if partial is not None:
        tl.store(partial + program * D + columns, summed, mask=inside)


def _warps(block: int) -> int:
    fewest, most = _WARPS
    return max(fewest, min(most, block // _ELEMENTS_A_WARP))


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
    rows = _triton.rows(x)
    added = None if residual is None else _triton.rows(residual)
    if out.numel() == 0:
        return
    block = triton.next_power_of_2(rows.shape[1])
    _triton.launch(
        _rms_norm_forward_kernel,
        (rows.shape[0],),
        rows,
        added,
        None if weight is None else weight.contiguous(),
        total,
        out,
        rows.stride(0),
        0 if added is None else added.stride(0),
        rows.shape[1],
        eps,
        BLOCK=block,
        num_warps=_warps(block),
    )


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(dx, dweight)``; as the reference's."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    along, rows = _triton.rows(grad), _triton.rows(x)
    width = x.shape[-1]
    if x.numel() == 0:
        return dx, x.new_zeros(width if need_weight else 0)
    programs = min(rows.shape[0], _PROGRAMS)
    partial = None
    if need_weight:
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _triton.launch(
        _rms_norm_backward_kernel,
        (programs,),
        along,
        rows,
        None if weight is None else weight.contiguous(),
        dx,
        partial,
        along.stride(0),
        rows.stride(0),
        rows.shape[0],
        width,
        eps,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return dx, x.new_empty(0) if partial is None else partial.sum(0).to(x.dtype)
