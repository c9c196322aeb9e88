"""Run a model's bitsandbytes 4-bit layers on the kernels of this library, in place.

For people who train QLoRA, or anything else on ``bitsandbytes.nn.Linear4bit``, and want its frozen
products faster without changing their trainer. Only the layers' class changes: parameters, names,
``state_dict``, PEFT wrappers and saved files stay as they were, and the packed weight is read where
it lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ladder_kernels import ops
from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.nf4 import NF4Weight

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Linear4bit

__all__ = ["accelerate_4bit"]

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def accelerate_4bit(model: ModelT) -> ModelT:
    """Make every NF4 ``bitsandbytes.nn.Linear4bit`` inside ``model`` use :func:`nf4_linear`.

    Works on plain transformers models loaded with ``BitsAndBytesConfig`` and on PEFT models on top
    of them. The layers stay differentiable in their input and bias, so LoRA adapters train as
    before. Calling it twice is harmless.

    Args:
        model: any module with ``Linear4bit`` layers of ``quant_type="nf4"``, already quantised.

    Returns:
        The same object, for chaining.

    Raises:
        ConfigError: bitsandbytes is not installed.
        UnsupportedModelError: there is no ``Linear4bit`` layer, or one of them is not NF4, not
            quantised yet, or was repacked by bitsandbytes for its own CPU inference. No layer has
            been changed then.
    """
    try:
        from bitsandbytes.nn.modules import Linear4bit
    except ImportError as error:
        raise ConfigError(
            "accelerate_4bit needs bitsandbytes, which is not installed (pip install bitsandbytes)"
        ) from error

    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    if not layers:
        raise UnsupportedModelError(
            f"accelerate_4bit: {type(model).__name__} holds no bitsandbytes Linear4bit layer; "
            "load it with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
        )
    for name, layer in layers.items():
        _check(name, layer)
    for layer in layers.values():
        layer.__class__ = _accelerated_class(type(layer))
    return model


def _check(name: str, layer: Linear4bit) -> None:
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    found = None
    if state is None:
        found = "is not quantised yet; move the model to its device first"
    elif state.quant_type != "nf4":
        found = f"has quant_type '{state.quant_type}'; only 'nf4' is supported"
    elif getattr(state, "packing_format_for_cpu", False):
        found = (
            "was repacked by bitsandbytes for its CPU inference, which rounds its scales; call "
            "accelerate_4bit before the first forward pass"
        )
    if found is not None:
        raise UnsupportedModelError(f"accelerate_4bit: layer '{name}' {found}")


def _accelerated_class(base: type[Linear4bit]) -> type[Linear4bit]:
    """A subclass of ``base`` whose forward runs here; ``base`` itself if it already does."""
    if issubclass(base, _AcceleratedForward):
        return base
    return type(f"Accelerated{base.__name__}", (_AcceleratedForward, base), {})


class _AcceleratedForward:
    """Mixed in before ``Linear4bit``: same dtype rules as its forward, our product."""

    def forward(self: Linear4bit, x: torch.Tensor) -> torch.Tensor:  # type: ignore[misc]
        """Compute ``x @ W^T + bias`` for ``x`` ``[..., K]``; returns ``[..., N]`` in x's dtype."""
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
        state: Any = getattr(self.weight, "quant_state", None) or self.quant_state
        weight = NF4Weight.from_bitsandbytes(self.weight.data, state)
        bias = None if self.bias is None else self.bias.to(dtype)
        return ops.nf4_linear(x.to(dtype), weight, bias).to(x.dtype)
