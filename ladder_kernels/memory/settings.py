"""How a training step is run, as far as memory depends on it, and what a stage of it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ladder_kernels.errors import ConfigError
from ladder_kernels.launch import HOST_TARGET
from ladder_kernels.memory.sizes import FLOAT32

__all__ = ["OPTIMIZERS", "PARTS", "Settings", "Stage", "optimizer_bytes"]

PARTS = (
    "weights", "embeddings", "head", "taps", "activations", "transients", "ladder", "gradients",
    "optimizer",
)  # fmt: skip
"""What memory is for: the frozen blocks; embeddings; output head; taps; what the side pass and the
layers above a re-entry keep for the backward pass; what one operation or layer needs while it runs;
trained parameters; their gradients; the optimizer's states."""

OPTIMIZERS = {"adamw": 8.0, "adamw_8bit": 2.0, "sgd": 0.0}
"""Bytes of states a trained number, by kind of optimizer."""

# Of 8-bit states: a scale for so many numbers, and tensors below this size stay in float32.
_STATE_BLOCK = 256
_SMALLEST_8BIT = 4096


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a step is run, as far as memory depends on it.

    Attributes:
        device: "cuda" or "cpu".
        context: Tokens a row.
        batch_size: Rows of a micro-batch.
        gradient_accumulation: Micro-batches of an optimizer step.
        element: Bytes of a number of the compute dtype.
        weights: Placement of the blocks.
        embeddings: "device" or "host".
        taps: "device", "host" or "disk".
        tap_dtype: "bfloat16", "float16", "float32" or "int8".
        slice_tokens: Tokens at a time inside a frozen layer; ``None``: all.
        recompute: Whether the side pass, and layers above a re-entry, are recomputed in the
            backward pass.
        optimizer: One of :data:`OPTIMIZERS`.
        free_gradients: Whether gradients are freed as they are applied.
        documents: Whether rows are packed with several documents, or padded.
        answers: Share of the tokens that have a label.
        target: The GPU.
    """

    device: Literal["cuda", "cpu"] = "cuda"
    context: int = 2048
    batch_size: int = 1
    gradient_accumulation: int = 1
    element: int = 2
    weights: str = "resident"
    embeddings: str = "device"
    taps: str = "device"
    tap_dtype: str = "bfloat16"
    slice_tokens: int | None = None
    recompute: bool = False
    optimizer: str = "adamw"
    free_gradients: bool = False
    documents: bool = False
    answers: float = 1.0
    target: str = HOST_TARGET

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.context

    @property
    def streams(self) -> bool:
        """Whether blocks are brought in one after another."""
        return self.weights != "resident"

    @property
    def together(self) -> int:
        """Micro-batches that pass through a frozen layer before the next one is brought in."""
        return self.gradient_accumulation if self.streams else 1


@dataclass(frozen=True)
class Stage:
    """What lives at one stage of a step.

    Attributes:
        name: Of the stage, in words.
        parts: Bytes by part; see :data:`PARTS`.
    """

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def optimizer_bytes(tensors: list[int], kind: str) -> int:
    """Bytes of an optimizer's states.

    Args:
        tensors: Numbers of each trained tensor.
        kind: One of :data:`OPTIMIZERS`.

    Raises:
        ConfigError: If ``kind`` is another.
    """
    if kind not in OPTIMIZERS:
        raise ConfigError(f"optimizer: found {kind!r}; allowed are {', '.join(OPTIMIZERS)}")
    if kind != "adamw_8bit":
        steps = FLOAT32 * len(tensors) if OPTIMIZERS[kind] else 0
        return int(sum(tensors) * OPTIMIZERS[kind]) + steps
    total = 2 * 256 * FLOAT32  # the maps of both states
    for numbers in tensors:
        if numbers < _SMALLEST_8BIT:
            total += 2 * FLOAT32 * numbers
        else:
            total += 2 * (numbers + FLOAT32 * -(-numbers // _STATE_BLOCK))
    return total
