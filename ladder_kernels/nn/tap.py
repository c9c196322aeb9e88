"""What a rung reads of the frozen pass.

A new kind of tap is one subclass of :class:`Tap` and one entry in :data:`TAPS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

__all__ = ["TAPS", "ResidualTap", "Tap"]


class Tap(nn.Module, ABC):
    """One cross-connection: something read at a backbone layer, and its projection into the ladder.

    A subclass says how wide what it reads is, and reads it.

    Args:
        layer: Backbone layer that is read (0: embeddings, ``L``: before the final norm).
        hidden_size: Width of the backbone, ``D``.
        width: Width of the side stream, ``d``.

    Attributes:
        layer: As above.
        down: The projection, ``[d, K]``; ``K`` is the width of what is read.
    """

    def __init__(self, layer: int, *, hidden_size: int, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.empty(width, self.source_width(hidden_size)))

    @abstractmethod
    def source_width(self, hidden_size: int) -> int:
        """Width ``K`` of what is read from a backbone of width ``hidden_size``."""

    @abstractmethod
    def read(self, taps: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Pick this tap's source, ``[B, S, K]``, out of what the frozen pass kept."""

    def reset_parameters(self, fill: Callable[[torch.Tensor], None]) -> None:
        """Initialise the projection with ``fill``, which writes a matrix in place."""
        fill(self.down)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        return f"layer={self.layer}, down={list(self.down.shape)}"


class ResidualTap(Tap):
    """Reads the residual stream ``h[layer]``."""

    def source_width(self, hidden_size: int) -> int:
        """``D``."""
        return hidden_size

    def read(self, taps: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """``h[layer]``, ``[B, S, D]``."""
        return taps[self.layer]


TAPS: Mapping[str, type[Tap]] = MappingProxyType({"residual": ResidualTap})
"""Every kind of tap by the name that configurations use."""
