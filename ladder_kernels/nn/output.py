"""How the top of the ladder meets the backbone's last state.

A new kind of output is one subclass of :class:`Output` and one entry in :data:`OUTPUTS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ladder_kernels.nn.recompute import keep_inputs
from ladder_kernels.ops import rms_norm
from ladder_kernels.ops._numeric import blocks, flatten_rows

__all__ = ["OUTPUTS", "InterpolateOutput", "Output", "ResidualOutput", "SideOutput"]

_NUMBERS_AT_A_TIME = 1 << 20


class Output(nn.Module, ABC):
    """``y = output(s, h)``, the state that the frozen final norm and head see.

    ``n`` below is RMS normalisation without a learned weight: ``up`` would absorb one.

    Args:
        hidden_size: Width of the backbone, ``D``.
        width: Width of the side stream, ``d``.
        eps: Added to the mean square in ``n``.

    Attributes:
        up: The projection back, ``[D, d]``.
    """

    def __init__(self, *, hidden_size: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.up = nn.Parameter(torch.empty(hidden_size, width))

    def reset_parameters(self, fill: Callable[[torch.Tensor], None]) -> None:
        """Initialise ``up`` with ``fill``, which writes a matrix in place."""
        fill(self.up)

    def project(self, side: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        """``Up(n(s))``, ``[..., D]``; with ``recompute``, autograd keeps ``s`` alone."""
        return keep_inputs(self._projected, side) if recompute else self._projected(side)

    def _projected(self, side: torch.Tensor) -> torch.Tensor:
        return F.linear(rms_norm(side, None, self.eps), self.up)

    @abstractmethod
    def forward(
        self, side: torch.Tensor, hidden: torch.Tensor, recompute: bool = False
    ) -> torch.Tensor:
        """Combine.

        Args:
            side: Top of the side stream, ``[..., d]``.
            hidden: The backbone's last state ``h[L]``, ``[..., D]``, a constant.
            recompute: Compute again in the backward pass what can be, so that nothing but ``side``
                (and ``hidden``, where a gradient needs it) is kept for it.

        Returns:
            ``y``, ``[..., D]`` in the dtype of ``hidden``; the sum is made in float32 at least.
        """


class ResidualOutput(Output):
    """``y = h + rms(h) * Up(n(s))`` with the root mean square of each token, a constant.

    ``up`` starts at zero, so that training starts exactly at the base model. The factor makes a
    step of ``up`` count: residual streams have an RMS of tens, which an unscaled ``up`` would take
    long to reach.
    """

    def reset_parameters(self, fill: Callable[[torch.Tensor], None]) -> None:
        """Set ``up`` to zero."""
        nn.init.zeros_(self.up)

    def forward(
        self, side: torch.Tensor, hidden: torch.Tensor, recompute: bool = False
    ) -> torch.Tensor:
        """See :meth:`Output.forward`; ``hidden`` is not kept."""
        up = self.project(side, recompute)
        if torch.compiler.is_compiling():  # which keeps no temporaries, and loops over no blocks
            return _add_scaled(hidden, up)[0]
        return _AddScaled.apply(hidden, up)


def _wide(*values: torch.Tensor) -> torch.dtype:
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _add_scaled(hidden: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``hidden + rms(hidden) * up``, rounded once, and ``rms(hidden)`` ``[..., 1]``."""
    wide = _wide(hidden, up)
    state = hidden.to(wide)
    rms = state.square().mean(-1, keepdim=True).sqrt()
    return torch.addcmul(state, rms, up.to(wide)).to(hidden.dtype), rms


class _AddScaled(torch.autograd.Function):
    """:func:`_add_scaled`, differentiable in ``up``, a block of tokens at a time.

    Nothing of width ``D`` is kept, and in the wider dtype nothing is but the block at hand.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        wide = _wide(hidden, up)
        states, added = flatten_rows(hidden), flatten_rows(up)
        out = torch.empty_like(states, memory_format=torch.contiguous_format)
        rms = states.new_empty((states.shape[0], 1), dtype=wide)
        for start, stop in _token_blocks(states):
            rows = slice(start, stop)
            out[rows], rms[rows] = _add_scaled(states[rows], added[rows])
        ctx.save_for_backward(rms)
        ctx.dtype = up.dtype
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        (rms,) = ctx.saved_tensors
        along = flatten_rows(grad)
        out = torch.empty_like(along, dtype=ctx.dtype, memory_format=torch.contiguous_format)
        for start, stop in _token_blocks(along):
            rows = slice(start, stop)
            out[rows] = along[rows].to(rms.dtype) * rms[rows]
        return None, out.view(grad.shape)


def _token_blocks(rows: torch.Tensor) -> Iterator[tuple[int, int]]:
    return blocks(rows.shape[0], max(1, _NUMBERS_AT_A_TIME // max(1, rows.shape[1])))


class InterpolateOutput(Output):
    """``y = (1 - b) * Up(n(s)) + b * h`` with one learned ``b`` a channel (QST, arXiv:2401.07159).

    ``b`` starts at 1, so that training starts at the base model.
    """

    def __init__(self, *, hidden_size: int, width: int, eps: float) -> None:
        super().__init__(hidden_size=hidden_size, width=width, eps=eps)
        self.keep = nn.Parameter(torch.ones(hidden_size))

    def reset_parameters(self, fill: Callable[[torch.Tensor], None]) -> None:
        """Initialise ``up`` with ``fill`` and ``b`` with 1."""
        super().reset_parameters(fill)
        nn.init.ones_(self.keep)

    def forward(
        self, side: torch.Tensor, hidden: torch.Tensor, recompute: bool = False
    ) -> torch.Tensor:
        """See :meth:`Output.forward`; ``hidden`` is kept, for the gradient of ``b``."""

        def mix(side: torch.Tensor) -> torch.Tensor:
            up = self.project(side)
            wide = _wide(hidden, up)
            keep = self.keep.to(wide)
            return ((1 - keep) * up.to(wide) + keep * hidden.to(wide)).to(hidden.dtype)

        return keep_inputs(mix, side) if recompute else mix(side)


class SideOutput(Output):
    """``y = Up(n(s))``: the ladder alone feeds the head (LST, arXiv:2206.06522)."""

    def forward(
        self, side: torch.Tensor, hidden: torch.Tensor, recompute: bool = False
    ) -> torch.Tensor:
        """See :meth:`Output.forward`."""
        return self.project(side, recompute).to(hidden.dtype)


OUTPUTS: Mapping[str, type[Output]] = MappingProxyType(
    {"residual": ResidualOutput, "interpolate": InterpolateOutput, "side": SideOutput}
)
"""Every kind of output by the name that configurations use."""
