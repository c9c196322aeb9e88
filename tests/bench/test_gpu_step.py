"""The benchmark of training steps on a GPU: its base, its rivals and its methods, on the CPU."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import gpu_step, rows
from bench.qlora import peft_qlora, peft_qlora_on
from bench.random_weights import random_backbone


@pytest.fixture
def made(tiny_config):
    def make(seed=0, **more):
        return random_backbone(tiny_config(**more), device="cpu", seed=seed)

    return make


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_base_is_a_model_that_can_be_saved(made, tmp_path, tied):
    backbone = made(tie_word_embeddings=tied)
    for _, weight in backbone.named_weights():
        values = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        assert values.isfinite().all()
        assert 0 < values.float().abs().mean() <= 1
    again = dict(made(tie_word_embeddings=tied).named_weights())["model.embed_tokens.weight"]
    assert torch.equal(backbone.embedding, again)
    assert not torch.equal(backbone.embedding, made(1).embedding)
    # The rival on shared weights is the rival that was loaded from a folder.
    backbone.save_pretrained(tmp_path / "base")
    loaded = peft_qlora(tmp_path / "base", dtype=torch.bfloat16, rank=4)
    shared = peft_qlora_on(backbone, rank=4)
    ids = torch.arange(40)[None] * 7 % 320
    assert torch.equal(loaded(ids).logits, shared(ids).logits)
    packed = shared.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert packed.data_ptr() == backbone.blocks[0].up.packed.data_ptr()
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (loaded, shared)]
    assert trained[0] == trained[1] > 0


def test_every_method_trains_and_is_written_down(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    backbone = made()
    chosen = [name for name in gpu_step.methods(backbone, 4) if not name.startswith("compiled")]
    failed = gpu_step.compare(
        backbone, name="tiny", context=32, rank=4, steps=1, only=tuple(chosen)
    )
    assert failed == 0, capsys.readouterr().out
    with (tmp_path / "gpu_step.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    # Bytes are known on a GPU alone.
    assert [row["candidate"] for row in found] == chosen
    assert {row["metric"] for row in found} == {"seconds"}
    assert {row["evidence"] for row in found} == {"measured"}
    assert {row["model"] for row in found} == {"tiny, random weights"}


def test_a_method_that_does_not_learn_is_not_timed(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    failed = gpu_step.compare(
        made(), name="tiny", context=32, rank=4, steps=1, only=("recommended ladder, re",)
    )
    assert failed == 1
    assert "not timed" in capsys.readouterr().out
    assert rows.read("gpu_step.csv") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert gpu_step.main([]) == 0
    assert capsys.readouterr().out.startswith("There is no GPU here, so nothing was measured")
