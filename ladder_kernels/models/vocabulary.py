"""The frozen ends of a ladder model, embeddings and head, as transformers asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ladder_kernels.errors import UnsupportedModelError
from ladder_kernels.models.backbone import Backbone

__all__ = ["FrozenVocabulary"]


class _Rows(nn.Embedding):
    """Embeddings that may be elsewhere than what they are asked for, and in another dtype."""

    rows_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the table, ``[..., D]`` for ids ``[...]``, on the device of the ids."""
        rows = super().forward(input.to(self.weight.device))
        return rows.to(device=input.device, dtype=self.rows_dtype)


class FrozenVocabulary:
    """Embeddings and head of a model with a frozen backbone: they can be had, but not replaced."""

    _backbone: Backbone

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings, frozen, sharing its memory.

        Their rows are in the compute dtype and where the ids are, wherever they are themselves.
        """
        rows = _Rows.from_pretrained(self._backbone.embedding, freeze=True)
        rows.rows_dtype = self._backbone.dtype
        return rows

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: the embeddings are frozen with the rest of the backbone.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError("the embeddings of a frozen backbone cannot be replaced")

    def get_output_embeddings(self) -> nn.Module:
        """The frozen head as a linear layer, sharing its memory unless it is quantised."""
        head = self._backbone.head
        weight = head if isinstance(head, torch.Tensor) else head.dequantize(self._backbone.dtype)
        linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self._backbone.head_bias is not None:
            linear.bias = nn.Parameter(self._backbone.head_bias, requires_grad=False)
        return linear

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Refused: the head is frozen with the rest of the backbone.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError("the head of a frozen backbone cannot be replaced")

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Module:
        """Refused: the vocabulary is frozen with the rest of the backbone.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError("the vocabulary of a frozen backbone cannot be resized")
