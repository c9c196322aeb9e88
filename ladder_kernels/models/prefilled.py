"""Frozen passes that were run before their forward, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ladder_kernels.models.frozen_pass import FrozenPass

__all__ = ["Prefilled"]


@dataclass(frozen=True)
class Prefilled:
    """What ``LadderForCausalLM.prefill`` keeps of a micro-batch.

    Attributes:
        inputs: Tokens or embeddings, mask and positions, as they were given.
        read: As of its :class:`FrozenInput`.
        frozen: What its frozen pass left.
    """

    inputs: tuple[torch.Tensor | None, ...]
    read: torch.Tensor | None
    frozen: FrozenPass

    def is_of(self, inputs: tuple[torch.Tensor | None, ...]) -> bool:
        """Whether these are the inputs."""
        return all(_same(one, other) for one, other in zip(self.inputs, inputs, strict=True))

    def serves(self, read: torch.Tensor | None) -> bool:
        """Whether all is kept that is read."""
        return self.read is None or _same(self.read, read)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is other:
        return True
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other.to(one.device))
