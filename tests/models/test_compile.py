"""The side pass under ``torch.compile``: one graph, the same numbers, no second compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.memory.tracing import fake_cuda
from ladder_kernels.models.ladder import Ladder
from ladder_kernels.models.loading import backbone_from_config, backbone_from_transformers
from ladder_kernels.nn.attention import SequenceLayout

LADDERS = {
    "transformer": LadderConfig(rungs=((1, 2), ()), reduction=4),
    "mlp": LadderConfig.lst(
        every=1, reduction=4, block="mlp", merge="channel", output="interpolate"
    ),
}
LAYERS, WIDTH = 2, 64


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def made(name: str) -> Ladder:
    """A ladder whose every parameter matters."""
    ladder = Ladder(LADDERS[name], num_layers=LAYERS, hidden_size=WIDTH, intermediate_size=96)
    with torch.no_grad():
        for parameter in ladder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return ladder


def climb(ladder: Any, length: int, seed: int) -> list[torch.Tensor]:
    """The output of a side pass on given taps, and the gradients of the ladder's parameters."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, length, WIDTH)
    taps = {t: torch.randn(shape, generator=generator).bfloat16() for t in ladder.tap_layers}
    hidden = torch.randn(shape, generator=generator)
    layout = SequenceLayout.build(2, length)
    out = ladder(taps, hidden, layout)
    grads = torch.autograd.grad(out.square().sum(), list(ladder.parameters()))
    return [out.detach(), *grads]


def compiled(ladder: Ladder, backend: str, **options: Any) -> Ladder:
    ladder.compile(fullgraph=True, backend=backend, **options)
    return ladder


@pytest.mark.parametrize("name", LADDERS)
def test_one_graph_as_eager(name):
    ladder = made(name)
    expected = [climb(ladder, 8, seed) for seed in (0, 1)]
    compiled(ladder, "aot_eager")
    for seed in (0, 1):
        torch.testing.assert_close(climb(ladder, 8, seed), expected[seed])
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_any_length_is_one_graph():
    ladder = made("transformer")
    expected = [climb(ladder, length, length) for length in (8, 12, 9)]
    compiled(ladder, "eager", dynamic=True)
    for length, value in zip((8, 12, 9), expected, strict=True):
        torch.testing.assert_close(climb(ladder, length, length), value)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_inductor():
    ladder = made("transformer")
    expected = climb(ladder, 8, 0)
    torch.testing.assert_close(climb(compiled(ladder, "inductor"), 8, 0), expected)


@pytest.mark.parametrize("positions", [None, torch.arange(10) % 6])
def test_within_a_training_step(make, positions):
    """As users compile it, packed or not; another number of labels is at most one more graph."""
    backbone = backbone_from_transformers(make("llama", num_hidden_layers=LAYERS))
    model = LadderForCausalLM.from_backbone(backbone, LADDERS["transformer"]).train()
    ids = torch.randint(3, 128, (2, 10))
    names = set(model.state_dict())

    def step(labelled: int) -> list[torch.Tensor]:
        labels = torch.where(torch.arange(10) < labelled, ids, -100)
        loss: Any = model(ids, position_ids=positions, labels=labels).loss
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = [step(labelled) for labelled in (10, 10, 4, 7)]
    model.ladder.compile(fullgraph=True, backend="aot_eager")
    for labelled, value in zip((10, 10, 4, 7), expected, strict=True):
        torch.testing.assert_close(step(labelled), value)
    assert counters["stats"]["unique_graphs"] <= 2
    assert set(model.state_dict()) == names


def test_a_compiler_decides_by_itself_what_to_keep(make):
    """Gradient checkpointing breaks no graph of the side pass, and changes nothing in it."""
    backbone = backbone_from_transformers(make("llama", num_hidden_layers=LAYERS))
    model = LadderForCausalLM.from_backbone(backbone, LADDERS["transformer"]).train()
    ids = torch.randint(3, 128, (2, 10))

    def step() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())))

    model.gradient_checkpointing = True
    expected = step()
    model.ladder.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(step(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 1


def test_on_a_gpu_that_is_not_there(make):
    with fake_cuda() as device:
        backbone = backbone_from_config(
            make("qwen2", use_sliding_window=False).config, device=device
        )
        model = LadderForCausalLM.from_backbone(backbone, LADDERS["transformer"]).train()
        model.ladder.compile(fullgraph=True, backend="eager")
        ids = torch.zeros(1, 9, dtype=torch.int64, device=device)
        loss: Any = model(ids, labels=ids).loss
        loss.backward()
    assert {p.grad.device for p in model.parameters() if p.grad is not None} == {device}
    assert counters["stats"]["unique_graphs"] == 1
