"""Models of any size with random weights: right in every byte of memory, wrong in what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ladder_kernels.models.architecture import Architecture
from ladder_kernels.models.backbone import Backbone, Quantization
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.models.weights import WeightReader
from ladder_kernels.nf4 import NF4Weight, quantize_nf4

__all__ = ["RandomSource", "random_backbone"]


class RandomSource:
    """Tensors as a quantised checkpoint's, one at a time; the same ones in every run.

    Args:
        shapes: Of every tensor, by name.
        quantize_head: Whether the head, or the embeddings that are one, can be had in NF4.
    """

    where = "random weights"
    prequantized = True

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, quantize_head: bool) -> None:
        self._shapes = shapes
        self._quantize_head = quantize_head
        self._drawn: dict[tuple[int, ...], NF4Weight] = {}

    def _is_quantized(self, name: str) -> bool:
        if name == "lm_head.weight":
            return self._quantize_head
        return len(self._shapes[name]) == 2 and name != "model.embed_tokens.weight"

    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """Shape of every tensor by name; ``None`` for those that are quantised."""
        return {
            name: None if self._is_quantized(name) else shape
            for name, shape in self._shapes.items()
        }

    def read(self, name: str) -> torch.Tensor | NF4Weight:
        """One tensor: norms are 1, a matrix is scaled to keep its input's size."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if not self._is_quantized(name):
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        if shape not in self._drawn:
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            self._drawn[shape] = quantize_nf4(drawn.div_(math.sqrt(shape[1])))
        weight = self._drawn[shape]
        return replace(weight, **{key: each.clone() for key, each in weight.tensors().items()})


def random_backbone(config: Any, *, dtype: torch.dtype, quantize_head: bool = False) -> Backbone:
    """A backbone of the llama family on the CPU whose weights were never read from anywhere.

    Args:
        config: Its transformers configuration.
        dtype: Compute dtype.
        quantize_head: Whether the output head is NF4 (a head that is not the embeddings).
    """
    architecture = Architecture.of(config)
    tied = bool(config.tie_word_embeddings)
    settings = Quantization(quantize_head=quantize_head)
    shapes = architecture.shapes(tied=tied)
    reader = WeightReader(
        RandomSource(shapes, quantize_head=quantize_head),
        shapes=shapes,
        quantization=settings,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return NativeBackbone(config, architecture, reader, quantization=settings)
