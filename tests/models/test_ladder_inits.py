"""Where ladders start: seeds, random inits, and blocks cut out of the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.inits import INITS
from ladder_kernels.models.ladder import Ladder
from ladder_kernels.models.pruning import source_blocks

RUNGS = {"rungs": ((1,), (2, 3), ()), "reduction": 4}


@pytest.fixture(scope="module")
def backbone(pair: Callable[[str], Any]) -> Backbone:
    return pair("llama")[0]


def matrices(ladder: Ladder) -> list[torch.Tensor]:
    weights = [w for block in ladder.blocks() for w in block.weights().values() if w.dim() == 2]
    return [*weights, *ladder.projections()]


@pytest.mark.parametrize("init", INITS)
def test_the_seed_alone_decides(init: str, backbone: Backbone):
    config = LadderConfig(**RUNGS, init=init, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = Ladder.for_backbone(config, backbone)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = Ladder.for_backbone(config, backbone)
    other = Ladder.for_backbone(LadderConfig(**RUNGS, init=init, seed=4), backbone)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name
        assert torch.isfinite(weight).all(), name
    same = all(torch.equal(a, b) for a, b in zip(matrices(one), matrices(other), strict=True))
    assert same == (init == "pruned")


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("output", ["residual", "interpolate", "side"])
def test_gates_norms_and_outputs_start_as_documented(init: str, output: str, backbone: Backbone):
    config = LadderConfig(**RUNGS, init=init, output=output, merge="channel")
    ladder = Ladder.for_backbone(config, backbone)
    assert (ladder.output.up == 0).all() == (output == "residual")
    if output == "interpolate":
        assert (ladder.output.get_parameter("keep") == 1).all()
    for rung in ladder.steps():
        if rung.merge is not None:
            assert (rung.merge.get_parameter("alpha") == 0).all()
            gate = rung.merge.gate()
            assert gate is not None
            assert (gate == 0.5).all()
        if init != "pruned":
            for weight in rung.block.weights().values():
                assert weight.dim() == 2 or bool((weight == 1).all())


def test_random_inits_have_their_spread(backbone: Backbone):
    def weights(init: str) -> tuple[torch.Tensor, torch.Tensor]:
        ladder = Ladder.for_backbone(LadderConfig.lst(reduction=2, init=init), backbone)
        return torch.cat([w.flatten() for w in ladder.projections()]), ladder.entry.down

    assert weights("xavier")[0].std().item() == pytest.approx(math.sqrt(2 / 96), rel=0.05)
    assert weights("xavier")[0].abs().max().item() <= math.sqrt(6 / 96)
    assert weights("he")[0].std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    down = weights("orthogonal")[1]
    torch.testing.assert_close(down @ down.T, torch.eye(32), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rungs", "layers", "blocks"),
    [
        (((1,), (2,), (3,)), 3, [0, 1, 2]),
        (((7,), (8,), (), ()), 8, [6, 7, 6, 7]),
        (((0,), (1, 3), ()), 3, [0, 2, 2]),
        (((1,), (), (), ()), 2, [0, 0, 0, 1]),
    ],
)
def test_blocks_that_rungs_are_cut_from(
    rungs: tuple[tuple[int, ...], ...], layers: int, blocks: list[int]
):
    assert source_blocks(rungs, layers) == blocks


def test_pruned_at_full_width_is_the_backbone(pair: Callable[[str], Any]):
    """With nothing to leave out, each side block is the backbone's, and so is its function."""
    backbone, reference = pair("qwen2")
    config = LadderConfig.lst(reduction=1, init="pruned", head_dim=16)
    ladder = Ladder.for_backbone(config, backbone)
    for down in ladder.projections():
        assert torch.equal(down, torch.eye(64))
    for layer, block in enumerate(ladder.blocks()):
        theirs = reference.model.layers[layer]
        ours = block.weights()
        assert torch.equal(ours["q"], theirs.self_attn.q_proj.weight)
        assert torch.equal(ours["o"], theirs.self_attn.o_proj.weight)
        for role in ("k", "v"):
            shared = getattr(theirs.self_attn, f"{role}_proj").weight
            heads = shared.view(2, 16, 64).repeat_interleave(2, dim=0)
            assert torch.equal(ours[role], heads.reshape(64, 64))
        for role in ("gate", "up", "down"):
            assert torch.equal(ours[role], getattr(theirs.mlp, f"{role}_proj").weight)
        assert torch.equal(ours["input_norm"], theirs.input_layernorm.weight)
        assert torch.equal(ours["post_norm"], theirs.post_attention_layernorm.weight)


def test_pruned_keeps_the_strongest_channels(make: Callable[..., Any]):
    from ladder_kernels.models.loading import backbone_from_transformers

    model = make("llama")
    strong = torch.arange(0, 64, 4)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:, strong] *= 10
            layer.mlp.down_proj.weight[strong] *= 10
    backbone = backbone_from_transformers(model)
    ladder = Ladder.for_backbone(LadderConfig.lst(reduction=4, init="pruned"), backbone)
    selection = torch.zeros(16, 64)
    selection[torch.arange(16), strong] = 1
    for down in ladder.projections():
        assert torch.equal(down, selection)
    weights = backbone.block_weights(0)
    norm = ladder.blocks()[0].weights()["input_norm"]
    assert torch.equal(norm, weights["input_norm"][strong])
    rows = weights["gate"][:, strong] * 2
    for row in ladder.blocks()[0].weights()["gate"]:
        assert (row == rows).all(1).any()


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
@pytest.mark.parametrize("options", [{}, {"head_dim": 4}, {"block": "mlp"}, {"reduction": 2}])
def test_pruned_blocks_keep_the_size_of_the_stream(
    family: str, options: dict[str, Any], pair: Callable[[str], Any]
):
    config = LadderConfig(**{**RUNGS, **options}, init="pruned", output="side")
    model = LadderForCausalLM.from_backbone(pair(family)[0], config)
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert math.isfinite(loss.item())
    side = model.ladder.blocks()[0].weights()
    full = model.backbone.block_weights(0)
    for role in ("gate", "up", "down"):
        ratio = side[role].norm(dim=1).mean() / full[role].norm(dim=1).mean()
        assert 0.5 < ratio.item() < 2.0, role


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 128}, "width: found 128; init 'pruned' needs at most the backbone's 64"),
        ({"width": 48, "mlp_ratio": 4.0}, "mlp_ratio: found an MLP 192 wide.*at most.*96"),
        ({"width": 64, "head_dim": 32}, "head_dim: found 32.*at most the backbone's 16"),
    ],
)
def test_pruned_cannot_enlarge(options: dict[str, Any], message: str, backbone: Backbone):
    with pytest.raises(ConfigError, match=message):
        Ladder.for_backbone(LadderConfig.lst(init="pruned", **options), backbone)


def test_pruned_needs_a_backbone_of_the_llama_family(pair: Callable[[str], Any]):
    with pytest.raises(UnsupportedModelError):
        Ladder.for_backbone(LadderConfig.lst(reduction=4, init="pruned"), pair("gpt2")[0])
    with pytest.raises(ConfigError, match="without a backbone"):
        Ladder(
            LadderConfig.lst(reduction=4, init="pruned"),
            num_layers=2,
            hidden_size=64,
            intermediate_size=128,
        )
