from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ladder_kernels as lk
from ladder_kernels.errors import UnsupportedModelError


def _quantise(model: torch.nn.Module, *, quant_type: str = "nf4", quantised: bool = True) -> None:
    """Replace each linear layer of the blocks by a bitsandbytes one, as transformers does."""
    for name, layer in list(model.model.named_modules()):
        if not isinstance(layer, torch.nn.Linear):
            continue
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.float32,
            quant_type=quant_type,
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type=quant_type, module=new
        )
        if layer.bias is not None:
            new.bias = torch.nn.Parameter(torch.randn_like(layer.bias))
        parent, _, leaf = name.rpartition(".")
        setattr(model.model.get_submodule(parent), leaf, new.to("cpu") if quantised else new)


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    _quantise(model)
    # In evaluation bitsandbytes repacks weights on some processors, and rounds their scales.
    return model.train()


INPUT_IDS = torch.arange(40).reshape(2, 20) % 97


def test_logits_and_saved_state_stay(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        expected = model(INPUT_IDS).logits
        state = {k: v.clone() for k, v in model.state_dict().items()}
        assert lk.accelerate_4bit(model) is model
        actual = model(INPUT_IDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert type(layer).__name__ == "AcceleratedLinear4bit"
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[k], after[k]) for k in state)


def test_twice_is_harmless(model: LlamaForCausalLM) -> None:
    lk.accelerate_4bit(lk.accelerate_4bit(model))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "AcceleratedLinear4bit"


def test_qlora_gradients_equal_bitsandbytes(model: LlamaForCausalLM) -> None:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)

    def gradients() -> dict[str, torch.Tensor]:
        adapted.zero_grad()
        adapted(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        return {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}

    expected = gradients()
    lk.accelerate_4bit(adapted)
    actual = gradients()
    assert expected.keys() == actual.keys()
    assert len(expected) == 2 * 7 * 2
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential holds no bitsandbytes Linear4bit"):
        lk.accelerate_4bit(torch.nn.Sequential(torch.nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type 'fp4'; only 'nf4'"),
        ({"quantised": False}, "is not quantised yet"),
    ],
)
def test_unusable_layer_is_named(options: dict, message: str) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    _quantise(model, **options)
    with pytest.raises(UnsupportedModelError, match=f"layers.0.self_attn.q_proj' .*{message}"):
        lk.accelerate_4bit(model)
