"""A rung's merge on the native CPU kernels (``csrc/src/rung_merge.inc``).

Taps are projected as they are, and the factor that normalises a row is applied to its float32 sums:
no ``[T, D]`` temporary, forward or backward. Taps may have another dtype than the side stream;
float64 has no native kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.ops import _native
from ladder_kernels.ops._numeric import flatten_rows

__all__ = ["rung_merge", "rung_merge_backward", "unsupported"]


def unsupported(first: Tensor, *rest: Any) -> str | None:
    """Say why a call cannot run natively; ``None`` if it can.

    Args:
        first: the side stream, or its gradient.
        *rest: what comes after it, the taps being the first sequence.
    """
    taps = next(value for value in rest if not isinstance(value, Tensor))
    for tap in taps:
        if tap.dtype not in _native.DTYPES:
            return f"there is no native kernel for taps of {tap.dtype}"
    return _native.unsupported(first)


def _rows(value: Tensor) -> Tensor:
    return _native.adjacent_columns(flatten_rows(value))


def rung_merge(
    side: Tensor,
    taps: Sequence[Tensor],
    downs: Sequence[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
) -> Tensor:
    """Return ``u``, ``[..., d]``; as the reference's."""
    out = torch.empty_like(side, memory_format=torch.contiguous_format)
    stream = _rows(side)
    rows = [_rows(tap) for tap in taps]
    weights = [_native.adjacent_columns(down) for down in downs]
    gate = None if gate is None else gate.contiguous()
    code = _native.library().lk_rung_merge(
        *(_native.DTYPES[side.dtype], *stream.shape),
        *(stream.data_ptr(), stream.stride(0)),
        *(_tap_array(rows, weights, [None] * len(rows)), len(rows)),
        *(_native.pointer(gate), 0 if gate is None else gate.numel()),
        *(eps, out.data_ptr(), torch.get_num_threads()),
    )
    _native.check(code)
    return out


def rung_merge_backward(
    grad: Tensor,
    side: Tensor,
    taps: Sequence[Tensor],
    downs: Sequence[Tensor],
    gate: Tensor | None,
    mode: str,
    eps: float,
    need_side: bool,
    need_downs: Sequence[bool],
    need_gate: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return ``(dside, ddowns, dgate)``; as the reference's."""
    along, stream = _rows(grad), _rows(side)
    rows = [_rows(tap) for tap in taps]
    weights = [_native.adjacent_columns(down) for down in downs]
    dside = side.new_empty(side.shape if need_side else (0,))
    ddowns = [
        down.new_empty(down.shape if needed else (0,))
        for down, needed in zip(downs, need_downs, strict=True)
    ]
    wanted = [d if needed else None for d, needed in zip(ddowns, need_downs, strict=True)]
    weight = None if gate is None else gate.contiguous()
    need_gate = need_gate and weight is not None
    dgate = side.new_empty(0) if weight is None or not need_gate else torch.empty_like(weight)
    code = _native.library().lk_rung_merge_backward(
        *(_native.DTYPES[side.dtype], *stream.shape),
        *(along.data_ptr(), along.stride(0), stream.data_ptr(), stream.stride(0)),
        *(_tap_array(rows, weights, wanted), len(rows)),
        *(_native.pointer(weight), 0 if weight is None else weight.numel(), eps),
        *(dside.data_ptr() if need_side else None, dgate.data_ptr() if need_gate else None),
        torch.get_num_threads(),
    )
    _native.check(code)
    return dside, ddowns, dgate


def _tap_array(
    taps: Sequence[Tensor], downs: Sequence[Tensor], ddowns: Sequence[Tensor | None]
) -> Any:
    """An array of ``lk_rung_tap``; the tensors must outlive the call."""
    entries = (
        native.RungTap(_native.dense_matrix(tap), _native.dense_matrix(down), _native.pointer(grad))
        for tap, down, grad in zip(taps, downs, ddowns, strict=True)
    )
    return (native.RungTap * len(taps))(*entries)
