"""Full fine-tuning of the float model by transformers: the baseline without a frozen base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ladder_kernels.demo import find_weights

__all__ = ["FULL", "FULL_BASE", "FULL_RATE", "FullModel"]

FULL = "full fine-tuning"
"""Its name in rows of results."""

FULL_BASE = "float"
"""The base it begins with."""

FULL_RATE = 1e-4
"""Learning rate of all parameters, at its highest."""


class FullModel(nn.Module):
    """SmolLM2-135M-Instruct in float32, multiplied in bfloat16, all of it trained.

    Packed documents are told apart by their positions, as transformers does without a mask.
    """

    def __init__(self) -> None:
        super().__init__()
        path = find_weights()
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )

    def forward(self, attention_mask: torch.Tensor | None = None, **batch: Any) -> Any:
        """What transformers returns; rows are padded on the right, where nothing is labelled."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**batch, use_cache=False)

    def generate(self, **options: Any) -> torch.Tensor:
        """As transformers' own."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.generate(**options)

    def num_parameters(self, *, only_trainable: bool) -> int:
        """How many; tied ones count once."""
        return self.model.num_parameters(only_trainable=only_trainable)
