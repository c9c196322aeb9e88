"""bitsandbytes' 4-bit layers on the products of this library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ladder_kernels.models.reclass import Reclassed
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import nf4_linear

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Linear4bit

__all__ = ["AcceleratedLinear4bit", "compute_dtype", "is_quantised", "nf4_view"]


def is_quantised(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of bitsandbytes whose weight :func:`nf4_view` can read."""
    from bitsandbytes.nn.modules import Linear4bit

    state = getattr(module, "quant_state", None)
    return (
        isinstance(module, Linear4bit)
        and state is not None
        and state.quant_type == "nf4"
        and not getattr(state, "packing_format_for_cpu", False)
    )


def nf4_view(layer: Linear4bit) -> NF4Weight:
    """The weight of a quantised layer as it lies there now; nothing is copied."""
    state: Any = getattr(layer.weight, "quant_state", None) or layer.quant_state
    return NF4Weight.from_bitsandbytes(layer.weight.data, state)


def compute_dtype(layer: Linear4bit, x: torch.Tensor) -> torch.dtype:
    """What bitsandbytes would multiply ``x`` in."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return x.dtype if layer.compute_dtype is None else layer.compute_dtype


class AcceleratedLinear4bit(Reclassed):
    """Mixed into ``Linear4bit``: same dtype rules as its forward, our product."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Compute ``x @ W^T + bias`` for ``x`` ``[..., K]``; returns ``[..., N]`` in x's dtype."""
        dtype = compute_dtype(self, x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nf4_linear(x.to(dtype), nf4_view(self), bias).to(x.dtype)
