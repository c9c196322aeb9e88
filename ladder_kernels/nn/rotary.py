"""Rotary positions with every frequency scaling that transformers knows for the llama family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ladder_kernels.errors import UnsupportedModelError
from ladder_kernels.nn.linear import move_exactly

__all__ = ["ROPE_TYPES", "Rotary"]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

_LENGTH_DEPENDENT = ("dynamic", "longrope")


class Rotary(nn.Module):
    """Cosines and sines for rotary position embeddings.

    The frequencies come from transformers' own functions. Scalings whose frequencies depend on the
    length of the text (``dynamic``, ``longrope``) are evaluated anew for each forward, so a result
    depends on its inputs alone and not on what was run before.

    Args:
        config: A transformers configuration with ``rope_parameters``.
        head_dim: Size of a head; all of it is rotated.

    Raises:
        UnsupportedModelError: If the kind of scaling is not one of :data:`ROPE_TYPES`, or rotates
            only a part of each head.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: Any, head_dim: int) -> None:
        super().__init__()
        parameters = config.rope_parameters
        self.rope_type: str = parameters["rope_type"]
        if self.rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"rope type '{self.rope_type}' is not supported; allowed are "
                f"{', '.join(ROPE_TYPES)}"
            )
        self.config = config
        self.original_length: int = parameters.get(
            "original_max_position_embeddings", config.max_position_embeddings
        )
        if self.rope_type == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
            inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config)
        if inv_freq.numel() != head_dim // 2:
            raise UnsupportedModelError(
                "rope over a part of each head is not supported: it rotates "
                f"{2 * inv_freq.numel()} of {head_dim} dimensions"
            )
        self.attention_scaling = float(scaling)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        if self.rope_type not in _LENGTH_DEPENDENT:
            return self.inv_freq
        length = int(position_ids.max()) + 1
        ordinary = (
            self.original_length
            if self.rope_type == "longrope"
            else self.config.max_position_embeddings
        )
        if length <= ordinary:
            return self.inv_freq
        init = ROPE_INIT_FUNCTIONS[self.rope_type]
        return init(self.config, self.inv_freq.device, seq_len=length)[0]

    def forward(
        self, position_ids: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the given positions.

        Args:
            position_ids: int64 ``[B, S]``.
            dtype: Of the results; they are computed in fp32.

        Returns:
            Both ``[B or 1, S, 1, head_dim / 2]``, to broadcast over heads.
        """
        if position_ids.stride(0) == 0:
            position_ids = position_ids[:1]
        angles = position_ids[..., None].float() * self._frequencies(position_ids)
        cos = (angles.cos() * self.attention_scaling).to(dtype)
        sin = (angles.sin() * self.attention_scaling).to(dtype)
        return cos[:, :, None], sin[:, :, None]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Rotary:
        move_exactly(self, fn, ("inv_freq",))
        return self
