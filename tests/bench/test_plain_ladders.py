"""Side networks in ordinary PyTorch, as rivals: they learn, and leave their base alone."""

from __future__ import annotations

import pytest
import torch

from bench.plain_ladders import PlainLST, PlainQST
from bench.qlora import transformers_base
from bench.random_weights import random_backbone


@pytest.fixture
def base(tmp_path, tiny_config):
    folder = tmp_path / "base"
    random_backbone(tiny_config(), device="cpu", dtype=torch.float32).save_pretrained(folder)
    return transformers_base(folder, torch.float32)


@pytest.mark.parametrize("kind", [PlainLST, PlainQST])
def test_they_learn(base, kind):
    ids = torch.randint(0, 320, (1, 12), generator=torch.Generator().manual_seed(0))
    model = kind(base, width=16).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {id(p) for p in base.parameters()}
    assert not any(id(p) in frozen for p in trained)
    assert not base.training
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        assert all(p.grad is None for p in base.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("kind", [PlainLST, PlainQST])
def test_no_token_sees_a_later_one(base, kind):
    ids = torch.randint(0, 320, (1, 12), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 8:] = (ids[0, 8:] + 1) % 320
    model = kind(base, width=16).eval()
    first, second = (model(input_ids=each, labels=each).logits for each in (ids, other))
    torch.testing.assert_close(first[:, :8], second[:, :8])
    assert not torch.allclose(first[:, 8:], second[:, 8:])
