"""bitsandbytes' 4-bit layers, and PEFT's adapters on them, on the products of this library."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ladder_kernels.models.reclass import Reclassed
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.adapted_linear import adapted_linear
from ladder_kernels.ops import nf4_linear

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Linear4bit

__all__ = [
    "AcceleratedAdapter",
    "AcceleratedLinear4bit",
    "compute_dtype",
    "is_adapter",
    "is_quantised",
    "nf4_view",
]


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


def is_adapter(module: nn.Module) -> bool:
    """Whether ``module`` is what PEFT's LoRA puts around a 4-bit layer."""
    peft: Any = sys.modules.get("peft.tuners.lora.bnb")
    own = type(module).own if isinstance(module, AcceleratedAdapter) else type(module)
    return peft is not None and own is getattr(peft, "Linear4bit", None)


class AcceleratedAdapter(Reclassed):
    """Mixed into PEFT's LoRA layer: layer and adapter at once, where one plain adapter is active.

    Several at a time, merged or switched off ones, variants such as DoRA, autocast, and layers that
    compute in another dtype than they are called with have PEFT's own forward.
    """

    def run(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute what PEFT does for ``x`` ``[..., K]``; returns ``[..., N]`` in x's dtype."""
        name = None if args or any(kwargs.values()) else _only_adapter(self)
        if name is None or not _computes_plainly(self, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        layer, dropout = self.base_layer, self.lora_dropout[name]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        seen = None
        if isinstance(dropout, nn.Dropout) and self.training and dropout.p > 0:
            seen = dropout(x.to(a.dtype))
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return adapted_linear(x, nf4_view(layer), bias, a, b, self.scaling[name], seen=seen)


def _only_adapter(layer: Any) -> str | None:
    """The adapter that is active, if it is one alone and a plain one."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] in layer.lora_variant:
        return None
    (name,) = names
    parts = (layer.lora_A[name], layer.lora_B[name])
    plain = all(type(part) is nn.Linear and part.bias is None for part in parts)
    plain = plain and isinstance(layer.lora_dropout[name], (nn.Identity, nn.Dropout))
    watched = any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        for part in (*parts, layer.base_layer)
    )
    return name if plain and not watched else None


def _computes_plainly(layer: Any, x: torch.Tensor) -> bool:
    base = layer.base_layer
    return (
        isinstance(base, AcceleratedLinear4bit)
        and compute_dtype(base, x) == x.dtype  # type: ignore[arg-type]
        and getattr(layer, "cast_input_dtype_enabled", True)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )
