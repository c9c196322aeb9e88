"""QLoRA as its authors' libraries run it: PEFT on bitsandbytes' NF4 layers in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["peft_qlora"]


def peft_qlora(base: Path, *, dtype: torch.dtype, rank: int, checkpointing: bool = False) -> Any:
    """The model in training mode, with adapters on all linear layers.

    Args:
        base: Folder of a checkpoint in NF4, as bitsandbytes reads it.
        dtype: To compute in.
        rank: Of the adapters.
        checkpointing: Whether blocks are recomputed in the backward pass.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map="cpu")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()
