"""Models of any size with random weights: right in every byte of memory, wrong in what they say.

What a step costs in time and memory does not depend on what the weights are, as long as nothing
overflows; so the shape of a model is enough, and nothing is fetched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ladder_kernels.memory.placement import Placement
from ladder_kernels.models.architecture import Architecture
from ladder_kernels.models.backbone import Quantization
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.models.weights import WeightReader
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.codebook import NF4_VALUES

__all__ = ["RandomSource", "fill_nf4", "random_backbone"]

# Of embeddings and a float head. So many rows are drawn, and come again: few of them meet.
_STD = 0.02
_ROWS = 4096


def fill_nf4(weight: NF4Weight, generator: torch.Generator | None, *, scale: float = 0.05) -> None:
    """Put random numbers into a weight: any bytes are one.

    Args:
        weight: Overwritten.
        generator: On its device; ``None`` for PyTorch's own.
        scale: About that of its blocks.
    """
    weight.packed.random_(0, 256, generator=generator)
    if weight.nested_absmax is None or weight.nested_code is None:
        weight.absmax.uniform_(0.6 * scale, 1.4 * scale, generator=generator)
        return
    weight.absmax.random_(0, 256, generator=generator)
    weight.nested_absmax.uniform_(0.2 * scale, 0.4 * scale, generator=generator)
    weight.nested_code.copy_(torch.linspace(-1, 1, 256))
    weight.tensors()["nested_offset"].fill_(scale)


class RandomSource:
    """Tensors as a quantised checkpoint's, one at a time; the same ones in every run.

    Args:
        shapes: Of every tensor, by name.
        quantize_head: Whether the head, or the embeddings that are one, can be had in NF4.
        seed: Of the numbers.
    """

    where = "random weights"
    prequantized = True

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, quantize_head: bool, seed: int = 0
    ) -> None:
        self._shapes = shapes
        self._quantize_head = quantize_head
        self._seed = seed
        self._drawn: dict[tuple[int, ...], NF4Weight] = {}

    def _is_quantized(self, name: str) -> bool:
        if name == "lm_head.weight":
            return self._quantize_head
        return len(self._shapes[name]) == 2 and name != "model.embed_tokens.weight"

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)

    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """Shape of every tensor by name; ``None`` for those that are quantised."""
        return {
            name: None if self._is_quantized(name) else shape
            for name, shape in self._shapes.items()
        }

    def mapped(self, name: str) -> None:
        """No tensor lies in a file."""

    def read(self, name: str) -> torch.Tensor | NF4Weight:
        """One tensor on the CPU: norms are 1, a quantised matrix keeps its input's size."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if not self._is_quantized(name):
            drawn = torch.randn((min(shape[0], _ROWS), *shape[1:]), generator=self._generator())
            repeats = -(-shape[0] // _ROWS)
            return drawn.mul_(_STD).repeat(repeats, *[1] * (len(shape) - 1))[: shape[0]]
        if shape not in self._drawn:
            weight = NF4Weight.empty(shape)
            size = _code_size() * math.sqrt(shape[1])
            fill_nf4(weight, self._generator(), scale=1 / size)
            self._drawn[shape] = weight
        weight = self._drawn[shape]
        return replace(weight, **{key: each.clone() for key, each in weight.tensors().items()})


@functools.cache
def _code_size() -> float:
    """Root of the mean square of NF4's numbers, each as likely as the other."""
    return math.sqrt(sum(value * value for value in NF4_VALUES) / len(NF4_VALUES))


def random_backbone(
    config: Any,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    quantize_head: bool = False,
    weights: str = "resident",
    embeddings: str | None = None,
    seed: int = 0,
) -> NativeBackbone:
    """A backbone of the llama family whose weights were never read from anywhere.

    Args:
        config: Its transformers configuration.
        device: Where it runs.
        dtype: Compute dtype.
        quantize_head: Whether the output head is NF4 (a head that is not the embeddings).
        weights: Where its layers' weights are: "resident", or "host", beside a GPU.
        embeddings: Where its embeddings are.
        seed: Of the weights.

    Returns:
        The backbone; the same in every run, and on every device.
    """
    place, placement = torch.device(device), Placement.of(weights, embeddings)
    placement.check_device(place)
    architecture = Architecture.of(config)
    settings = Quantization(quantize_head=quantize_head)
    shapes = architecture.shapes(tied=bool(config.tie_word_embeddings))
    reader = WeightReader(
        RandomSource(shapes, quantize_head=quantize_head, seed=seed),
        shapes=shapes,
        quantization=settings,
        dtype=dtype,
        device=place,
        placement=placement,
    )
    return NativeBackbone(config, architecture, reader, quantization=settings)
