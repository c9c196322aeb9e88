"""How a rung's projected taps meet the side stream.

A new kind of merge is one subclass of :class:`Merge` and one entry in :data:`MERGES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from ladder_kernels.ops import rung_merge

__all__ = ["MERGES", "ChannelMerge", "GateMerge", "Merge", "SumMerge"]


class Merge(nn.Module):
    """``u = merge(s, z)`` with ``z = sum_j n(tap_j) @ down_j^T``.

    A subclass names its ``mode`` of :func:`ladder_kernels.ops.rung_merge` and offers the gate that
    goes with it, or overrides :meth:`forward`.

    Args:
        width: Width of the side stream, ``d``.
        temperature: Divides what the gate's sigmoid sees.
        eps: Added to the mean square in the normalisation of taps.
    """

    mode: ClassVar[str]

    def __init__(self, width: int, *, temperature: float, eps: float) -> None:
        super().__init__()
        self.width = width
        self.temperature = temperature
        self.eps = eps

    def reset_parameters(self) -> None:
        """Set the gate to where training starts."""

    def gate(self) -> torch.Tensor | None:
        """The weight of the side stream, between 0 and 1; ``None`` for merges without one."""
        return None

    def forward(
        self, side: torch.Tensor, taps: Sequence[torch.Tensor], downs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Merge.

        Args:
            side: The side stream ``s``, ``[..., d]``.
            taps: What the rung reads, each ``[..., D]`` in any float dtype; constants.
            downs: A projection ``[d, D]`` for each tap.

        Returns:
            ``u``, ``[..., d]``.
        """
        return rung_merge(side, taps, downs, self.gate(), mode=self.mode, eps=self.eps)


class SumMerge(Merge):
    """``u = s + z``."""

    mode = "sum"


class GateMerge(Merge):
    """``u = g s + (1 - g) z`` with ``g = sigmoid(alpha / temperature)``, one ``alpha`` a rung.

    Ladder Side Tuning, arXiv:2206.06522: ``alpha`` starts at 0, so ``g`` at one half.
    """

    mode = "gate"

    def __init__(self, width: int, *, temperature: float, eps: float) -> None:
        super().__init__(width, temperature=temperature, eps=eps)
        self.alpha = nn.Parameter(torch.zeros(self._gates()))

    def _gates(self) -> int:
        return 1

    def reset_parameters(self) -> None:
        """Set ``alpha`` to 0."""
        nn.init.zeros_(self.alpha)

    def gate(self) -> torch.Tensor:
        """``g``, ``[1]``."""
        return torch.sigmoid(self.alpha / self.temperature)


class ChannelMerge(GateMerge):
    """As :class:`GateMerge`, one ``alpha`` a channel (QST, arXiv:2401.07159): ``g`` is ``[d]``."""

    mode = "channel"

    def _gates(self) -> int:
        return self.width


MERGES: Mapping[str, type[Merge]] = MappingProxyType(
    {"sum": SumMerge, "gate": GateMerge, "channel": ChannelMerge}
)
"""Every kind of merge by the name that configurations use."""
