"""Random weights of any size, as tensors of a quantised checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from ladder_kernels.nf4 import NF4Weight, quantize_nf4

__all__ = ["RandomSource"]


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
