"""Tiny random models of every family, and how to compare a backbone with transformers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.attention import SequenceLayout

VOCAB = 128

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADED = {**_LLAMA_LIKE, "head_dim": 16}
_SLIDING = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# One entry a family, with everything switched on that tells it from plain llama.
NATIVE: dict[str, dict[str, Any]] = {
    "llama": {**_HEADED, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_HEADED, "sliding_window": 5},
    "ministral": {
        **_HEADED,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen2": {**_LLAMA_LIKE, **_SLIDING},
    "qwen3": {**_HEADED, **_SLIDING, "head_dim": 24, "attention_bias": True},
    "smollm3": {
        **_LLAMA_LIKE,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "seed_oss": {**_HEADED, "attention_out_bias": True},
    "cwm": {
        **_HEADED,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}

HOOKED: dict[str, dict[str, Any]] = {
    "cohere": {**_LLAMA_LIKE, "logit_scale": 0.25, "use_qk_norm": True},
    "gemma": {**_HEADED},
    "gemma2": {
        **_HEADED,
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_HEADED,
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": _GPT,
    "gpt_neox": {**_LLAMA_LIKE},
    "granite": {
        **_LLAMA_LIKE,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "olmo": {**_LLAMA_LIKE, "clip_qkv": 2.0},
    "olmo2": {**_LLAMA_LIKE},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "phi": {**_LLAMA_LIKE},
    "phi3": {**_LLAMA_LIKE, "sliding_window": 5},
    "stablelm": {**_LLAMA_LIKE, "use_qkv_bias": True},
    "starcoder2": {**_LLAMA_LIKE, "sliding_window": 5},
}


def make_model(model_type: str, **overrides: Any) -> Any:
    """A tiny random fp32 transformers model whose norms and biases are not trivial."""
    fields = {**NATIVE, **HOOKED}[model_type]
    config = AutoConfig.for_model(model_type, **copy.deepcopy({**fields, **overrides}))
    generator = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model


def without_repacking(model: Any) -> Any:
    """Keep a model's bitsandbytes layers on their exact path, on every CPU.

    On one with AVX512-BF16, the first forward of an evaluation repacks them, rounds their scales to
    bf16, and fails where a row is no whole number of blocks.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def copy_weights(backbone: Any, model: Any) -> Any:
    """Give a transformers model the dequantised weights of a backbone."""
    with torch.no_grad():
        for name, weight in backbone.named_weights():
            value = weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight
            module = model.get_submodule(name.rpartition(".")[0])
            if name.startswith("lm_head") and isinstance(weight, NF4Weight):
                module.weight = torch.nn.Parameter(value)
            transposed = isinstance(module, Conv1D) and value.dim() == 2
            model.get_parameter(name).copy_(value.t() if transposed else value)
    return model


def logits_of(
    backbone: Any,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Any = None,
) -> torch.Tensor:
    """Logits [B, S, V] of a backbone alone."""
    layout = SequenceLayout.build(
        *input_ids.shape,
        past_length=0 if cache is None else cache.get_seq_length(),
        attention_mask=attention_mask,
        position_ids=position_ids,
    )
    return backbone.logits(backbone.frozen_pass(input_ids, layout=layout, cache=cache).hidden)


def relative_error(
    ours: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor | None = None
) -> float:
    """Largest difference over the largest value, over real tokens [B, S]."""
    if real is not None:
        ours, theirs = ours[real.bool()], theirs[real.bool()]
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


class LiveFloats(TorchDispatchMode):
    """The largest number of float bytes alive at once, of tensors made while it watches."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and tensor.device.type == "cpu":
                    self.known.add(key)
                    size = storage.nbytes()
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, key, size)
        return out


@pytest.fixture(scope="session")
def live_floats() -> type[LiveFloats]:
    return LiveFloats


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    return make_model


@pytest.fixture(scope="session")
def give_weights() -> Callable[..., Any]:
    return copy_weights


@pytest.fixture(scope="session")
def exact() -> Callable[[Any], Any]:
    return without_repacking


@pytest.fixture(scope="session")
def logits() -> Callable[..., torch.Tensor]:
    return logits_of


@pytest.fixture(scope="session")
def error() -> Callable[..., float]:
    return relative_error


@pytest.fixture(scope="session")
def pair() -> Callable[[str], tuple[Any, Any]]:
    """A backbone of a family and the transformers model with the same weights, made once."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(model_type: str) -> tuple[Any, Any]:
        from ladder_kernels.models.loading import backbone_from_transformers

        if model_type not in made:
            model = make_model(model_type)
            backbone = backbone_from_transformers(model)
            made[model_type] = backbone, copy_weights(backbone, model)
        return made[model_type]

    return get
