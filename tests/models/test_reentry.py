"""Ladders that re-enter the backbone, with and without adapters on the layers above."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from ladder_kernels import LadderConfig, LadderForCausalLM, use_backend
from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.loading import backbone_from_transformers

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(gradient_checkpointing|is_gradient).*is deprecated:FutureWarning"
)
FAMILIES = ("llama", "qwen3", "smollm3")
CONFIGS = {
    "rungs": LadderConfig.lst(reduction=4, reentry=1),
    "both": LadderConfig.lst(reduction=4, reentry=2, adapter_rank=3),
    "free": LadderConfig.xladder(connected=1, free=1, reduction=4, reentry=2, block="mlp"),
    "adapters": LadderConfig.adapters(reentry=3, rank=4, adapter_scale=0.5),
}
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
PACKED = torch.tensor([[*range(5), *range(7)], [*range(12)]])


@pytest.fixture(scope="module")
def backbone_of(make: Callable[..., Any]) -> Callable[..., Backbone]:
    made: dict[Any, Backbone] = {}

    def get(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
        if (family, dtype) not in made:
            made[family, dtype] = backbone_from_transformers(make(family), dtype=dtype)
        return made[family, dtype]

    return get


def stirred(model: LadderForCausalLM) -> LadderForCausalLM:
    """Every parameter away from where it starts, so that each matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_exactly_at_the_base(backbone_of: Any, family: str, name: str) -> None:
    model = LadderForCausalLM.from_backbone(backbone_of(family), CONFIGS[name])
    with torch.no_grad():
        for options in ({"attention_mask": MASK}, {"position_ids": PACKED}):
            logits = model(IDS, **options).logits
            with model.disable_ladder():
                base = model(IDS, **options).logits
            if CONFIGS[name].adapter_rank:
                # The base's MLP is one operation, which rounds less; an adapter sees its halves.
                torch.testing.assert_close(logits, base, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(logits, base)


def plain_logits(model: LadderForCausalLM, ids: torch.Tensor, given: dict[str, Any]) -> Any:
    """The whole model in plain autograd: every frozen product dense, nothing of ours but taps."""
    backbone, ladder = model.backbone, model.ladder
    layout = model._layout(ids, given.get("attention_mask"), given.get("position_ids"), None)
    stop = ladder.stop
    frozen = backbone.frozen_pass(
        ids, layout=layout, tap_layers=ladder.tap_layers, tap_dtype=torch.float64, stop=stop
    )
    h = ladder(frozen.taps, frozen.hidden, layout)
    arch: Any = backbone.architecture
    mask, cos_sin = layout.mask(), backbone.rotary(layout.position_ids, torch.float64)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask = causal if mask is None else mask
    for index, block in enumerate(list(backbone.blocks)[stop:]):
        weights = {
            role: getattr(block, role).weight.dequantize(torch.float64) for role in arch.linears()
        }

        def linear(role: str, x: torch.Tensor, index: int = index, w: Any = weights) -> Any:
            y = F.linear(x, w[role], getattr(block, role).bias)  # noqa: B023
            if ladder.adapters:
                adapter = ladder.adapters[index][role]
                y = y + adapter.scale * (x @ adapter.a.T @ adapter.b.T)
            return y

        def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return x / (x.square().mean(-1, keepdim=True) + arch.eps).sqrt() * w

        x = norm(h, block.input_norm)
        q, k, v = (linear(role, x).unflatten(-1, (-1, arch.head_dim)) for role in "qkv")
        if arch.qk_norm:
            q, k = norm(q, block.q_norm), norm(k, block.k_norm)
        if block.rope:
            cos, sin = cos_sin

            def turn(t: torch.Tensor, cos: Any = cos, sin: Any = sin) -> torch.Tensor:
                a, b = t.chunk(2, -1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

            q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(arch.heads // arch.kv_heads, dim=2) for t in (k, v))
        seen = mask if block.window is None else layout.mask(block.window)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / arch.head_dim**0.5
        mixed = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        h = h + linear("o", torch.einsum("bhij,bjhd->bihd", mixed, v).flatten(2))
        x = norm(h, block.post_norm)
        h = h + linear("down", F.silu(linear("gate", x)) * linear("up", x))
    return backbone.logits(h)


@pytest.mark.parametrize("batch", ["plain", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_autograd(
    backbone_of: Any, family: str, name: str, batch: str
) -> None:
    base = backbone_of(family, torch.float64)
    model = LadderForCausalLM.from_backbone(base, CONFIGS[name], tap_dtype="float32")
    model.tap_dtype = torch.float64
    stirred(model.double().train())
    given = {"position_ids": PACKED} if batch == "packed" else {}
    labels = IDS.clone()
    labels[:, ::3] = -100
    loss = model(IDS, labels=labels, **given).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    logits = plain_logits(model, IDS, given)
    wanted_loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-6, atol=1e-9)
    wanted = torch.autograd.grad(wanted_loss, list(model.parameters()))
    assert all(grad.abs().max() > 0 for grad in wanted)
    for (key, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * scale, msg=key)


def test_all_layers_with_adapters_are_qlora(make: Callable[..., Any]) -> None:
    """The same base in transformers with PEFT's adapters gives the same loss and gradients."""
    source = make("llama")
    backbone = backbone_from_transformers(source)
    model = LadderForCausalLM.from_backbone(
        backbone, LadderConfig.adapters(reentry=3, rank=4, adapter_scale=2.0)
    ).train()
    stirred(model)
    dense = copy.deepcopy(source)
    for name, weight in backbone.named_weights():
        if not isinstance(weight, torch.Tensor):
            dense.get_parameter(name).data.copy_(weight.dequantize(torch.float32))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(dense, lora).train()
    pairs = []
    for index, block in enumerate(peft.base_model.model.model.layers):
        for role, (path, _, _) in backbone.architecture.linears().items():
            layer = block.get_submodule(path)
            adapter = model.ladder.adapters[index][role]
            for ours, theirs in ((adapter.a, layer.lora_A), (adapter.b, layer.lora_B)):
                theirs["default"].weight.data.copy_(ours.data)
                pairs.append((ours, theirs["default"].weight))
    ours = model(IDS, labels=IDS).loss
    theirs = peft(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.backward()
    theirs.backward()
    for one, other in pairs:
        assert one.grad is not None
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_layers_changes_no_bit(backbone_of: Any, name: str) -> None:
    model = stirred(LadderForCausalLM.from_backbone(backbone_of("llama"), CONFIGS[name]).train())
    saved: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    found = {}
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(IDS, labels=IDS, position_ids=PACKED).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found[recompute] = loss.detach(), grads, sum(saved)
    model.gradient_checkpointing_disable()
    assert torch.equal(found[False][0], found[True][0])
    for one, other in zip(found[False][1], found[True][1], strict=True):
        assert torch.equal(one, other)
    assert found[True][2] < found[False][2]


def test_layers_run_again_on_the_backend_of_the_forward_pass(backbone_of: Any) -> None:
    model = stirred(LadderForCausalLM.from_backbone(backbone_of("llama"), CONFIGS["both"]))
    found = []
    for recompute in (False, True):
        model.train().gradient_checkpointing = recompute
        with use_backend("reference"):
            loss = model(IDS, labels=IDS).loss
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_cache_is_written_to_once(backbone_of: Any) -> None:
    model = stirred(LadderForCausalLM.from_backbone(backbone_of("llama"), CONFIGS["both"]))
    found = []
    for recompute in (False, True):
        model.train().gradient_checkpointing = recompute
        out = model(IDS, use_cache=True)
        grads = torch.autograd.grad(out.logits.square().sum(), list(model.parameters()))
        assert out.past_key_values.get_seq_length() == IDS.shape[1]
        assert out.past_key_values.get_seq_length(model.backbone.num_layers - 1) == IDS.shape[1]
        found.append(grads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_generates_with_a_cache_what_it_does_without(backbone_of: Any, name: str) -> None:
    model = stirred(LadderForCausalLM.from_backbone(backbone_of("llama"), CONFIGS[name]))
    options: dict[str, Any] = {
        "attention_mask": MASK, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None
    }  # fmt: skip
    cached = model.generate(IDS, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    with model.disable_ladder():
        assert not torch.equal(cached, model.generate(IDS, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(backbone_of: Any, tmp_path: Path, name: str) -> None:
    backbone = backbone_of("llama")
    model = stirred(LadderForCausalLM.from_backbone(backbone, CONFIGS[name]))
    model.save_pretrained(tmp_path / "ladder")
    again = LadderForCausalLM.from_pretrained(tmp_path / "ladder", base=backbone)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_rounded_activations_stop_at_the_re_entry(make: Callable[..., Any]) -> None:
    """Layers above it are exact; below it they are rounded, which changes the result."""
    backbone = backbone_from_transformers(make("llama", intermediate_size=128))
    for reentry, equal in ((3, True), (1, False)):
        config = LadderConfig.adapters(reentry=reentry, rank=2)
        exact = LadderForCausalLM.from_backbone(backbone, config)
        rounded = LadderForCausalLM.from_backbone(backbone, config, activations="int8")
        with torch.no_grad():
            assert torch.equal(exact(IDS).logits, rounded(IDS).logits) == equal
        loss = rounded.train()(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in rounded.parameters())


@pytest.mark.parametrize(
    ("reentry", "layers"), [(0, 0), (2, 2), (2.0, 2), (0.5, 2), (0.01, 1), (0.99, 3), (3, 3)]
)
def test_a_share_of_the_layers(reentry: float, layers: int) -> None:
    config = LadderConfig.adapters(reentry) if reentry else LadderConfig()
    assert config.reentry_layers(3) == layers
    assert LadderConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reentry": 4}, r"ladder.reentry: found 4; the backbone has 3 layers"),
        ({"reentry": 3}, r"ladder.every: found 1; the backbone has 3 layers, 0 of them below"),
        ({"rungs": ((2,),), "reentry": 2}, r"ladder.rungs\[0\]: found 2; .* are 0 to 1"),
        ({"adapter_rank": 2}, r"ladder.adapter_rank: found 2; adapters sit after a re-entry"),
        ({"kind": "adapters", "reentry": 2}, r"ladder.adapter_rank: found 0; a ladder of kind"),
        ({"reentry": -1}, r"ladder.reentry: found -1; it must be a whole number, 0 or more, or a"),
        ({"reentry": 1.5}, r"ladder.reentry: found 1.5; it must be a whole number"),
        ({"reentry": float("nan")}, r"ladder.reentry: found nan; it must be a whole number"),
        ({"reentry": 1, "adapter_rank": 1, "adapter_scale": 0.0}, r"ladder.adapter_scale: found"),
    ],
)
def test_refusals(backbone_of: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LadderForCausalLM.from_backbone(backbone_of("llama"), LadderConfig(reduction=4, **options))


@pytest.mark.filterwarnings("ignore::ladder_kernels.models.hooked_backbone.SlowerBackboneWarning")
@pytest.mark.parametrize(("family", "reentry"), [("llama", 2), ("gemma", 0)])
def test_the_default_is_what_the_backbone_allows(
    make: Callable[..., Any], family: str, reentry: int
) -> None:
    backbone = backbone_from_transformers(make(family))
    model = LadderForCausalLM.from_backbone(backbone)
    assert backbone.reenters == bool(reentry)
    assert (model.ladder.reentry, len(model.ladder.adapters)) == (reentry, reentry)
    assert model.config.ladder["kind"] == "lst"
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    seeded = LadderForCausalLM.from_backbone(backbone, LadderConfig.recommended(seed=5))
    assert seeded.config.ladder_config.seed == 5


@pytest.mark.filterwarnings("ignore::ladder_kernels.models.hooked_backbone.SlowerBackboneWarning")
def test_needs_layers_of_our_own(make: Callable[..., Any]) -> None:
    backbone = backbone_from_transformers(make("gemma"))
    with pytest.raises(
        UnsupportedModelError, match=r"ladder.reentry: found 1, but 'gemma' runs on transformers"
    ):
        LadderForCausalLM.from_backbone(backbone, LadderConfig.lst(reduction=4, reentry=1))
    with pytest.raises(UnsupportedModelError, match="low-rank adapters on 'gemma'"):
        backbone.linear_shapes()
