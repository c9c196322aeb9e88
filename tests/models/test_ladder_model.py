"""Backbone and ladder as one model: where training starts, losses, and what is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.frozen_pass import Work
from ladder_kernels.models.loading import backbone_from_transformers

IDS = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(2, 10, dtype=torch.long)
LEFT[1, :3] = 0
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]])

LST = LadderConfig.lst(reduction=4)
XLADDER = LadderConfig.xladder(connected=2, free=2, reduction=4)


@pytest.fixture(scope="module")
def backbone(pair: Callable[[str], Any]) -> Backbone:
    return pair("llama")[0]


def shake(model: LadderForCausalLM, size: float = 0.1) -> LadderForCausalLM:
    """Move every trained parameter away from where it starts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((size * noise).to(parameter.dtype))
    return model


@pytest.mark.parametrize("merge", ["sum", "gate", "channel"])
@pytest.mark.parametrize(
    "rungs",
    [
        {"kind": "lst"},
        {"kind": "lst", "every": 2},
        {"kind": "xladder", "connected": 2, "free": 2},
        {"rungs": ((1, 3), (), (0, 2))},
    ],
    ids=["lst", "lst2", "xladder", "several"],
)
@pytest.mark.parametrize("block", ["transformer", "mlp"])
def test_training_starts_exactly_at_the_base(
    merge: str, rungs: dict[str, Any], block: str, backbone: Backbone, logits: Callable[..., Any]
):
    config = LadderConfig(**rungs, merge=merge, block=block, reduction=4)
    model = LadderForCausalLM.from_backbone(backbone, config)
    for batch in ({}, {"attention_mask": LEFT}, {"position_ids": PACKED}):
        with torch.no_grad():
            ours = model(IDS, use_cache=False, **batch).logits
        assert torch.equal(ours, logits(backbone, IDS, **batch))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2", "smollm3"])
@pytest.mark.parametrize("output", ["residual", "interpolate"])
@pytest.mark.parametrize("config", [LST, XLADDER], ids=["lst", "xladder"])
def test_other_families_start_exactly_at_the_base(
    family: str,
    output: str,
    config: LadderConfig,
    pair: Callable[[str], Any],
    logits: Callable[..., Any],
):
    base = pair(family)[0]
    config = LadderConfig.from_dict({**config.to_dict(), "output": output})
    model = LadderForCausalLM.from_backbone(base, config)
    with torch.no_grad():
        ours = model(IDS, attention_mask=LEFT, use_cache=False).logits
    assert torch.equal(ours, logits(base, IDS, attention_mask=LEFT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_starts_exactly_at_the_base(
    dtype: torch.dtype, autocast: bool, make: Callable[..., Any], logits: Callable[..., Any]
):
    base = backbone_from_transformers(make("llama"), dtype=dtype)
    model = LadderForCausalLM.from_backbone(base, XLADDER)
    assert (model.dtype, model.ladder.dtype) == (dtype, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = model(IDS, use_cache=False).logits
    assert ours.dtype == dtype
    assert torch.equal(ours, logits(base, IDS))


def test_output_side_does_not_start_at_the_base(backbone: Backbone, logits: Callable[..., Any]):
    config = LadderConfig.lst(reduction=4, output="side")
    model = LadderForCausalLM.from_backbone(backbone, config)
    ours = model(IDS).logits
    assert torch.isfinite(ours).all()
    assert not torch.allclose(ours, logits(backbone, IDS), atol=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
def test_loss_is_the_cross_entropy_of_the_logits(family: str, pair: Callable[[str], Any]):
    model = shake(LadderForCausalLM.from_backbone(pair(family)[0], XLADDER))
    labels = IDS.masked_fill(LEFT == 0, -100)
    labels[0, 4:6] = -100
    out = model(IDS, attention_mask=LEFT, labels=labels)
    assert out.logits is None
    assert out.past_key_values is None
    asked = model(IDS, attention_mask=LEFT, labels=labels, return_logits=True)
    flat, targets = asked.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    expected = F.cross_entropy(flat, targets)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(asked.loss, out.loss, rtol=1e-6, atol=1e-6)

    total = F.cross_entropy(flat, targets, reduction="sum")
    for count in (40, torch.tensor(40)):
        loss = model(IDS, attention_mask=LEFT, labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(loss, total / 40, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(0)])
@pytest.mark.parametrize("length", [1, 10])
def test_a_batch_without_labels_to_learn_has_loss_zero(items: Any, length: int, backbone: Backbone):
    if isinstance(items, torch.Tensor):
        items = items.clamp(min=1)
    model = shake(LadderForCausalLM.from_backbone(backbone, LST)).train()
    ids = IDS[:, :length]
    labels = torch.full_like(ids, -100) if length > 1 else ids
    loss = model(ids, labels=labels, num_items_in_batch=items).loss
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_logits_with_labels_can_be_the_default(backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    model.config.return_logits = True
    out = model(IDS, labels=IDS)
    assert out.logits.shape == (2, 10, 128)
    assert model(IDS, labels=IDS, return_logits=False).logits is None


def test_logits_to_keep(backbone: Backbone):
    model = shake(LadderForCausalLM.from_backbone(backbone, LST))
    everything = model(IDS).logits
    for keep, index in ((3, slice(-3, None)), (torch.tensor([0, 4]), torch.tensor([0, 4]))):
        some = model(IDS, logits_to_keep=keep).logits
        torch.testing.assert_close(some, everything[:, index])
        some = model(IDS, logits_to_keep=keep, labels=IDS, return_logits=True).logits
        torch.testing.assert_close(some, everything[:, index])


def test_embeddings_instead_of_ids(backbone: Backbone):
    model = shake(LadderForCausalLM.from_backbone(backbone, LST))
    embeddings = model.get_input_embeddings()(IDS)
    by_embeddings = model(inputs_embeds=embeddings, attention_mask=LEFT).logits
    torch.testing.assert_close(by_embeddings, model(IDS, attention_mask=LEFT).logits)


def test_a_tuple_on_request(backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    loss, logits = model(IDS, labels=IDS, return_logits=True, return_dict=False)
    assert loss.shape == ()
    assert logits.shape == (2, 10, 128)


def test_one_frozen_pass_a_forward(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    layers: list[int] = []
    run = type(backbone)._run

    def counted(self: Any, works: Sequence[Work], stop: int) -> None:
        def noted(work: Work) -> Work:
            def emit(layer: int, state: torch.Tensor) -> None:
                layers.append(layer)
                work.emit(layer, state)

            return replace(work, emit=emit)

        run(self, [noted(work) for work in works], stop)

    monkeypatch.setattr(type(backbone), "_run", counted)
    model(IDS, labels=IDS, return_logits=True).loss.backward()
    assert layers == [0, 1, 2, 3]


def test_only_the_ladder_is_trained(make: Callable[..., Any]):
    base = backbone_from_transformers(make("llama"))
    before = [tensor.clone() for tensor in base.buffers()]
    model = LadderForCausalLM.from_backbone(base, LST)
    assert all(name.startswith("ladder.") for name, _ in model.named_parameters())
    assert all(name.startswith("ladder.") for name in model.state_dict())
    assert not list(model.buffers())
    assert all(module is not base for module in model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for old, new in zip(before, base.buffers(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None


def test_moves_and_casts_take_the_backbone_along(make: Callable[..., Any]):
    base = backbone_from_transformers(make("llama"))
    packed = [weight.packed.clone() for weight in base._quantized()]
    model = shake(LadderForCausalLM.from_backbone(base, LST))
    loss = model(IDS, labels=IDS).loss
    model.to(torch.bfloat16)
    assert (model.dtype, base.dtype, model.ladder.dtype) == (torch.bfloat16,) * 3
    torch.testing.assert_close(model(IDS, labels=IDS).loss, loss, rtol=0.05, atol=0)
    model.double()
    assert (base.dtype, model.ladder.dtype) == (torch.float64,) * 2
    assert torch.isfinite(model(IDS, labels=IDS).loss)
    for old, weight in zip(packed, base._quantized(), strict=True):
        assert torch.equal(old, weight.packed)
    model.to("meta")
    assert model.device.type == base.device.type == model.ladder.entry.down.device.type == "meta"


def test_autocast_trains_float32_parameters(backbone: Backbone):
    model = shake(LadderForCausalLM.from_backbone(backbone, XLADDER))
    exact = model(IDS, labels=IDS).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


def test_parameter_counts(backbone: Backbone, capsys: pytest.CaptureFixture[str]):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    trained = sum(parameter.numel() for parameter in model.ladder.parameters())
    base = sum(
        weight.numel() if isinstance(weight, torch.Tensor) else weight.numel
        for _, weight in backbone.named_weights()
    )
    assert model.num_parameters(only_trainable=True) == trained
    assert model.num_parameters() == trained + base
    assert model.num_parameters(exclude_embeddings=True) == trained + base - 128 * 64
    assert model.get_memory_footprint() > model.get_memory_footprint(return_buffers=False)
    assert model.get_memory_footprint(return_buffers=False) == 4 * trained
    model.print_trainable_parameters()
    line = capsys.readouterr().out
    assert line == (
        f"trainable params: {trained:,} || all params: {trained + base:,} || "
        f"trainable%: {100 * trained / (trained + base):.4f}\n"
    )


def test_a_copy_is_independent(backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    other = shake(copy.deepcopy(model))
    assert other.backbone is not backbone
    assert not torch.equal(other(IDS).logits, model(IDS).logits)


def test_modes(backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    assert not model.training
    assert model.train().ladder.training
    assert model(IDS).past_key_values is None
    assert model.eval()(IDS).past_key_values is not None


def test_default_ladder(backbone: Backbone):
    wanted = LadderConfig.recommended().settled(backbone.num_layers, reenters=backbone.reenters)
    assert LadderForCausalLM.from_backbone(backbone).config.ladder_config == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "streamed"}, "weights: found 'streamed', but the given backbone was loaded"),
        ({"taps": "tape"}, "taps: found 'tape'; allowed are 'device', 'host', 'disk'"),
        ({"taps": "disk"}, "tap_cache: found nothing; taps 'disk' need a folder"),
        ({"tap_cache": "here"}, "tap_cache: found here, but taps are 'device'"),
        ({"tap_dtype": "int4"}, "tap_dtype: found 'int4'; allowed are 'bfloat16'"),
        ({"ladder": LadderConfig.lst(reduction=7)}, "reduction: found 7.*width 64.*4 and 8"),
        ({"ladder": LadderConfig.lst(every=9)}, "every: found 9; the backbone has 3 layers"),
    ],
)
def test_refused_models(options: dict[str, Any], message: str, backbone: Backbone):
    with pytest.raises(ConfigError, match=message):
        LadderForCausalLM.from_backbone(backbone, **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 10, 64)}, "exactly one"),
        ({"input_ids": IDS, "labels": IDS[:, :4]}, r"labels: found shape \[2, 4\].*\[2, 10\]"),
        ({"input_ids": IDS, "attention_mask": LEFT[:, 1:]}, r"attention_mask has shape \[2, 9\]"),
        ({"input_ids": IDS, "output_attentions": True}, "output_attentions: found True"),
        ({"input_ids": IDS, "output_hidden_states": True}, "output_hidden_states: found True"),
    ],
)
def test_refused_inputs(inputs: dict[str, Any], message: str, backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    with pytest.raises(ConfigError, match=message):
        model(**inputs)


def test_refused_caches(backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    with pytest.raises(ConfigError, match="found a StaticCache, which has a fixed size"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    with pytest.raises(ConfigError, match="a cache of 3 layers; backbone and ladder need 6"):
        model(IDS, past_key_values=DynamicCache(config=backbone.config))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_and_caches(family: str, pair: Callable[[str], Any]):
    """A cache does not keep documents apart: none is made, and one that is asked for is refused."""
    model = LadderForCausalLM.from_backbone(pair(family)[0], LST)
    assert model(IDS, position_ids=PACKED).past_key_values is None
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ConfigError, match=r"found packed documents together with a cache"):
            model(IDS, position_ids=PACKED, **options)
    one = torch.arange(10)[None]
    assert model(IDS, position_ids=one).past_key_values is not None


def test_the_vocabulary_is_frozen(backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, LST)
    with pytest.raises(UnsupportedModelError, match="vocabulary"):
        model.resize_token_embeddings(200)
    with pytest.raises(UnsupportedModelError, match="embeddings"):
        model.set_input_embeddings(torch.nn.Embedding(200, 64))


def test_ladder_refuses_missing_taps(backbone: Backbone):
    from ladder_kernels.nn.attention import SequenceLayout

    model = LadderForCausalLM.from_backbone(backbone, LST)
    state = torch.zeros(1, 4, 64)
    with pytest.raises(ConfigError, match=r"found layers \[0, 2\]; the ladder also reads 1, 3"):
        model.ladder({0: state, 2: state}, state, SequenceLayout.build(1, 4))
