"""Where training starts: the initial weights of a ladder.

A new kind of init is one function and one entry in :data:`INITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from ladder_kernels.models.pruning import prune_into

if TYPE_CHECKING:
    from ladder_kernels.models.backbone import Backbone
    from ladder_kernels.models.ladder import Ladder

__all__ = ["INITS", "Init"]

Init = Callable[["Ladder", "Backbone | None", torch.Generator], None]
"""Writes every parameter of a ladder in place; takes the backbone, if any, and a generator."""


def _orthogonal(ladder: Ladder, backbone: Backbone | None, generator: torch.Generator) -> None:
    """Orthonormal rows or columns (Saxe et al. 2014, arXiv:1312.6120)."""
    ladder.fill(lambda weight: nn.init.orthogonal_(weight, generator=generator))


def _xavier(ladder: Ladder, backbone: Backbone | None, generator: torch.Generator) -> None:
    """Uniform of variance ``2 / (fan_in + fan_out)`` (Glorot and Bengio 2010)."""
    ladder.fill(lambda weight: nn.init.xavier_uniform_(weight, generator=generator))


def _he(ladder: Ladder, backbone: Backbone | None, generator: torch.Generator) -> None:
    """Normal of variance ``2 / fan_in`` (He et al. 2015, arXiv:1502.01852)."""
    ladder.fill(
        lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
    )


def _pruned(ladder: Ladder, backbone: Backbone | None, generator: torch.Generator) -> None:
    """Side blocks cut out of the backbone's, see :mod:`ladder_kernels.models.pruning`."""
    _xavier(ladder, backbone, generator)
    prune_into(ladder, backbone)


INITS: Mapping[str, Init] = MappingProxyType(
    {"orthogonal": _orthogonal, "xavier": _xavier, "he": _he, "pruned": _pruned}
)
"""Every kind of init by the name that configurations use."""
