"""A ladder model without its head, for trainers with a loss of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    from ladder_kernels.models.modeling import LadderForCausalLM

__all__ = ["Headless"]


class Headless(nn.Module):
    """A ladder model up to its head; parameters stay the model's."""

    def __init__(self, model: LadderForCausalLM) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """States before the head; arguments are those of the model's forward."""
        model: Any = self._model
        given = model._given(input_ids, inputs_embeds)
        layout = model._layout(given, attention_mask, position_ids, past_key_values)
        y = model._top(input_ids, inputs_embeds, layout, past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=model._before_head(y),
            past_key_values=past_key_values,
        )
