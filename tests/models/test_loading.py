"""Backbones from folders and names, and what is said when that cannot work."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ladder_kernels.errors import (
    CheckpointError,
    LadderKernelsError,
    MissingFileError,
    NonFiniteError,
    UnsupportedModelError,
)
from ladder_kernels.models.loading import (
    SUPPORTED_HOOKED,
    SUPPORTED_NATIVE,
    backbone_from_transformers,
    load_backbone,
)
from ladder_kernels.models.weights import UnusedTensorsWarning
from ladder_kernels.nf4 import NF4Weight

pytestmark = pytest.mark.filterwarnings(
    "ignore::ladder_kernels.models.hooked_backbone.SlowerBackboneWarning"
)


def same(a: Any, b: Any) -> bool:
    """Equal names, equal bits."""
    left, right = dict(a.named_weights()), dict(b.named_weights())
    if left.keys() != right.keys():
        return False
    for name, weight in left.items():
        other = right[name]
        if isinstance(weight, NF4Weight) != isinstance(other, NF4Weight):
            return False
        ours = weight.tensors() if isinstance(weight, NF4Weight) else {"": weight}
        theirs = other.tensors() if isinstance(other, NF4Weight) else {"": other}
        if ours.keys() != theirs.keys():
            return False
        if not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return True


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture
def folder(tmp_path: Path, make: Any) -> Path:
    """A saved float model."""
    make("qwen3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt2", "gemma2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("shards", [1, 4])
def test_float_safetensors(family: str, shards: int, tmp_path: Path, make: Any):
    model = make(family)
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 4096)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 1)
    loaded = load_backbone(tmp_path)
    assert same(loaded, backbone_from_transformers(model))
    assert loaded.fingerprint == backbone_from_transformers(model).fingerprint
    assert loaded.name_or_path == str(tmp_path)
    assert loaded.dtype == torch.float32


def test_nothing_stays_mapped(folder: Path):
    """What is kept is copied: the files may go away."""
    backbone = load_backbone(folder)
    before = [w.clone() for _, w in backbone.named_weights() if isinstance(w, torch.Tensor)]
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    after = [w for _, w in backbone.named_weights() if isinstance(w, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for tensor in after:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_names_of_a_bare_model(tmp_path: Path, make: Any):
    """gpt2 on the hub, and models saved without a head, leave out the first part of the names."""
    model = make("gpt2")
    model.config.save_pretrained(tmp_path)
    tensors = {
        name.removeprefix("transformer."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head")
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(load_backbone(tmp_path), backbone_from_transformers(model))


def test_old_name_of_the_head_of_gpt_neox(tmp_path: Path, make: Any):
    model = make("gpt_neox", tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)
    tensors = {
        name.replace("lm_head.", "embed_out."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(load_backbone(tmp_path), backbone_from_transformers(model))


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_the_float_model_is_never_held(family: str, tmp_path: Path, make: Any, live_floats: Any):
    model = make(family, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, head_dim=64)
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // 5)
    kept = 2 * model.get_input_embeddings().weight.numel() * 4
    largest = 1024 * 256 * 4
    del model
    gc.collect()
    with live_floats() as floats:
        backbone = load_backbone(tmp_path)
    assert size > 28 * 2**20
    # Embeddings and norms stay; beside them the tensor at hand, its fp32 blocks and small change.
    assert floats.peak < kept + 8 * largest
    assert floats.peak < size / 3
    assert backbone.nf4_bytes() < size / 7


def test_missing_folder(tmp_path: Path):
    with pytest.raises(MissingFileError, match="nowhere' does not exist"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=r"^'\./nowhere' does not exist$"):
        load_backbone("./nowhere")
    with pytest.raises(MissingFileError, match=r"nowhere\.gguf' does not exist"):
        load_backbone("nowhere.gguf")


def test_a_name_that_is_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError) as caught:
        load_backbone("nobody/no-such-model-at-all")
    text = str(caught.value)
    assert text.startswith("'nobody/no-such-model-at-all' is not a folder here, and the hub")
    assert "offline" in text
    assert "\n" not in text


def test_a_file_that_is_no_gguf(folder: Path):
    with pytest.raises(CheckpointError, match=r"allowed are a folder and a \.gguf file"):
        load_backbone(folder / "model.safetensors")


def test_missing_config(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json' does not exist"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid json"),
        ("[1]", "must hold a json object"),
        ("{}", "names no model_type"),
    ],
)
def test_bad_config(folder: Path, content: str, message: str):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_backbone(folder)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_of_the_wrong_type(folder: Path):
    edit_config(folder, hidden_size="wide")
    with pytest.raises(CheckpointError, match="not a valid configuration") as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("never_heard_of", "is not an architecture that transformers knows"),
        ("t5", "is an encoder-decoder"),
        ("mamba", "keeps a recurrent state"),
        ("rwkv", "keeps a recurrent state"),
        ("mixtral", "is a mixture of experts"),
        ("deberta", "is not a causal language model"),
        ("bloom", "is not supported"),
    ],
)
def test_architectures_that_cannot_work(folder: Path, model_type: str, reason: str):
    fields: dict[str, Any] = {"model_type": model_type}
    if model_type == "t5":
        fields["is_encoder_decoder"] = True
    if model_type == "mixtral":
        fields["num_local_experts"] = 8
    edit_config(folder, **fields)
    with pytest.raises(UnsupportedModelError) as caught:
        load_backbone(folder)
    text = str(caught.value)
    assert f"'{model_type}' {reason}" in text
    assert all(name in text for name in (*SUPPORTED_NATIVE, *SUPPORTED_HOOKED))
    assert "\n" not in text


@pytest.mark.parametrize("keep", [4, 100, -1000])
def test_truncated_safetensors(folder: Path, keep: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is truncated or corrupt") as e:
        load_backbone(folder)
    assert "\n" not in str(e.value)


def test_corrupt_header(folder: Path):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is truncated or corrupt"):
        load_backbone(folder)


def test_missing_shard(tmp_path: Path, make: Any):
    make("llama").save_pretrained(tmp_path, max_shard_size=100_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MissingFileError, match=f"{shard.name}' does not exist"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "valid json"), ("{}", "no weight_map")])
def test_bad_index(folder: Path, content: str, message: str):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(folder)


def test_no_safetensors(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match=r"it has pytorch_model\.bin, which must be conv"):
        load_backbone(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.Q4_0.gguf")
    with pytest.raises(MissingFileError, match=r"it has model\.Q4_0\.gguf: name that file"):
        load_backbone(folder)
    (folder / "model.Q4_0.gguf").unlink()
    with pytest.raises(MissingFileError, match=r"holds neither model\.safetensors nor"):
        load_backbone(folder)


def test_missing_tensors(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    lost = [name for name in tensors if ".mlp." in name]
    for name in lost:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 9 of .*layers\.0\.mlp.* and 6 more"):
        load_backbone(folder)


def test_another_shape(folder: Path):
    edit_config(folder, intermediate_size=80)
    with pytest.raises(CheckpointError, match=r"gate_proj.*\[96, 64\].*asks for \[80, 64\]"):
        load_backbone(folder)


def test_unused_tensors_are_named(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.extra"] = torch.ones(2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UnusedTensorsWarning, match=r"1 tensors .* model\.layers\.0\.self_attn\.ex"):
        load_backbone(folder)


def test_a_weight_that_is_not_finite(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq"),
        ({"quant_method": "awq"}, "quantised with awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "to 8 bits by bitsandbytes"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "to fp4 by bitsandbytes",
        ),
        ({}, "quantised with unknown"),
    ],
)
def test_other_quantisations(folder: Path, config: dict[str, Any], found: str):
    edit_config(folder, quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=found) as caught:
        load_backbone(folder)
    assert "float safetensors, bitsandbytes nf4 and GGUF" in str(caught.value)


def test_every_error_is_one_of_ours(folder: Path):
    shutil.rmtree(folder)
    with pytest.raises(LadderKernelsError):
        load_backbone(folder)
    with pytest.raises(FileNotFoundError):
        load_backbone(folder)


def test_fingerprint(tmp_path: Path, make: Any):
    """The same for the same function, whatever the dtype, file layout or device; else another."""
    model = make("llama")
    first = backbone_from_transformers(model)
    assert len(first.fingerprint) == 64
    assert backbone_from_transformers(model, dtype=torch.bfloat16).fingerprint == first.fingerprint
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size=100_000)
    for name in ("one", "many"):
        loaded = load_backbone(tmp_path / name, dtype=torch.bfloat16)
        assert loaded.fingerprint == first.fingerprint

    others = {first.fingerprint}
    others.add(backbone_from_transformers(model, blocksize=128).fingerprint)
    others.add(backbone_from_transformers(model, double_quant=False).fingerprint)
    others.add(backbone_from_transformers(model, quantize_head=True).fingerprint)
    model.config.rms_norm_eps *= 2
    others.add(backbone_from_transformers(model).fingerprint)
    model.config.rms_norm_eps /= 2
    model.config.rope_parameters["rope_theta"] *= 2
    others.add(backbone_from_transformers(model).fingerprint)
    model.config.rope_parameters["rope_theta"] /= 2
    assert backbone_from_transformers(model).fingerprint == first.fingerprint
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    others.add(backbone_from_transformers(model).fingerprint)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] += 1.0
    others.add(backbone_from_transformers(model).fingerprint)
    assert len(others) == 8


def test_fingerprint_of_a_hooked_model(make: Any):
    model = make("gpt2")
    first = backbone_from_transformers(model).fingerprint
    model.config.use_cache = False
    model.config.eos_token_id = 5
    model.config._name_or_path = "elsewhere"
    assert backbone_from_transformers(model).fingerprint == first
    model.config.activation_function = "relu"
    assert backbone_from_transformers(model).fingerprint != first


def test_fingerprint_stays(make: Any):
    """Saved ladders name this; it may not change from one version to the next."""
    model = make("llama")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel()).remainder(37 + number) - 18
            parameter.copy_(values.reshape(parameter.shape) / 32)
    wanted = "cc38dcf2da24e83bee606319fa01840826fbbb01fa19faebfd5796af01dfd4da"
    assert backbone_from_transformers(model).fingerprint == wanted
