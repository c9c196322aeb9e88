from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.qlora import peft_qlora_on
from ladder_kernels.models.loading import load_backbone


@pytest.fixture
def backbone(tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=97,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return load_backbone(tmp_path, dtype=torch.float32)


def test_loss_of_liger_says_why_it_cannot_run(backbone) -> None:
    with pytest.raises(RuntimeError, match="has no driver for cpu: it needs a GPU"):
        peft_qlora_on(backbone, rank=4, liger_loss=True)


def test_without_it_the_same_model_trains(backbone) -> None:
    ids = torch.arange(40).reshape(2, 20)
    peft_qlora_on(backbone, rank=4)(input_ids=ids, labels=ids).loss.backward()
