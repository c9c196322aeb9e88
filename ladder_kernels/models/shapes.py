"""The shapes of well-known models, so that nothing has to be downloaded to plan for one.

They are what the ``config.json`` of each says, as far as it matters for memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ladder_kernels.errors import CheckpointError, MissingFileError

__all__ = ["KNOWN", "config_of"]


def _shape(
    kind: str,
    vocabulary: int,
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    *,
    tied: bool = False,
    **more: Any,
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "model_type": kind,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": context,
            "tie_word_embeddings": tied,
            **more,
        }
    )


_QWEN3: Any = {"head_dim": 128}

KNOWN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Llama-2-7B": _shape("llama", 32000, 4096, 11008, 32, 32, 32, 4096),
        "Llama-2-13B": _shape("llama", 32000, 5120, 13824, 40, 40, 40, 4096),
        "Llama-2-70B": _shape("llama", 32000, 8192, 28672, 80, 64, 8, 4096),
        "Llama-3.1-8B": _shape("llama", 128256, 4096, 14336, 32, 32, 8, 131072),
        "Llama-3.1-70B": _shape("llama", 128256, 8192, 28672, 80, 64, 8, 131072),
        "Llama-3.2-1B": _shape("llama", 128256, 2048, 8192, 16, 32, 8, 131072, tied=True),
        "Llama-3.2-3B": _shape("llama", 128256, 3072, 8192, 28, 24, 8, 131072, tied=True),
        "Qwen2.5-0.5B": _shape("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, tied=True),
        "Qwen2.5-1.5B": _shape("qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, tied=True),
        "Qwen2.5-7B": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072),
        "Qwen2.5-14B": _shape("qwen2", 152064, 5120, 13824, 48, 40, 8, 131072),
        "Qwen2.5-32B": _shape("qwen2", 152064, 5120, 27648, 64, 40, 8, 131072),
        "Qwen2.5-72B": _shape("qwen2", 152064, 8192, 29568, 80, 64, 8, 131072),
        "Qwen3-0.6B": _shape("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, tied=True, **_QWEN3),
        "Qwen3-1.7B": _shape("qwen3", 151936, 2048, 6144, 28, 16, 8, 40960, tied=True, **_QWEN3),
        "Qwen3-4B": _shape("qwen3", 151936, 2560, 9728, 36, 32, 8, 40960, tied=True, **_QWEN3),
        "Qwen3-8B": _shape("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, **_QWEN3),
        "Qwen3-14B": _shape("qwen3", 151936, 5120, 17408, 40, 40, 8, 40960, **_QWEN3),
        "Qwen3-32B": _shape("qwen3", 151936, 5120, 25600, 64, 64, 8, 40960, **_QWEN3),
        "Mistral-7B": _shape(
            "mistral", 32768, 4096, 14336, 32, 32, 8, 32768, sliding_window=None
        ),
        "SmolLM2-135M": _shape("llama", 49152, 576, 1536, 30, 9, 3, 8192, tied=True),
        "SmolLM2-360M": _shape("llama", 49152, 960, 2560, 32, 15, 5, 8192, tied=True),
        "SmolLM2-1.7B": _shape("llama", 49152, 2048, 8192, 24, 32, 32, 8192, tied=True),
    }
)  # fmt: skip
"""Configurations by the models' names, without the owner's."""


def config_of(name_or_path: str) -> Any:
    """A model's transformers configuration, without its weights.

    Args:
        name_or_path: A name in :data:`KNOWN`, with or without an owner before it, in any case and
            with anything such as ``-Instruct`` after it; a ``config.json``; or a folder with one.

    Returns:
        The configuration.

    Raises:
        MissingFileError: If it is none of these.
        CheckpointError: If the file is no configuration.
    """
    from transformers import AutoConfig

    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: found no configuration of a language model ({error}); allowed is a "
                "config.json as transformers writes it"
            ) from error
    shape = _known(name_or_path)
    if shape is None:
        raise MissingFileError(
            f"{name_or_path}: found neither a folder, nor a config.json, nor a known model; known "
            f"are {', '.join(KNOWN)}"
        )
    return AutoConfig.for_model(**shape)


def _known(name: str) -> Mapping[str, Any] | None:
    """The shape of the longest known name that a name begins with, at a word's end."""
    own = name.rpartition("/")[2].lower().replace("meta-llama-", "llama-").replace("-hf", "")
    fits = [known for known in KNOWN if own == known.lower() or own.startswith(f"{known.lower()}-")]
    return KNOWN[max(fits, key=len)] if fits else None
