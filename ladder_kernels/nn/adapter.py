"""Low-rank adapters on the frozen linear layers above a re-entry.

For a frozen ``W`` ``[N, K]``, LoRA (arXiv:2106.09685): ``y = x W^T + scale * (x A^T) B^T``. ``B``
starts at zero, so that training starts exactly at the base model. The product ``B A`` is never put
in memory, nor is a sum of it and ``W``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["BlockAdapters", "LowRankAdapter"]


class LowRankAdapter(nn.Module):
    """``y + scale * (x A^T) B^T``.

    Args:
        out_features: ``N``.
        in_features: ``K``.
        rank: Rows of ``A``, ``r``.
        scale: Of what is added. LoRA writes it ``alpha / r``.

    Attributes:
        a: ``[r, K]``.
        b: ``[N, r]``.
    """

    def __init__(self, out_features: int, in_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw ``a`` uniformly within ``1 / sqrt(K)``, as PEFT does, and set ``b`` to zero."""
        drawn = torch.empty(self.a.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.a.copy_(drawn)
            self.b.zero_()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add what the adapter says about ``x``.

        Args:
            x: What the frozen layer saw, ``[..., K]``.
            y: What it made of that, ``[..., N]`` in the dtype of ``x``, in which the products are.

        Returns:
            ``[..., N]`` in the dtype of ``y``.
        """
        narrow = F.linear(x, self.a.to(x.dtype)).flatten(0, -2)
        added = torch.addmm(y.flatten(0, -2), narrow, self.b.to(x.dtype).t(), alpha=self.scale)
        return added.view(y.shape)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        return f"a={list(self.a.shape)}, b={list(self.b.shape)}, scale={self.scale}"


class BlockAdapters(nn.ModuleDict):
    """The adapters of one backbone block, by the role of the linear layer that each belongs to.

    Args:
        shapes: ``(N, K)`` of the block's linear layers by role.
        rank: Of every adapter.
        scale: As in :class:`LowRankAdapter`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], *, rank: int, scale: float) -> None:
        super().__init__(
            {
                role: LowRankAdapter(rows, columns, rank=rank, scale=scale)
                for role, (rows, columns) in shapes.items()
            }
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise every adapter; see :meth:`LowRankAdapter.reset_parameters`."""
        for adapter in self.values():
            if isinstance(adapter, LowRankAdapter):
                adapter.reset_parameters(generator)

    def add(self, role: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y``, what layer ``role`` made of ``x``, and what its adapter adds."""
        return self[role](x, y)
