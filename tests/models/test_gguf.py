"""Backbones from GGUF files that are written here, with llama.cpp's layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ladder_kernels.errors import (
    CheckpointError,
    ConfigError,
    MissingFileError,
    UnsupportedModelError,
)
from ladder_kernels.models.backbone import Quantization
from ladder_kernels.models.gguf_source import GGUFSource
from ladder_kernels.models.loading import backbone_from_transformers, load_backbone, open_model
from ladder_kernels.models.saving import quantize_model
from ladder_kernels.nf4 import NF4Weight

pytestmark = pytest.mark.filterwarnings(
    "ignore::ladder_kernels.models.hooked_backbone.SlowerBackboneWarning"
)
LIMIT = 1e-5


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length))


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours, transformers halves: its converter reorders q and k."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: Any,
    arch: str,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray] | None = None,
    fields: dict[str, Any] | None = None,
    tokens: list[str] | None = None,
) -> Path:
    """Write a tiny transformers model as llama.cpp's converter would."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if tokens is None:
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_token_list(tokens)
    for key, value in (fields or {}).items():
        writer.add_key_value(
            f"{arch}.{key}",
            value,
            gguf.GGUFValueType.STRING
            if isinstance(value, str)
            else gguf.GGUFValueType.UINT32
            if isinstance(value, int)
            else gguf.GGUFValueType.FLOAT32,
        )
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), config.num_hidden_layers
    )
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name.startswith("lm_head"):
            continue
        stem, _, suffix = name.rpartition(".")
        theirs = names.get_name(stem)
        assert theirs is not None, name
        data = tensor.float().numpy()
        if arch == "llama" and stem.endswith("q_proj"):
            data = interleave(data, config.num_attention_heads)
        if arch == "llama" and stem.endswith("k_proj"):
            data = interleave(data, config.num_key_value_heads)
        if arch == "gemma2" and stem.endswith("norm"):
            data = data + 1
        as_kind = kind if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            f"{theirs}.{suffix}",
            gguf.quantize(np.ascontiguousarray(data), as_kind),
            raw_dtype=as_kind,
        )
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SMALL = {"attention_bias": False, "mlp_bias": False}


@pytest.mark.parametrize(
    ("family", "arch", "more"),
    [
        ("llama", "llama", SMALL),
        ("llama", "llama", {**SMALL, "tie_word_embeddings": True}),
        ("qwen2", "qwen2", {"use_sliding_window": False, "head_dim": 16}),
        ("qwen3", "qwen3", {"use_sliding_window": False, "attention_bias": False}),
        (
            "gemma2",
            "gemma2",
            {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
    ],
)
def test_float_file(
    family: str,
    arch: str,
    more: dict[str, Any],
    tmp_path: Path,
    make: Any,
    give_weights: Any,
    logits: Any,
    error: Any,
):
    model = make(family, **more)
    path = write(
        tmp_path / "tiny.gguf",
        model,
        arch,
        fields={"attention.sliding_window": 5} if family == "gemma2" else None,
    )
    backbone = load_backbone(path)
    assert backbone.config.model_type == family
    give_weights(backbone, model)
    tokens = ids(2, 13)
    with torch.no_grad():
        assert error(logits(backbone, tokens), model(tokens, use_cache=False).logits) < LIMIT
    inside = load_backbone(tmp_path, gguf_file="tiny.gguf")
    assert inside.fingerprint == backbone.fingerprint


@pytest.mark.parametrize(("layers", "scalar"), [(26, 16), (42, 16), (46, 24)])
def test_attention_scale_of_gemma2(layers: int, scalar: int, tmp_path: Path, make: Any):
    """The largest one's differs, and no metadata says so."""
    model = make("gemma2", hidden_size=96)
    model.config.num_hidden_layers = layers
    path = write(tmp_path / "tiny.gguf", model, "gemma2", fields={"attention.sliding_window": 5})
    assert GGUFSource(path).config.query_pre_attn_scalar == scalar


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_file(kind: str, tmp_path: Path, make: Any):
    """Blocks are dequantised first, then quantised as any float weight."""
    model = make("llama", **SMALL)
    kind_id = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                data = parameter.numpy()
                heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
                data = data if heads is None else interleave(data, heads)
                data = gguf.dequantize(gguf.quantize(data, kind_id), kind_id)
                if heads is not None:
                    rows = data.reshape(heads, len(data) // heads // 2, 2, -1)
                    data = rows.swapaxes(1, 2).reshape(data.shape)
                parameter.copy_(torch.from_numpy(np.array(data)))
    path = write(tmp_path / "tiny.gguf", model, "llama", kind=kind_id)
    ours, wanted = load_backbone(path), backbone_from_transformers(model)
    for (name, a), (_, b) in zip(ours.named_weights(), wanted.named_weights(), strict=True):
        a, b = (w.dequantize() if isinstance(w, NF4Weight) else w for w in (a, b))
        assert torch.equal(a, b), name


def test_a_file_is_calibrated_as_a_folder_is(tmp_path: Path, make: Any):
    model = make("llama", **SMALL)
    model.save_pretrained(tmp_path / "folder")
    path = write(tmp_path / "tiny.gguf", model, "llama")
    calibration = list(torch.randint(3, 100, (8, 32)))
    ours, wanted = (load_backbone(p, calibration=calibration) for p in (path, tmp_path / "folder"))
    for (name, a), (_, b) in zip(ours.named_weights(), wanted.named_weights(), strict=True):
        a, b = (w.packed if isinstance(w, NF4Weight) else w for w in (a, b))
        assert torch.equal(a, b), name


def test_frequency_factors(tmp_path: Path, make: Any, exact: Any, logits: Any, error: Any):
    """llama 3 files hold divisors of the rotary frequencies in a tensor."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = make("llama", **SMALL, rope_parameters=scaling, intermediate_size=128)
    plain = 1.0 / 1000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    path = write(tmp_path / "tiny.gguf", model, "llama", extra={"rope_freqs.weight": factors})
    backbone = load_backbone(path)
    tokens = ids(2, 40)
    wanted = logits(backbone_from_transformers(model), tokens)
    assert error(logits(backbone, tokens), wanted) < LIMIT
    backbone.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map="cpu", dtype=torch.float32
    )
    exact(again.eval())
    with torch.no_grad():
        assert error(again(tokens, use_cache=False).logits, wanted) < LIMIT


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("linear", {"factor": 4.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16}),
    ],
)
def test_rope_scaling_in_the_metadata(
    kind: str, scaling: dict[str, Any], tmp_path: Path, make: Any, logits: Any, error: Any
):
    rope = {"rope_type": kind, "rope_theta": 1000.0, **scaling}
    model = make("qwen2", use_sliding_window=False, head_dim=16, rope_parameters=rope)
    fields = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = 16
    path = write(tmp_path / "tiny.gguf", model, "qwen2", fields=fields)
    tokens = ids(2, 40)
    wanted = logits(backbone_from_transformers(model), tokens)
    assert error(logits(load_backbone(path), tokens), wanted) < LIMIT


def test_vocabulary_from_the_tokens(tmp_path: Path, make: Any):
    """Where no field says how large it is."""
    model = make("llama", **SMALL)
    tokens = [f"<{i}>" for i in range(model.config.vocab_size)]
    path = write(tmp_path / "tiny.gguf", model, "llama", tokens=tokens)
    assert load_backbone(path).config.vocab_size == len(tokens) == 128


def test_missing_file(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"no\.gguf' does not exist"):
        load_backbone(tmp_path, gguf_file="no.gguf")


@pytest.mark.parametrize("keep", [10, 200, -5000])
def test_truncated(keep: int, tmp_path: Path, make: Any):
    path = write(tmp_path / "tiny.gguf", make("llama", **SMALL), "llama")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf' is truncated or corrupt") as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)


def test_architecture_that_cannot_be_read(tmp_path: Path, make: Any):
    model = make("llama", **SMALL)
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "clip")
    writer.add_context_length(64)
    writer.add_tensor("a.weight", model.model.norm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="architecture 'clip' cannot be read"):
        load_backbone(tmp_path / "odd.gguf")


def test_a_file_that_lacks_a_tensor(tmp_path: Path, make: Any):
    two = make("llama", **SMALL, num_hidden_layers=2)
    two.config.num_hidden_layers = 3
    path = write(tmp_path / "tiny.gguf", two, "llama")
    with pytest.raises(CheckpointError, match=r"lacks 9 of .*model\.layers\.2\."):
        load_backbone(path)


def test_a_file_is_quantised_weight_by_weight(tmp_path: Path, make: Any):
    """Without a backbone, to the bits that one has; and embeddings may stay on the host."""
    path = write(tmp_path / "tiny.gguf", make("llama"), "llama")
    config, source = open_model(str(path), None)
    quantize_model(
        source, config, tmp_path / "out", quantization=Quantization(), dtype=torch.float32
    )
    backbone = load_backbone(path)
    backbone.save_pretrained(tmp_path / "backbone")
    one, two = (tmp_path / name / "model.safetensors" for name in ("out", "backbone"))
    assert one.read_bytes() == two.read_bytes()
    on_host = load_backbone(path, embeddings="host", dtype=torch.bfloat16)
    assert on_host.fingerprint == backbone.fingerprint
    assert torch.equal(on_host.embedding, backbone.embedding.bfloat16())
    with pytest.raises(ConfigError, match=r"tiny\.gguf holds no NF4 weights"):
        load_backbone(path, weights="streamed")
