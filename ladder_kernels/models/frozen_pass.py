"""What goes into a frozen pass and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ladder_kernels.memory.taps import TapRecord
from ladder_kernels.nn.attention import SequenceLayout

__all__ = ["FrozenInput", "FrozenPass", "Work"]


@dataclass(frozen=True)
class FrozenInput:
    """One micro-batch of a frozen pass.

    Attributes:
        tokens: Ids, int64 ``[B, S]``, or embeddings ``[B, S, D]``, whose gradient is not taken.
        layout: Positions, padding and documents of the batch.
        cache: A transformers ``Cache``, or ``None``; layer ``i`` of the backbone uses its layer
            ``i``.
        read: bool ``[B, S]``: where the ladder's output is read; ``None`` for everywhere. Padding
            elsewhere need not be kept.
    """

    tokens: torch.Tensor
    layout: SequenceLayout
    cache: Any = None
    read: torch.Tensor | None = None


@dataclass(frozen=True)
class Work(FrozenInput):
    """One micro-batch on its way through the layers.

    Attributes:
        emit: Called with ``t`` and ``h[t]``, ``[B, S, D]``, after each layer. It copies what it
            needs, so ``h`` may be overwritten afterwards.
    """

    emit: Callable[[int, torch.Tensor], None] = field(kw_only=True)


class FrozenPass:
    """What a frozen pass leaves behind: ordinary tensors, which autograd may save.

    Args:
        record: Where they are.
    """

    def __init__(self, record: TapRecord) -> None:
        self._record = record

    @property
    def taps(self) -> Mapping[int, torch.Tensor]:
        """Residual stream ``h[t]`` for each tapped layer ``t``, ``[B, S, D]``, one at a time.

        In the tap dtype; int8 taps are decoded to the compute dtype. Each look-up may bring the tap
        to the device anew.
        """
        return self._record

    @property
    def hidden(self) -> torch.Tensor:
        """``h[stop]``, before the final norm, ``[B, S, D]`` in the compute dtype."""
        return self._record.hidden
