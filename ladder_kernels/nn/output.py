"""How the top of the ladder meets the backbone's last state.

A new kind of output is one subclass of :class:`Output` and one entry in :data:`OUTPUTS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from ladder_kernels.ops import rms_norm

__all__ = ["OUTPUTS", "InterpolateOutput", "Output", "ResidualOutput", "SideOutput"]


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

    def project(self, side: torch.Tensor) -> torch.Tensor:
        """``Up(n(s))``, ``[..., D]``."""
        return F.linear(rms_norm(side, None, self.eps), self.up)

    @abstractmethod
    def forward(self, side: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Combine.

        Args:
            side: Top of the side stream, ``[..., d]``.
            hidden: The backbone's last state ``h[L]``, ``[..., D]``, a constant.

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

    def forward(self, side: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See :meth:`Output.forward`."""
        up = self.project(side)
        wide = torch.promote_types(torch.promote_types(hidden.dtype, up.dtype), torch.float32)
        state = hidden.to(wide)
        rms = state.square().mean(-1, keepdim=True).sqrt()
        return torch.addcmul(state, rms, up.to(wide)).to(hidden.dtype)


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

    def forward(self, side: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See :meth:`Output.forward`."""
        up = self.project(side)
        wide = torch.promote_types(torch.promote_types(hidden.dtype, up.dtype), torch.float32)
        keep = self.keep.to(wide)
        return ((1 - keep) * up.to(wide) + keep * hidden.to(wide)).to(hidden.dtype)


class SideOutput(Output):
    """``y = Up(n(s))``: the ladder alone feeds the head (LST, arXiv:2206.06522)."""

    def forward(self, side: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See :meth:`Output.forward`."""
        return self.project(side).to(hidden.dtype)


OUTPUTS: Mapping[str, type[Output]] = MappingProxyType(
    {"residual": ResidualOutput, "interpolate": InterpolateOutput, "side": SideOutput}
)
"""Every kind of output by the name that configurations use."""
