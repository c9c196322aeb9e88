"""The frozen pass with activations rounded to 8 bits, an option of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import ConfigError
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.loading import backbone_from_transformers
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.linear import NF4Linear
from ladder_kernels.ops import nf4_linear, nf4_linear_int8

IDS = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
LST = LadderConfig.lst(reduction=4)

pytestmark = pytest.mark.filterwarnings(
    "ignore::ladder_kernels.models.hooked_backbone.SlowerBackboneWarning"
)


@pytest.fixture(scope="module")
def backbone(make: Callable[..., Any]) -> Backbone:
    return backbone_from_transformers(make("llama"), blocksize=32)


@pytest.fixture(scope="module")
def base(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    make("llama").save_pretrained(folder)
    return folder


def hidden(backbone: Backbone, activations: str) -> torch.Tensor:
    layout = SequenceLayout.build(*IDS.shape)
    return backbone.frozen_pass(IDS, layout=layout, activations=activations).hidden


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm().detach() / two.norm().detach())


def test_a_layer():
    layer = NF4Linear(quantize_nf4(torch.randn(48, 64)), torch.randn(48))
    x, residual = torch.randn(2, 3, 64), torch.randn(2, 3, 48)
    assert torch.equal(layer(x, residual), nf4_linear(x, layer.weight, layer.bias, residual))
    layer.activations = "int8"
    expected = nf4_linear_int8(x, layer.weight, layer.bias, residual)
    assert torch.equal(layer(x, residual), expected)
    with pytest.raises(ConfigError, match="x requires a gradient"):
        layer(x.requires_grad_())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3"])
def test_every_layer_of_a_block_takes_them(make: Callable[..., Any], family: str):
    backbone = backbone_from_transformers(make(family), blocksize=32, quantize_head=True)
    exact = hidden(backbone, "exact")
    rounded = hidden(backbone, "int8")
    assert 1e-4 < distance(rounded, exact) < 0.1
    taken = {
        name: module.activations
        for name, module in backbone.named_modules()
        if isinstance(module, NF4Linear)
    }
    assert taken.pop("nf4_head") == "exact"
    assert len(taken) >= 3 * 4
    assert set(taken.values()) == {"int8"}
    assert torch.equal(hidden(backbone, "exact"), exact)


def test_two_models_share_a_backbone(backbone: Backbone):
    """Each pass goes its own model's way."""
    exact = LadderForCausalLM.from_backbone(backbone, LST)
    rounded = LadderForCausalLM.from_backbone(backbone, LST, activations="int8")
    first = exact(IDS).logits
    second = rounded(IDS).logits
    assert 1e-4 < distance(second, first) < 0.1
    assert torch.equal(exact(IDS).logits, first)
    assert torch.equal(rounded(IDS).logits, second)
    with rounded.disable_ladder():  # the base of this model rounds too
        assert torch.equal(rounded(IDS).logits, second)


def test_the_ladder_trains_and_generates(backbone: Backbone):
    torch.manual_seed(0)
    model = LadderForCausalLM.from_backbone(backbone, LST, activations="int8")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        assert loss is not None
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    new = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert new.shape == (2, 14)


def test_it_is_saved(base: Path, tmp_path: Path):
    options: dict[str, Any] = {"ladder": LST, "blocksize": 32}
    model = LadderForCausalLM.from_pretrained(base, activations="int8", **options)
    model.save_pretrained(tmp_path / "ladder")
    assert json.loads((tmp_path / "ladder/config.json").read_text())["activations"] == "int8"
    again = LadderForCausalLM.from_pretrained(tmp_path / "ladder")
    assert again.config.activations == "int8"
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    exact = LadderForCausalLM.from_pretrained(tmp_path / "ladder", activations="exact")
    plain = LadderForCausalLM.from_pretrained(base, **options)
    assert (exact.config.activations, plain.config.activations) == ("exact", "exact")
    assert torch.equal(exact(IDS).logits, plain(IDS).logits)


def test_refusals(make: Callable[..., Any], base: Path):
    with pytest.raises(ConfigError, match="activations: found 'int4'; allowed are 'exact', 'int8'"):
        LadderForCausalLM.from_pretrained(base, activations="int4")
    uneven = backbone_from_transformers(make("llama"))  # rows of 64 and 96, blocks of 64
    with pytest.raises(
        ConfigError, match=r"found 'int8', but the rows of blocks.0.down \(96\) are"
    ):
        LadderForCausalLM.from_backbone(uneven, LST, activations="int8")
