"""What is said of QLoRA is what PEFT on bitsandbytes' layers takes, within ten per cent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bench.qlora import peft_qlora
from bench.random_weights import random_backbone
from ladder_kernels.memory.meter import Meter
from ladder_kernels.memory.qlora import qlora_stages
from ladder_kernels.memory.settings import Settings
from ladder_kernels.memory.sizes import ModelSizes

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
WIDE_VOCABULARY = {**SHAPE, "vocab_size": 8192}
NORMED = {**SHAPE, "model_type": "qwen3", "head_dim": 32}


def taken(config: Any, dtype: torch.dtype, batch: int, context: int, checkpointing: bool, folder):
    random_backbone(config, device="cpu", dtype=dtype).save_pretrained(folder)
    model = peft_qlora(folder, dtype=dtype, rank=16, checkpointing=checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.arange(batch * context).view(batch, context) % config.vocab_size
    with Meter(model, optimizer) as meter:
        for _ in range(2):
            meter.restart()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return meter.peak.usage


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "batch", "context"),
    [
        (SHAPE, torch.bfloat16, 1, 512),
        (SHAPE, torch.float32, 1, 512),
        (WIDE_VOCABULARY, torch.bfloat16, 2, 256),
        (NORMED, torch.bfloat16, 1, 384),
    ],
    ids=["bfloat16", "float32", "wide vocabulary", "normed"],
)
def test_a_real_model(shape, dtype, batch, context, checkpointing, tmp_path):
    config = AutoConfig.for_model(**shape)
    usage = taken(config, dtype, batch, context, checkpointing, tmp_path / "base")
    model = ModelSizes(config, element=dtype.itemsize)
    settings = Settings(device="cpu", context=context, batch_size=batch, element=dtype.itemsize)
    stages = qlora_stages(model, settings, rank=16, checkpointing=checkpointing)
    peak = max(stages, key=lambda stage: stage.total)
    base = peak.parts["weights"] + peak.parts["embeddings"] + peak.parts["head"]
    # transformers maps the file; what it does not map, it holds.
    assert usage.weights + usage.mapped == pytest.approx(base, rel=0.1)
    beyond = usage.total - usage.weights
    assert beyond <= peak.total - base <= 1.1 * beyond


def test_checkpointing_keeps_what_enters_a_block():
    model = ModelSizes(AutoConfig.for_model(**SHAPE))
    short, long = (
        {
            kept: max(
                stage.parts["activations"]
                for stage in qlora_stages(model, Settings(context=context), checkpointing=kept)
            )
            for kept in (False, True)
        }
        for context in (1024, 2048)
    )
    assert long[False] == 2 * short[False]
    assert long[True] == 2 * short[True] == 4 * 2048 * 256 * 2


def test_a_gpu_dequantises_a_whole_weight():
    model = ModelSizes(AutoConfig.for_model(**{**SHAPE, "intermediate_size": 65536}))
    few = Settings(context=16, device="cuda")
    on_gpu, on_cpu = (
        max(stage.total for stage in qlora_stages(model, settings))
        for settings in (few, Settings(context=16, device="cpu"))
    )
    assert on_gpu - on_cpu > 0.9 * 2 * 256 * 65536
