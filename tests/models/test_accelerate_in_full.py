"""The rest of `accelerate_4bit`: loss, attention, adapters, and the way back."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import ladder_kernels as lk
from ladder_kernels.errors import UnsupportedModelError
from ladder_kernels.memory.meter import Meter
from ladder_kernels.models.fused_loss import FusedLoss
from ladder_kernels.models.reclass import Reclassed

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IDS = torch.arange(3, 67).reshape(2, 32)
_BATCHES = 4


def _base(folder: Path, model_type: str = "llama", **options: Any) -> Path:
    """A float checkpoint of a small random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **_SMALL, **options)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def _quantised(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The checkpoint as transformers loads it for QLoRA; its head stays float unless named."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", quantization_config=quantization
    ).train()


def _adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted.train()


def _step(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    """Losses of a few batches and their gradients, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    for batch in range(_BATCHES):
        ids = (_IDS * (2 * batch + 1)) % 90 + 3
        given = {"input_ids": ids, "labels": ids, **inputs}
        for name in ("labels", "shift_labels"):
            if name in inputs:
                given[name] = torch.where(inputs[name] == -100, -100, ids)
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        found.setdefault("loss", []).append(loss.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, []).append(parameter.grad.clone())
    return {name: torch.stack(values) for name, values in found.items()}


def _exact(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    """The same in float64, on the dequantised weights."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            # As it is rounded for the product.
            weight = weight.to(layer.compute_dtype)
            dense = torch.nn.Linear(*weight.shape[::-1], bias=layer.bias is not None)
            dense.weight = torch.nn.Parameter(weight.double(), requires_grad=False)
            if layer.bias is not None:
                dense.bias = torch.nn.Parameter(layer.bias.double(), requires_grad=False)
            model.set_submodule(name, dense)
    return _step(model.double(), **inputs)


def _assert_rule(
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
) -> None:
    """The rule on root mean squares: one loss alone is right by chance, or wrong."""
    assert ours.keys() == theirs.keys() == exact.keys()
    assert len(ours) > 1
    for name, right in exact.items():
        error, allowed = ((found[name].double() - right).norm() for found in (ours, theirs))
        assert error <= 2 * allowed + 1e-5 * right.norm(), (name, error, allowed)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base(tmp_path_factory.mktemp("qwen2"), "qwen2")


_PADDED = torch.ones_like(_IDS).index_fill_(1, torch.arange(5), 0)
_HALF = torch.where(torch.arange(32) % 2 == 0, _IDS, -100)
_SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"attention_mask": _PADDED, "labels": torch.where(_PADDED == 1, _IDS, -100)},
    "packed": {"position_ids": (torch.arange(32) % 11).expand(2, 32)},
    "some tokens": {"labels": _HALF},
    "items": {"labels": _HALF, "num_items_in_batch": torch.tensor(77)},
    "shifted": {"shift_labels": _IDS.roll(-3, 1)},
}


@pytest.mark.parametrize("situation", _SITUATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_obey_the_rule(
    llama: Path, dtype: torch.dtype, situation: str
) -> None:
    model = _adapted(_quantised(llama, dtype))
    inputs = _SITUATIONS[situation]
    theirs, exact = _step(model, **inputs), _exact(model, **inputs)
    lk.accelerate_4bit(model, loss=True, attention=True)
    ours = _step(model, **inputs)
    _assert_rule(ours, theirs, exact)
    assert len(ours) == 1 + 2 * 7 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_and_with_biases(qwen2: Path, dtype: torch.dtype) -> None:
    model = _adapted(_quantised(qwen2, dtype))
    theirs, exact = _step(model), _exact(model)
    lk.accelerate_4bit(model, loss=True, attention=True)
    plain = _step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    passes = []
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda *_: passes.append(None))
    ours = _step(model)
    assert len(passes) == 2 * _BATCHES  # recomputed
    _assert_rule(ours, theirs, exact)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma", {"head_dim": 16}),
        (
            "gemma2",
            {"head_dim": 16, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None},
        ),
        ("mistral", {"sliding_window": 7}),
        ("qwen3", {"head_dim": 16}),
        ("starcoder2", {}),
        ("gpt_neox", {}),
    ],
)
def test_families(tmp_path: Path, model_type: str, options: dict[str, Any]) -> None:
    model = _adapted(_quantised(_base(tmp_path, model_type, **options)))
    theirs, exact = _step(model), _exact(model)
    lk.accelerate_4bit(model, loss=True)
    assert model(input_ids=_IDS, labels=_IDS).logits is None
    _assert_rule(_step(model), theirs, exact)


def test_loss_keeps_no_logits_and_evaluation_has_them(llama: Path) -> None:
    model = _quantised(llama)
    lk.accelerate_4bit(model)
    out = model(_IDS, labels=_IDS, output_hidden_states=True)
    assert out.logits is None
    assert len(out.hidden_states) == 3
    assert model(_IDS).logits.shape == (2, 32, 97)
    assert model(_IDS, labels=_IDS, logits_to_keep=32).logits.shape == (2, 32, 97)
    assert model(_IDS, labels=_IDS, return_dict=False)[1].shape == (2, 32, 97)
    assert model.eval()(_IDS, labels=_IDS).logits.shape == (2, 32, 97)


def _head_with_bias(model: Any) -> None:
    model.lm_head.bias = torch.nn.Parameter(torch.ones(97))


def _head_with_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)


def _other_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, **_: logits.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_head_with_bias, "its head has a bias"),
        (_head_with_hook, "its head has hooks"),
        (_other_loss, "it has a loss of its own"),
    ],
)
def test_what_needs_logits_gets_them(llama: Path, change: Any, message: str) -> None:
    model = lk.accelerate_4bit(_quantised(llama), loss=True)
    change(model)
    out = model(_IDS, labels=_IDS)
    assert out.logits is not None
    lk.restore_4bit(model)
    with pytest.raises(UnsupportedModelError, match=f"loss=True, but this Llama.*: {message}"):
        lk.accelerate_4bit(model, loss=True)
    assert not any(isinstance(m, Reclassed) for m in model.modules())
    lk.accelerate_4bit(model)
    assert not isinstance(model, FusedLoss)
    torch.testing.assert_close(model(_IDS, labels=_IDS).loss, out.loss)


def test_adapter_on_the_head_trains(llama: Path) -> None:
    model = _adapted(_quantised(llama), target_modules=["q_proj", "lm_head"])
    theirs, exact = _step(model), _exact(model)
    lk.accelerate_4bit(model)
    ours = _step(model)
    assert any("lm_head" in name for name in ours)
    _assert_rule(ours, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_head(llama: Path, dtype: torch.dtype) -> None:
    base = _quantised(llama, dtype, llm_int8_skip_modules=["nothing"])
    assert isinstance(base.lm_head, bnb.nn.Linear4bit)
    model = _adapted(base, target_modules=["q_proj", "down_proj"])
    theirs, exact = _step(model), _exact(model)
    lk.accelerate_4bit(model, loss=True)
    assert model(input_ids=_IDS, labels=_IDS).logits is None
    _assert_rule(_step(model), theirs, exact)


@pytest.mark.parametrize("kind", ["dora", "bias", "two", "autocast", "merged", "disabled"])
def test_adapters_that_are_not_plain_run_as_before(llama: Path, kind: str) -> None:
    options = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(kind, {})
    model = _adapted(_quantised(llama), **options)
    if kind == "two":
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
        model.base_model.set_adapter(["default", "second"])

    def losses() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=kind == "autocast"):
            return model(input_ids=_IDS, labels=_IDS).loss

    if kind == "merged":
        model.merge_adapter()
    with model.disable_adapter() if kind == "disabled" else nullcontext():
        expected = losses()
        lk.accelerate_4bit(model)
        assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, Reclassed)
        tolerance = 2e-2 if kind == "autocast" else 1e-4
        torch.testing.assert_close(losses(), expected, rtol=tolerance, atol=0)


def test_dropout_has_the_same_masks(llama: Path) -> None:
    model = _adapted(_quantised(llama), lora_dropout=0.3)

    def steps() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return _step(model)

    expected = steps()
    lk.accelerate_4bit(model)
    actual = steps()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_layers_follow_a_weight_that_is_replaced(llama: Path) -> None:
    model = lk.accelerate_4bit(_adapted(_quantised(llama)))
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    weight = bnb.nn.Params4bit(
        torch.randn(layer.out_features, layer.in_features),
        requires_grad=False,
        quant_type="nf4",
    )
    layer.weight = weight.to("cpu")
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), x @ dense.float().t(), rtol=1e-4, atol=1e-4)


def test_memory_of_a_step_falls(llama: Path) -> None:
    model = _adapted(_quantised(llama, torch.bfloat16))

    ids = _IDS.repeat(4, 4)

    def peak() -> int:
        with Meter(model) as meter:
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        return meter.peak.usage.total - meter.peak.usage.weights

    peak()
    before = peak()
    lk.accelerate_4bit(model)
    assert peak() < 0.6 * before


def test_unknown_models_have_only_their_layers_changed(llama: Path) -> None:
    class Own(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.loss = out.logits.mean()
            return out

    model = _quantised(llama)
    model.__class__ = Own
    expected = model(_IDS, labels=_IDS).loss
    lk.accelerate_4bit(model)
    assert type(model) is Own
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(_IDS, labels=_IDS).loss, expected)
    for option in ("loss", "attention"):
        with pytest.raises(UnsupportedModelError, match=f"{option}=True, but Own holds no causal"):
            lk.accelerate_4bit(model, **{option: True})


def test_attention_that_is_not_ours_is_left(llama: Path) -> None:
    model = _quantised(llama)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="its attention is 'eager', and only"):
        lk.accelerate_4bit(model, attention=True)
    lk.accelerate_4bit(model)
    assert model.config._attn_implementation == "eager"
    lk.restore_4bit(model)
    assert model.config._attn_implementation == "eager"


def test_last_call_decides(llama: Path) -> None:
    model = lk.accelerate_4bit(_quantised(llama))
    assert isinstance(model, FusedLoss)
    assert model.config._attn_implementation == "ladder_kernels"
    lk.accelerate_4bit(model, loss=False, attention=False)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config._attn_implementation == "sdpa"
    assert isinstance(model.model.layers[0].mlp.up_proj, Reclassed)
    assert isinstance(model.model.norm, Reclassed)


def test_way_back(llama: Path, tmp_path: Path) -> None:
    model = _adapted(_quantised(llama))
    classes = {name: type(m) for name, m in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step = _step(model)
    with torch.no_grad():
        logits = model(_IDS).logits
    assert lk.accelerate_4bit(model) is model
    assert any(isinstance(m, Reclassed) for m in model.modules())
    _step(model)
    model.save_pretrained(tmp_path / "adapters")
    model.get_base_model().save_pretrained(tmp_path / "base")
    assert lk.restore_4bit(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert model.config._attn_implementation == "sdpa"
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    again = _step(model)
    assert all(torch.equal(again[name], step[name]) for name in step)
    with torch.no_grad():
        assert torch.equal(model(_IDS).logits, logits)

    loaded = PeftModel.from_pretrained(_quantised(llama), tmp_path / "adapters").train()
    with torch.no_grad():
        assert torch.equal(loaded(_IDS).logits, logits)
    config = AutoConfig.from_pretrained(tmp_path / "base")
    assert config.architectures == ["LlamaForCausalLM"]
    assert "ladder_kernels" not in (tmp_path / "base" / "config.json").read_text()


def test_loads_while_accelerated(llama: Path) -> None:
    model = lk.accelerate_4bit(_adapted(_quantised(llama)))
    step = _step(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.zero_()
    model.load_state_dict({name: value for name, value in state.items() if "lora" in name}, False)
    again = _step(model)
    assert all(torch.equal(again[name], step[name]) for name in step)


def test_pickled_and_copied(llama: Path) -> None:
    model = lk.accelerate_4bit(_adapted(_quantised(llama)))
    expected = _step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        again = _step(other)
        assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_generates_accelerated_and_after(llama: Path) -> None:
    model = _adapted(_quantised(llama))
    options = {"max_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(_IDS)

    def generated() -> torch.Tensor:
        # In training mode: in evaluation bitsandbytes repacks weights on some processors.
        return model.generate(input_ids=_IDS, attention_mask=mask, **options)

    expected = generated()
    assert torch.equal(
        lk.accelerate_4bit(model).generate(_IDS, attention_mask=mask, **options), expected
    )
    lk.restore_4bit(model)
    assert torch.equal(generated(), expected)


class _Texts(Dataset):
    """Labels of unequal numbers, so that a mean of means is not the mean."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(24) * (index + 3)) % 90 + 3
        return {
            "input_ids": ids,
            "labels": torch.where(torch.arange(24) < 4 * index + 3, ids, -100),
        }


def test_trainer_accumulates_gradients(llama: Path, tmp_path: Path) -> None:
    def trained(accelerated: bool) -> dict[str, torch.Tensor]:
        model = _adapted(_quantised(llama))
        if accelerated:
            lk.accelerate_4bit(model, loss=True, attention=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=1,
            learning_rate=1.0,
            max_grad_norm=0,
            optim="sgd",
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=_Texts()).train()
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    ours, theirs = trained(True), trained(False)
    start = {n: p.detach() for n, p in _adapted(_quantised(llama)).named_parameters()}
    for name, value in theirs.items():
        moved = value - start[name]
        assert moved.abs().max() > 0
        torch.testing.assert_close(ours[name] - start[name], moved, rtol=1e-3, atol=1e-6)
