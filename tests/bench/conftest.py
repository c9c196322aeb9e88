"""A tiny model's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import Qwen2Config


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Qwen2Config]:
    """Makes the configuration of a model of three layers, with further fields."""

    def make(**more: Any) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **more,
        )

    return make
