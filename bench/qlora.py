"""QLoRA as its authors' libraries run it: PEFT on bitsandbytes' NF4 layers in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ladder_kernels.nf4 import NF4Weight

if TYPE_CHECKING:
    from ladder_kernels.models.native_backbone import NativeBackbone

__all__ = ["UnavailableError", "peft_qlora", "peft_qlora_on", "transformers_base"]


class UnavailableError(RuntimeError):
    """A method cannot run here; says why."""


def transformers_base(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A checkpoint in NF4 as transformers and bitsandbytes load it.

    Raises:
        RuntimeError: It was made in another dtype, which it would be loaded and multiplied in.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=str(device))
    if model.dtype != dtype:
        raise RuntimeError(f"{folder} was made in {model.dtype}, and {dtype} was asked for")
    return model


def peft_qlora(
    base: Path,
    *,
    dtype: torch.dtype,
    rank: int,
    checkpointing: bool = False,
    liger_loss: bool = False,
    device: torch.device | str = "cpu",
) -> Any:
    """The model in training mode, with adapters on all linear layers.

    Args:
        base: Folder of a checkpoint in NF4, as bitsandbytes reads it.
        dtype: To compute in.
        rank: Of the adapters.
        checkpointing: Whether blocks are recomputed in the backward pass.
        liger_loss: Whether the loss is Liger's fused linear cross entropy.
        device: Where.

    Raises:
        UnavailableError: Liger's kernels cannot run here.
    """
    return _adapted(transformers_base(base, dtype, device), rank, checkpointing, liger_loss)


def peft_qlora_on(
    backbone: NativeBackbone, *, rank: int, checkpointing: bool = False, liger_loss: bool = False
) -> Any:
    """The same on the weights of a backbone in memory, which are shared and not copied.

    Args:
        backbone: Where it is, the model will be; in its dtype.
        rank: Of the adapters.
        checkpointing: Whether blocks are recomputed in the backward pass.
        liger_loss: Whether the loss is Liger's fused linear cross entropy.

    Raises:
        UnavailableError: Liger's kernels cannot run here.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(backbone.config, dtype=backbone.dtype)
    for name, weight in backbone.named_weights():
        parent, _, field = name.rpartition(".")
        if isinstance(weight, NF4Weight):
            model.set_submodule(parent, _linear4bit(model.get_submodule(parent), weight))
        else:
            frozen = nn.Parameter(weight, requires_grad=False)
            setattr(model.get_submodule(parent), field, frozen)
    if model.lm_head.weight.is_meta:
        model.lm_head.weight = model.get_input_embeddings().weight
    # Frequencies follow from the configuration.
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=backbone.config).to(backbone.device)
    model.is_loaded_in_4bit = True
    return _adapted(model, rank, checkpointing, liger_loss)


def _linear4bit(linear: Any, weight: NF4Weight) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    packed, state = weight.to_bitsandbytes()
    of_parameter: Any = Params4bit
    layer: Any = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = of_parameter(
        packed,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.double_quant,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    return layer


def _adapted(model: Any, rank: int, checkpointing: bool, liger_loss: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    if liger_loss:
        _take_liger_loss(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def _take_liger_loss(model: Any) -> None:
    """Give ``model`` Liger's fused linear cross entropy, and no other kernel of Liger's."""
    if model.device.type != "cuda":
        raise UnavailableError(
            f"Liger's loss is a Triton kernel, and Triton has no driver for {model.device}: it "
            "needs a GPU"
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model_type = model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UnavailableError(f"Liger has no kernels for models of type '{model_type}'")
    options = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=True, **options)
