"""Run a model's bitsandbytes 4-bit layers on the kernels of this library, in place, and back.

For people who train QLoRA, or anything else on ``bitsandbytes.nn.Linear4bit``, and want it faster
without changing their trainer. Only the classes of modules change, and a name in a configuration
that is not saved: parameters, names, ``state_dict``, PEFT wrappers and saved files stay as they
were, and the packed weight is read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.models import fused_loss, native_attention
from ladder_kernels.models.fused_norm import FusedNorm, norms
from ladder_kernels.models.quantized_layer import (
    AcceleratedAdapter,
    AcceleratedLinear4bit,
    is_adapter,
)
from ladder_kernels.models.reclass import reclass, restore

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Linear4bit

__all__ = ["accelerate_4bit", "restore_4bit"]

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def accelerate_4bit(
    model: ModelT, *, loss: bool | None = None, attention: bool | None = None
) -> ModelT:
    """Make every NF4 ``bitsandbytes.nn.Linear4bit`` inside ``model`` use :func:`nf4_linear`.

    Works on plain transformers models loaded with ``BitsAndBytesConfig`` and on PEFT models on top
    of them. The layers stay differentiable in their input and bias, so LoRA adapters train as
    before; where one plain adapter is active, a layer and its adapter are computed at once, and no
    float32 copy of their input is kept for the backward pass. So call it after ``get_peft_model``.
    Calling it again is harmless, and the last call decides; :func:`restore_4bit` undoes it.

    Where the model is one of transformers' causal language models of a known type, more of a
    training step comes from here. It is decided anew in every forward, and whatever is not served
    runs as before:

    - *norms*: the RMS norms of the llama family are one operation, with the same roundings.
    - *loss*: in training mode, with labels, the loss is :func:`linear_cross_entropy` of the last
      hidden states, equal to transformers' up to rounding (shifted labels, ``ignore_index``,
      ``num_items_in_batch``, the model's scale and cap of its logits). There are no ``[T, V]``
      logits then: ``output.logits`` is ``None``. In evaluation mode, without labels, or if the head
      has an adapter, a bias or a hook, the model's own forward runs.
    - *attention*: on a CPU, plain causal attention runs on the native kernels; with padding, packed
      documents, shorter windows or caches it is transformers' "sdpa".

    Norms, loss and attention are differentiable once.

    Args:
        model: any module with ``Linear4bit`` layers of ``quant_type="nf4"``, already quantised.
        loss: ``None``: wherever it can be; a model of another kind is left as it is. ``True``: as
            ``None``, but it is an error if it cannot be. ``False``: not, for a training loop that
            reads the logits.
        attention: the same for attention.

    Returns:
        The same object, for chaining.

    Raises:
        ConfigError: bitsandbytes is not installed.
        UnsupportedModelError: there is no ``Linear4bit`` layer, or one of them is not NF4, not
            quantised yet, or was repacked by bitsandbytes for its own CPU inference; or an option
            is ``True`` and cannot be. Nothing has been changed then.
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
    known: list[Any] = [m for m in model.modules() if fused_loss.is_known(m)]
    with_loss = _chosen("loss", loss, model, known, fused_loss.refusal)
    with_attention = _chosen("attention", attention, model, known, native_attention.refusal)

    for module in list(model.modules()):
        if isinstance(module, Linear4bit):
            reclass(module, AcceleratedLinear4bit)
        elif is_adapter(module):
            reclass(module, AcceleratedAdapter)
    for each in known:
        for norm in norms(each):
            reclass(norm, FusedNorm)
        if each in with_loss:
            reclass(each, fused_loss.FusedLoss)
        else:
            restore(each)
        if each in with_attention:
            native_attention.switch(each)
        else:
            native_attention.restore(each)
    return model


def restore_4bit(model: ModelT) -> ModelT:
    """Undo :func:`accelerate_4bit`: every module has its own class and attention again.

    What was trained meanwhile stays as it is: weights and adapters were never elsewhere.

    Args:
        model: What :func:`accelerate_4bit` took, or a model around it or inside it. A model that
            was never accelerated is left as it is.

    Returns:
        The same object, for chaining.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        restore(module)
        if fused_loss.is_known(module):
            native_attention.restore(module)
    return model


def _chosen(
    option: str,
    wanted: bool | None,
    model: torch.nn.Module,
    known: list[Any],
    refusal: Callable[[Any], str | None],
) -> list[Any]:
    """Those of the ``known`` language models to which an option applies.

    Raises:
        UnsupportedModelError: It is wanted by name, and there is none.
    """
    if wanted is False:
        return []
    found = {id(each): refusal(each) for each in known}
    if wanted and (not found or any(found.values())):
        reason = next(
            (f"this {type(each).__name__} cannot: {found[id(each)]}" for each in known),
            f"{type(model).__name__} holds no causal language model of a known type",
        )
        raise UnsupportedModelError(
            f"accelerate_4bit: {option}=True, but {reason}; {option}=None leaves it out there"
        )
    return [each for each in known if found[id(each)] is None]


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
