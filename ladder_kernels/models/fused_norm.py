"""The RMS norms of transformers' llama-like models in one operation.

Their own forward takes seven, and keeps two float32 copies of its input for the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ladder_kernels.models.architecture import FAMILIES
from ladder_kernels.models.reclass import Reclassed
from ladder_kernels.ops import rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FusedNorm", "norms"]


def norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norms inside a causal language model of a known type that compute as llama's do."""
    if model.config.model_type not in FAMILIES:
        return []
    return [module for module in model.modules() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    own = type(module).own if isinstance(module, FusedNorm) else type(module)
    return (
        own.__module__.startswith("transformers.models.")
        and own.__name__.endswith("RMSNorm")
        and hasattr(module, "variance_epsilon")
    )


class FusedNorm(Reclassed):
    """Mixed into an RMS norm; where dtypes are mixed or autocast is on, its own forward runs."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` ``[..., D]``, with the roundings of transformers."""
        if (
            self.weight.dtype != x.dtype
            or torch.is_autocast_enabled(x.device.type)
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)  # type: ignore[misc]
        return rms_norm(x, self.weight, self.variance_epsilon)
