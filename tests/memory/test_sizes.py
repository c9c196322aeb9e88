"""What is computed from configurations is what models and ladders have."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from ladder_kernels import LadderConfig
from ladder_kernels.errors import UnsupportedModelError
from ladder_kernels.memory.sizes import LadderSizes, ModelSizes
from ladder_kernels.models.ladder import Ladder
from ladder_kernels.models.loading import backbone_from_config
from ladder_kernels.models.shapes import KNOWN, config_of

LADDERS = {
    "lst": LadderConfig.lst(every=2, reduction=8),
    "xladder": LadderConfig.xladder(connected=2, free=2, reduction=8, merge="channel"),
    "recommended": LadderConfig.recommended(),
    "several taps": LadderConfig(
        rungs=((0, 3), (), (5,)), reduction=4, merge="gate", output="interpolate", block="mlp"
    ),
    "adapters": LadderConfig.adapters(3, rank=5, reduction=8),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize_head": True},
        {"double_quant": False, "blocksize": 128},
    ],
)
@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen2.5-7B", "Qwen3-0.6B", "Llama-3.1-8B"])
def test_models(name, options):
    config = config_of(name)
    sizes = ModelSizes(config, **options)
    backbone = backbone_from_config(config, device="meta", **options)
    held = sum(buffer.nbytes for buffer in backbone.buffers())
    assert sizes.blocks() + sizes.embeddings() + sizes.head() + sizes.others() == held
    if not (sizes.tied and sizes.head_is_nf4):  # which is counted beside the embeddings there
        assert sizes.parameters() == backbone.num_parameters()


@pytest.mark.parametrize("ladder", LADDERS)
def test_ladders(ladder):
    values = {**KNOWN["Qwen2.5-0.5B"], "num_hidden_layers": 6, "hidden_size": 112}
    config = AutoConfig.for_model(**{**values, "intermediate_size": 300, "vocab_size": 64})
    backbone = backbone_from_config(config, device="meta")
    settled = LADDERS[ladder].settled(6)
    real = Ladder.for_backbone(settled, backbone)
    sizes = LadderSizes(LADDERS[ladder], ModelSizes(config))
    assert sizes.parameters() == sum(parameter.numel() for parameter in real.parameters())
    assert sorted(sizes.tensors()) == sorted(parameter.numel() for parameter in real.parameters())
    assert sizes.tap_layers == real.tap_layers
    assert (sizes.stop, sizes.reentry) == (real.stop, real.reentry)


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="'gpt2' does not run on layers of ladder_kern"):
        ModelSizes(AutoConfig.for_model("gpt2"))
