"""Attention of transformers' models on the native kernels of a CPU.

transformers lets a model take its attention by name. Ours is what its "sdpa" is, masks included,
except that plain causal attention over a whole sequence runs on :func:`ladder_kernels.nn.attention.
attend`. What else there is (padding, packed documents, windows that are shorter than the sequence,
caches, dropout, another device) goes to "sdpa" itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ladder_kernels.nn.attention import SequenceLayout, attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NAME", "refusal", "restore", "switch"]

NAME = "ladder_kernels"
"""Of the implementation, as ``config._attn_implementation`` has it."""

_SDPA = "sdpa"
_NOT_OURS = ("cache", "output_attentions", "position_bias", "s_aux", "softcap")


def refusal(model: PreTrainedModel) -> str | None:
    """Say why a model of a known type cannot have its attention from here; ``None`` if it can."""
    found = model.config._attn_implementation
    if found not in (_SDPA, NAME):
        return f"its attention is '{found}', and only that of '{_SDPA}' is equal"
    if model.device.type != "cpu":
        return f"it is on device {model.device}, where the kernels of '{_SDPA}' are as fast"
    if not model._can_set_attn_implementation():
        return "transformers cannot change its attention"
    return None


def switch(model: PreTrainedModel) -> None:
    """Take the attention of ``model``, which has "sdpa" now, from here."""
    register()
    model.set_attn_implementation(NAME)


def restore(model: PreTrainedModel) -> None:
    """Undo :func:`switch`, if it was done."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(_SDPA)


def register() -> None:
    """Make the name known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Interface of transformers: ``query`` ``[B, H, S, hd]``; returns ``[B, S, H, hd]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (
        not causal
        or attention_mask is not None
        or dropout
        or any(kwargs.get(name) not in (None, False) for name in _NOT_OURS)
        or not _fits(query, key, value)
    ):
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, length, width = query.shape
    layout = SequenceLayout.build(batch, length)
    out = attend(query, key, value, layout, scale=scaling)
    return out.view(batch, length, heads, width), None


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.shape[2] == key.shape[2] > 1
        and query.shape[3] == value.shape[3]
        and query.dtype == key.dtype == value.dtype
        and not torch.compiler.is_compiling()
    )
