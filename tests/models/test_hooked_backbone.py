"""Backbones through transformers' own layers: the results of transformers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.models import hooked_backbone
from ladder_kernels.models.hooked_backbone import HookedBackbone, SlowerBackboneWarning
from ladder_kernels.models.loading import SUPPORTED_HOOKED, backbone_from_transformers
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.attention import SequenceLayout

LIMIT = 1e-5
families = pytest.mark.parametrize("family", SUPPORTED_HOOKED)
pytestmark = pytest.mark.filterwarnings(
    "ignore::ladder_kernels.models.hooked_backbone.SlowerBackboneWarning"
)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length))


@families
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_logits(family: str, side: str, pair: Any, logits: Any, error: Any):
    backbone, model = pair(family)
    assert isinstance(backbone, HookedBackbone)
    assert backbone.runs_on == "transformers"
    tokens, mask = ids(3, 19), torch.ones(3, 19, dtype=torch.long)
    if side != "none":
        for row, pads in enumerate((0, 4, 11)):
            mask[row, slice(19 - pads, None) if side == "right" else slice(pads)] = 0
    with torch.no_grad():
        wanted = model(
            tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
    ours = logits(backbone, tokens, attention_mask=None if side == "none" else mask)
    assert error(ours, wanted, mask) < LIMIT


@families
def test_packed_documents(family: str, pair: Any, logits: Any, error: Any):
    """Each document's logits are those that it has alone, with padding after it too."""
    backbone, _ = pair(family)
    tokens = ids(2, 19)
    lengths = ((3, 1, 8, 7), (6, 9))
    starts = torch.zeros(2, 19, dtype=torch.long)
    mask = torch.zeros(2, 19, dtype=torch.long)
    for row, pieces in enumerate(lengths):
        packed = torch.cat([torch.arange(n) for n in pieces])
        starts[row, : len(packed)] = packed
        mask[row, : len(packed)] = 1
    ours = logits(backbone, tokens, attention_mask=mask, position_ids=starts)
    for row, pieces in enumerate(lengths):
        start = 0
        for n in pieces:
            piece = slice(start, start + n)
            alone = logits(backbone, tokens[row : row + 1, piece])
            assert error(ours[row : row + 1, piece], alone) < LIMIT
            start += n


@families
def test_cache(family: str, pair: Any, logits: Any, error: Any):
    backbone, _ = pair(family)
    tokens, mask = ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    whole = logits(backbone, tokens, attention_mask=mask)
    cache, parts = DynamicCache(), []
    for start, stop in ((0, 7), (7, 11), (11, 12), (12, 13), (13, 14)):
        parts.append(
            logits(backbone, tokens[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
        )
    assert error(torch.cat(parts, dim=1), whole, mask) < LIMIT


@families
def test_taps(family: str, pair: Any, error: Any):
    backbone, model = pair(family)
    tokens, layout = ids(2, 9), SequenceLayout.build(2, 9)
    done = backbone.frozen_pass(tokens, layout=layout, tap_layers=range(4))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(3):
        assert error(done.taps[layer], states[layer]) < LIMIT
    assert torch.equal(done.taps[3], done.hidden)
    assert error(backbone.final_norm(done.hidden), states[3]) < LIMIT
    assert not done.taps[1].is_inference()
    embeds = done.taps[0] if family not in ("gpt2", "opt") else None
    if embeds is not None:
        again = backbone.frozen_pass(
            inputs_embeds=model.get_input_embeddings()(tokens), layout=layout
        )
        assert error(again.hidden, done.hidden) < LIMIT


@families
def test_facts(family: str, pair: Any):
    backbone, model = pair(family)
    assert backbone.num_layers == 3
    assert backbone.hidden_size == 64
    assert backbone.vocab_size == 128
    assert backbone.max_context == 64
    assert backbone.num_parameters() == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in backbone.parameters())
    linears = [w for _, w in backbone.named_weights() if isinstance(w, NF4Weight)]
    assert len(linears) >= 3 * 4
    width = backbone.intermediate_size
    assert any(width in weight.shape or 2 * width in weight.shape for weight in linears)
    y = torch.randn(2, 64, requires_grad=True)
    backbone.logits(y).sum().backward()
    assert y.grad is not None
    with pytest.raises(UnsupportedModelError, match=family):
        backbone.block_weights(0)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi"])
def test_quantised_head(family: str, make: Any, give_weights: Any, logits: Any, error: Any):
    model = make(family)
    backbone = backbone_from_transformers(model, quantize_head=True)
    assert isinstance(backbone.head, NF4Weight)
    give_weights(backbone, model)
    tokens = ids(2, 9)
    with torch.no_grad():
        assert error(logits(backbone, tokens), model(tokens).logits) < LIMIT


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "opt"])
def test_casts_and_moves(family: str, make: Any):
    backbone = backbone_from_transformers(make(family))
    buffers = {name: buffer.clone() for name, buffer in backbone.decoder.named_buffers()}
    before = {
        name: weight.packed.clone()
        for name, weight in backbone.named_weights()
        if isinstance(weight, NF4Weight)
    }
    backbone.to(torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    for name, buffer in backbone.decoder.named_buffers():
        if not name.endswith("bias"):
            assert torch.equal(buffer, buffers[name])
    for name, weight in backbone.named_weights():
        if isinstance(weight, NF4Weight):
            assert torch.equal(weight.packed, before[name])
        else:
            assert weight.dtype == torch.bfloat16
    done = backbone.frozen_pass(ids(1, 5), layout=SequenceLayout.build(1, 5))
    assert done.hidden.dtype == torch.bfloat16
    assert backbone.to("meta").device.type == "meta"


def test_said_aloud_once(make: Any):
    hooked_backbone._say_slower.cache_clear()
    model = make("olmo")
    with pytest.warns(SlowerBackboneWarning, match="'olmo' runs through transformers"):
        backbone_from_transformers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerBackboneWarning)
        backbone_from_transformers(model)


def test_packed_documents_with_a_cache_are_refused(pair: Any):
    backbone, _ = pair("olmo")
    layout = SequenceLayout.build(1, 6, position_ids=torch.tensor([0, 1, 2, 0, 1, 2]))
    with pytest.raises(ConfigError, match="packed documents"):
        backbone.frozen_pass(ids(1, 6), layout=layout, cache=DynamicCache())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_more_tokens_than_learned_positions(family: str, pair: Any):
    backbone, _ = pair(family)
    backbone.frozen_pass(ids(1, 64), layout=SequenceLayout.build(1, 64))
    with pytest.raises(
        ConfigError, match=f"position 64; '{family}' has learned positions, 0 to 63"
    ):
        backbone.frozen_pass(ids(1, 65), layout=SequenceLayout.build(1, 65))


def test_opt_without_a_final_norm(make: Any):
    with pytest.raises(UnsupportedModelError, match=r"no 'decoder\.final_layer_norm'"):
        backbone_from_transformers(make("opt", do_layer_norm_before=False))


def test_opt_with_narrow_embeddings(make: Any):
    with pytest.raises(UnsupportedModelError, match="embeddings of width 32"):
        backbone_from_transformers(make("opt", word_embed_proj_dim=32))
