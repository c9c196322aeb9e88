"""A frozen base of a known shape with random NF4 weights, made where it is used.

What a step costs in time and memory does not depend on what the weights are, as long as nothing
overflows; so the shape of a model is enough, and nothing is fetched.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config

from ladder_kernels.models.loading import backbone_from_config
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.rotary import Rotary

__all__ = ["SHAPES", "fill_nf4", "random_backbone"]

SHAPES = {
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}
"""Configurations by name, as published."""

_STD = 0.02


def fill_nf4(weight: NF4Weight, generator: torch.Generator) -> None:
    """Put random numbers into a weight: any bytes are one; scales are about 0.05.

    Args:
        weight: Overwritten.
        generator: On its device.
    """
    weight.packed.random_(0, 256, generator=generator)
    if weight.nested_absmax is None or weight.nested_code is None:
        weight.absmax.uniform_(0.03, 0.07, generator=generator)
        return
    weight.absmax.random_(0, 256, generator=generator)
    weight.nested_absmax.uniform_(0.01, 0.02, generator=generator)
    weight.nested_code.copy_(torch.linspace(-1, 1, 256))
    weight.tensors()["nested_offset"].fill_(0.05)


def random_backbone(
    config: Any,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    quantize_head: bool = False,
    seed: int = 0,
) -> NativeBackbone:
    """A backbone with random weights.

    Args:
        config: A transformers configuration of the llama family.
        device: Where it is made.
        dtype: Compute dtype.
        quantize_head: Whether the output head is NF4 too.
        seed: Of the weights.

    Returns:
        The backbone; the same in every run on the same device.
    """
    backbone = backbone_from_config(config, device="meta", dtype=dtype, quantize_head=quantize_head)
    assert isinstance(backbone, NativeBackbone)
    backbone.to_empty(device=device)
    # Frequencies follow from the configuration.
    backbone.rotary = Rotary(config, backbone.architecture.head_dim).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in backbone.named_weights():
        if isinstance(weight, NF4Weight):
            fill_nf4(weight, generator)
        elif name.endswith("norm.weight"):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, _STD, generator=generator)
    return backbone
