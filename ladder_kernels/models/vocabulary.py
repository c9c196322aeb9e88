"""The frozen ends of a ladder model, embeddings and head, as transformers asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ladder_kernels.errors import UnsupportedModelError
from ladder_kernels.models.backbone import Backbone

__all__ = ["FrozenVocabulary"]


class FrozenVocabulary:
    """Embeddings and head of a model with a frozen backbone: they can be had, but not replaced."""

    _backbone: Backbone

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings, frozen, sharing its memory."""
        return nn.Embedding.from_pretrained(self._backbone.embedding, freeze=True)

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
