"""Files under bitsandbytes' keys, both ways, and what is said of broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ladder_kernels import NF4Weight, quantize_nf4
from ladder_kernels.errors import CheckpointError, ConfigError
from ladder_kernels.nf4 import BLOCKSIZES
from ladder_kernels.nf4.checkpoint import (
    from_state_dict,
    is_quantized,
    state_keys,
    to_state_dict,
)

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
STORAGES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def assert_equal_weights(ours, theirs, assert_same_bits):
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, tensor in ours.tensors().items():
        assert_same_bits(tensor, theirs.tensors()[name])
    assert (ours.shape, ours.blocksize, ours.dtype) == (
        theirs.shape,
        theirs.blocksize,
        theirs.dtype,
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), blocksize=st.sampled_from(BLOCKSIZES), double_quant=st.booleans())
def test_keys_are_bitsandbytes(data, blocksize, double_quant, quantize, weights, assert_same_bits):
    weight = data.draw(weights())
    ours = to_state_dict(NAME, quantize_nf4(weight, blocksize, double_quant))
    packed, state = quantize(weight, blocksize, double_quant)
    theirs = {NAME: packed} | {
        f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    assert ours.keys() == theirs.keys()
    for key in ours:
        if key == STATE:
            mine, other = (json.loads(bytes(each[key].tolist())) for each in (ours, theirs))
            for values in (mine, other):  # NaN, of an empty tensor's offset, equals nothing
                values["nested_offset"] = str(values.get("nested_offset"))
            assert mine == other
        else:
            assert_same_bits(ours[key], theirs[key])
    # Both read what either wrote.
    for tensors in (ours, theirs):
        back = from_state_dict(NAME, tensors)
        assert_equal_weights(back, quantize_nf4(weight, blocksize, double_quant), assert_same_bits)
        tail = {key.removeprefix(NAME + "."): value for key, value in tensors.items()}
        del tail[NAME]
        read = QuantState.from_dict(tail, torch.device("cpu"))
        assert_equal_weights(
            NF4Weight.from_bitsandbytes(tensors[NAME], read), back, assert_same_bits
        )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_round_trip_through_a_file(storage, double_quant, tmp_path: Path, assert_same_bits):
    weights = {
        "a.weight": quantize_nf4(torch.randn(24, 64), double_quant=double_quant),
        "b.weight": quantize_nf4(torch.randn(16, 96).bfloat16(), 32, double_quant=double_quant),
    }
    tensors = {}
    for name, weight in weights.items():
        tensors |= to_state_dict(name, weight, quant_storage=storage)
        assert tensors[name].dtype == storage
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    for name, weight in weights.items():
        own = state_keys(name, loaded)
        assert len(own) == (6 if double_quant else 4)
        back = from_state_dict(name, {key: loaded[key] for key in own})
        assert_equal_weights(back, weight, assert_same_bits)


def test_weights_that_share_a_map_can_be_saved(tmp_path: Path):
    """safetensors refuses keys that share memory."""
    one = quantize_nf4(torch.randn(8, 64))
    two = quantize_nf4(torch.randn(8, 64))
    two = NF4Weight(
        two.packed, two.absmax, two.shape, 64, two.dtype,
        two.nested_absmax, one.nested_code, two.nested_offset,
    )  # fmt: skip
    save_file(to_state_dict("a", one) | to_state_dict("b", two), tmp_path / "both.safetensors")
    assert "b.nested_quant_map" in load_file(tmp_path / "both.safetensors")


def test_their_parameter_reads_ours(assert_same_bits):
    weight = quantize_nf4(torch.randn(32, 64))
    tensors = to_state_dict("weight", weight)
    packed = tensors.pop("weight")
    state = {key.removeprefix("weight."): value for key, value in tensors.items()}
    parameter = Params4bit.from_prequantized(packed, state, device="cpu")
    assert_equal_weights(
        NF4Weight.from_bitsandbytes(parameter, parameter.quant_state), weight, assert_same_bits
    )


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_reads_our_keys(double_quant: bool, tmp_path: Path, assert_same_bits):
    model = tiny()
    linears = {
        f"{name}.weight": quantize_nf4(module.weight, double_quant=double_quant)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k not in linears}
    for name, weight in linears.items():
        tensors |= to_state_dict(name, weight)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model.config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu")
    found = {
        f"{name}.weight": module.weight
        for name, module in loaded.named_modules()
        if isinstance(module, Linear4bit)
    }
    assert found.keys() == linears.keys()
    for name, parameter in found.items():
        taken = NF4Weight.from_bitsandbytes(parameter, parameter.quant_state)
        assert_equal_weights(taken, linears[name], assert_same_bits)


def test_we_read_the_keys_of_transformers(tmp_path: Path, assert_same_bits):
    model = tiny()
    model.save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    quantized = [name for name in tensors if is_quantized(name, tensors)]
    assert len(quantized) == 7
    for name in quantized:
        assert_equal_weights(
            from_state_dict(name, tensors),
            quantize_nf4(model.get_parameter(name)),
            assert_same_bits,
        )


def test_which_keys_belong_to_a_weight():
    keys = [*to_state_dict("a.weight", quantize_nf4(torch.randn(4, 64))), "a.weight2", "b.weight"]
    assert state_keys("a.weight", keys) == keys[:6]
    assert state_keys("b.weight", keys) == ["b.weight"]
    assert is_quantized("a.weight", keys)
    assert not is_quantized("b.weight", keys)
    assert not is_quantized("a", keys)
    assert is_quantized("c", ["c.quant_state.bitsandbytes__fp4"])


def test_a_storage_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"18 packed bytes cannot be stored as torch\.float32"):
        to_state_dict(NAME, quantize_nf4(torch.randn(5, 7)), quant_storage=torch.float32)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return to_state_dict(NAME, quantize_nf4(torch.randn(8, 64)))


def with_state(tensors: dict[str, torch.Tensor], **changes: object) -> dict[str, torch.Tensor]:
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    state = {key: value for key, value in state.items() if value is not None}
    return tensors | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_missing_tensor_is_named(part: str, tensors: dict[str, torch.Tensor]):
    del tensors[f"{NAME}.{part}"]
    with pytest.raises(CheckpointError) as caught:
        from_state_dict(NAME, tensors)
    assert str(caught.value) == f"{NAME}.{part} is missing from the file"


def test_missing_numbers_are_named(tensors: dict[str, torch.Tensor]):
    del tensors[NAME]
    with pytest.raises(CheckpointError) as caught:
        from_state_dict(NAME, tensors)
    assert str(caught.value) == f"{NAME} is missing from the file, though its scales are there"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blocksize": 48},
            "found blocksize 48, allowed are 32, 64, 128, 256, 512, 1024, 2048, 4096",
        ),
        ({"blocksize": None}, "found blocksize None, allowed are 32, 64"),
        ({"blocksize": [64]}, "found blocksize [64], allowed are 32, 64"),
        (
            {"dtype": "int3"},
            "its quantisation state names dtype 'int3' and shape [8, 64]",
        ),
        ({"shape": None}, "its quantisation state names dtype 'float32' and shape None"),
        ({"shape": ["a", 64]}, "its quantisation state names dtype 'float32' and shape ['a', 64]"),
        ({"shape": [-8, 64]}, "its quantisation state names dtype 'float32' and shape [-8, 64]"),
        ({"nested_blocksize": 128}, "found nested blocksize 128, allowed is 256"),
        ({"nested_blocksize": None}, "found nested blocksize None, allowed is 256"),
        ({"nested_offset": None}, "found nested offset None, it must be a number"),
        ({"nested_offset": "far"}, "found nested offset 'far', it must be a number"),
        (
            {"shape": [8, 72]},
            "packed is torch.uint8 [256]; it must be contiguous torch.uint8 [288]",
        ),
    ],
)
def test_a_bad_state_is_refused(changes, message, tensors: dict[str, torch.Tensor]):
    with pytest.raises(CheckpointError) as caught:
        from_state_dict(NAME, with_state(tensors, **changes))
    assert str(caught.value).startswith(f"{NAME}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", f"{STATE} is not readable: "),
        (b"\xff\xfe\xfa", f"{STATE} is not readable: "),
        (b"[1]", f"{STATE} holds no JSON object"),
    ],
)
def test_an_unreadable_state_is_refused(raw, message, tensors: dict[str, torch.Tensor]):
    tensors[STATE] = torch.tensor(list(raw), dtype=torch.uint8)
    with pytest.raises(CheckpointError) as caught:
        from_state_dict(NAME, tensors)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_state_of_another_dtype_is_refused(tensors: dict[str, torch.Tensor]):
    tensors[STATE] = torch.full((4,), 1.5)
    with pytest.raises(CheckpointError, match="is not readable"):
        from_state_dict(NAME, tensors)


def test_fp4_is_refused(tensors: dict[str, torch.Tensor]):
    tensors[f"{NAME}.quant_state.bitsandbytes__fp4"] = tensors.pop(STATE)
    with pytest.raises(CheckpointError) as caught:
        from_state_dict(NAME, tensors)
    assert str(caught.value) == f"{NAME}: found quantisation state 'fp4', allowed is 'nf4'"


def test_no_state_is_refused(tensors: dict[str, torch.Tensor]):
    del tensors[STATE]
    with pytest.raises(CheckpointError, match="found quantisation state 'none', allowed is 'nf4'"):
        from_state_dict(NAME, tensors)


def test_another_code_is_refused(tensors: dict[str, torch.Tensor]):
    tensors[f"{NAME}.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(CheckpointError) as caught:
        from_state_dict(NAME, tensors)
    assert str(caught.value) == f"{NAME}.quant_map does not hold the sixteen values of NF4"
