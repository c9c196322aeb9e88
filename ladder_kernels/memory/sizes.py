"""Bytes of models and ladders, from their configurations alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ladder_kernels.errors import UnsupportedModelError
from ladder_kernels.models.architecture import FAMILIES, Architecture
from ladder_kernels.models.config import LadderConfig
from ladder_kernels.nf4.quantize import NESTED_BLOCKSIZE

__all__ = ["FLOAT32", "LadderSizes", "ModelSizes"]

FLOAT32 = 4
"""Bytes of a number of the ladder."""

_OFFSET = 4
_CODE = 256 * FLOAT32
_SLOT_ALIGNED = 256


@dataclass(frozen=True)
class _Packed:
    """Bytes of an NF4 weight's tensors.

    Attributes:
        parts: Those that a slot of streamed weights holds.
        offset: Of the mean of the scales, which does not move.
    """

    parts: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, shape: tuple[int, int], blocksize: int, double_quant: bool) -> _Packed:
        numbers = math.prod(shape)
        blocks = -(-numbers // blocksize)
        packed = (numbers + 1) // 2
        if not double_quant:
            return cls((packed, FLOAT32 * blocks), 0)
        nested = FLOAT32 * -(-blocks // NESTED_BLOCKSIZE)
        return cls((packed, blocks, nested, _CODE), _OFFSET)

    @property
    def bytes(self) -> int:
        return sum(self.parts) + self.offset

    @property
    def in_slot(self) -> int:
        return sum(-(-part // _SLOT_ALIGNED) * _SLOT_ALIGNED for part in self.parts)


class ModelSizes:
    """A frozen model of the llama family in numbers.

    Args:
        config: Its transformers configuration.
        element: Bytes of a number of the compute dtype.
        blocksize: Weights that share a scale.
        double_quant: Whether the scales are quantised too.
        quantize_head: Whether the output head is NF4.

    Attributes:
        architecture: As the model has it.
        element: As above.
        linears: ``(N, K)`` of the linear layers of a block, by role.
        tied: Whether the head is the embeddings.
        head_is_nf4: As above.

    Raises:
        UnsupportedModelError: If the model runs on the layers of transformers, whose memory is not
            known here.
    """

    def __init__(
        self,
        config: Any,
        *,
        element: int = 2,
        blocksize: int = 64,
        double_quant: bool = True,
        quantize_head: bool = False,
    ) -> None:
        if config.model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"plan: '{config.model_type}' does not run on layers of ladder_kernels, so its "
                f"memory is not known beforehand; allowed are {', '.join(FAMILIES)}"
            )
        self.architecture = Architecture.of(config)
        self.element = element
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.tied = bool(config.tie_word_embeddings)
        self.head_is_nf4 = quantize_head
        self.linears = {role: shape for role, (_, shape, _) in self.architecture.linears().items()}
        self.layers = self.architecture.num_layers
        self.width = self.architecture.hidden_size
        self.mlp_width = self.architecture.intermediate_size
        self.vocabulary = self.architecture.vocab_size
        self.heads = self.architecture.heads
        self.head_dim = self.architecture.head_dim
        self.query_width = self.heads * self.head_dim
        self.key_width = self.architecture.kv_heads * self.head_dim

    def _packed(self, shape: tuple[int, int]) -> _Packed:
        return _Packed.of(shape, self.blocksize, self.double_quant)

    def _block_floats(self) -> int:
        """Bytes of a block's norms and biases."""
        architecture = self.architecture
        biases = sum(rows for _, (rows, _), bias in architecture.linears().values() if bias)
        norms = sum(size for _, size in architecture.norms().values())
        return self.element * (biases + norms)

    def blocks(self, placement: str = "resident") -> int:
        """Bytes of all blocks on the device.

        Args:
            placement: Of the weights; see :mod:`ladder_kernels.memory.placement`.
        """
        packed = [self._packed(shape) for shape in self.linears.values()]
        floats = self.layers * self._block_floats()
        if placement == "resident":
            return self.layers * sum(each.bytes for each in packed) + floats
        slots = min(2, self.layers) * sum(each.in_slot for each in packed)
        return slots + floats + self.layers * sum(each.offset for each in packed)

    def packed_block(self) -> int:
        """Bytes of one block in its file."""
        return sum(self._packed(shape).bytes for shape in self.linears.values())

    def embeddings(self) -> int:
        """Bytes of the embeddings."""
        return self.element * self.vocabulary * self.width

    def head(self) -> int:
        """Bytes of the head beside the embeddings."""
        if self.head_is_nf4:
            return self._packed((self.vocabulary, self.width)).bytes
        return 0 if self.tied else self.embeddings()

    def others(self) -> int:
        """Bytes of the last norm and of the rotary frequencies."""
        return self.element * self.width + FLOAT32 * (self.head_dim // 2)

    def parameters(self) -> int:
        """Number of weights."""
        shapes = self.architecture.shapes(tied=self.tied)
        return sum(math.prod(shape) for shape in shapes.values())

    def block_parameters(self) -> int:
        """Number of weights of the linear layers of one block."""
        return sum(math.prod(shape) for shape in self.linears.values())


class LadderSizes:
    """A ladder beside a model in numbers.

    Args:
        config: Its configuration; "auto" is settled for the model.
        model: The model.

    Attributes:
        config: The settled one.
        tap_layers: Every layer that is read, ascending.
        rungs: Number of taps of each rung, bottom first.
        reentry: Backbone layers after the ladder.
        stop: Backbone layers of the frozen pass.

    Raises:
        ConfigError: If the ladder does not fit the model.
    """

    def __init__(self, config: LadderConfig, model: ModelSizes) -> None:
        self.config = config = config.settled(model.layers)
        taps = config.resolve(model.layers)
        shape = config.side_shape(model.width, model.mlp_width, model.head_dim)
        self.rungs = [len(layers) for layers in taps]
        self.tap_layers = tuple(sorted({0}.union(*taps))) if taps else ()
        self.reentry = config.reentry_layers(model.layers)
        self.stop = model.layers - self.reentry
        self.width, self.mlp_width = shape.width, shape.mlp_width
        self.has_attention = config.block == "transformer"
        self.head_dim = shape.head_dim
        self.heads = shape.width // shape.head_dim if self.has_attention else 0
        self._model = model

    def _tensors(self) -> Iterable[int]:
        """Numbers of each trained tensor."""
        D, d, m, config = self._model.width, self.width, self.mlp_width, self.config
        if self.rungs:
            yield d * D
            yield D * d
            if config.output == "interpolate":
                yield D
        for taps in self.rungs:
            yield from [d * D] * taps
            if taps and config.merge != "sum":
                yield d if config.merge == "channel" else 1
            yield from (d, m * d, m * d, d * m)
            if self.has_attention:
                yield from (d, d * d, d * d, d * d, d * d)
        if config.adapter_rank:
            for rows, columns in self._model.linears.values():
                yield from [config.adapter_rank * rows] * self.reentry
                yield from [config.adapter_rank * columns] * self.reentry

    def tensors(self) -> list[int]:
        """Numbers of each trained tensor, in no order."""
        return list(self._tensors())

    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(self._tensors())
