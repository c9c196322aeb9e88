"""Saved backbones, and those of transformers with bitsandbytes: the same bits both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ladder_kernels.errors import NonFiniteError, OutputExistsError, UnsupportedModelError
from ladder_kernels.models.backbone import Quantization
from ladder_kernels.models.loading import backbone_from_transformers, load_backbone, open_model
from ladder_kernels.models.saving import quantize_model
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.linear import FrozenLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore::ladder_kernels.models.hooked_backbone.SlowerBackboneWarning"
)
# bitsandbytes' CPU kernels misread scales where a row is no whole number of blocks.
WHOLE = {"intermediate_size": 128}
NATIVE = ("llama", "qwen3", "smollm3")
FAMILIES = ("llama", "qwen2", "smollm3", "gpt2", "gemma2", "phi")


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length))


def bits(backbone: Any) -> dict[str, torch.Tensor]:
    out = {}
    for name, weight in backbone.named_weights():
        if isinstance(weight, NF4Weight):
            out |= {f"{name}/{key}": tensor for key, tensor in weight.tensors().items()}
        else:
            out[name] = weight
    return out


def assert_same_bits(a: Any, b: Any) -> None:
    left, right = bits(a), bits(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.fixture
def load(exact: Any) -> Callable[..., Any]:
    """A folder as transformers with bitsandbytes loads it."""

    def run(folder: Path, **more: Any) -> Any:
        return exact(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **more).eval())

    return run


def theirs_nf4(load: Any, folder: Path, storage: torch.dtype = torch.uint8, **more: Any) -> Any:
    """A float folder, quantised by transformers with bitsandbytes."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
        **more,
    )
    return load(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_theirs_loads_here(
    family: str, storage: torch.dtype, tmp_path: Path, make: Any, load: Any, logits: Any, error: Any
):
    make(family, **WHOLE).save_pretrained(tmp_path / "float")
    model = theirs_nf4(load, tmp_path / "float", storage)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_backbone(tmp_path / "theirs")
    assert_same_bits(loaded, load_backbone(tmp_path / "float"))
    assert_same_bits(loaded, backbone_from_transformers(model))
    assert loaded.fingerprint == load_backbone(tmp_path / "float").fingerprint
    assert loaded.fingerprint == backbone_from_transformers(model).fingerprint
    tokens = ids(2, 13)
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
    assert error(logits(loaded, tokens), wanted) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize_head", [False, True])
def test_ours_loads_there(
    family: str, quantize_head: bool, tmp_path: Path, make: Any, load: Any, logits: Any, error: Any
):
    backbone = backbone_from_transformers(make(family, **WHOLE), quantize_head=quantize_head)
    backbone.save_pretrained(tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]
    model = load(tmp_path / "ours", dtype=torch.float32)
    assert_same_bits(backbone_from_transformers(model), backbone)
    tokens = ids(2, 13)
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
    assert error(logits(backbone, tokens), wanted) < 1e-5

    again = load_backbone(tmp_path / "ours")
    assert_same_bits(again, backbone)
    assert again.fingerprint == backbone.fingerprint
    assert isinstance(again.head, NF4Weight) == quantize_head
    assert torch.equal(logits(again, tokens), logits(backbone, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_in_half_precision(
    dtype: torch.dtype, tmp_path: Path, make: Any, load: Any, logits: Any, error: Any
):
    backbone = backbone_from_transformers(make("llama", **WHOLE), dtype=dtype)
    backbone.save_pretrained(tmp_path / "ours")
    model = load(tmp_path / "ours")
    assert model.dtype == dtype
    exact = load_backbone(tmp_path / "ours", dtype=torch.float32)
    tokens = ids(2, 13)
    wanted = logits(exact, tokens)
    with torch.no_grad():
        theirs = error(model(tokens, use_cache=False).logits.float(), wanted)
    assert error(logits(backbone, tokens).float(), wanted) <= 2 * theirs + 1e-5
    assert_same_bits(load_backbone(tmp_path / "ours", dtype=dtype), backbone)


@pytest.mark.parametrize(("blocksize", "double_quant"), [(32, False), (128, True)])
def test_other_settings_load_there(
    blocksize: int,
    double_quant: bool,
    tmp_path: Path,
    make: Any,
    load: Any,
    logits: Any,
    error: Any,
):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    backbone = backbone_from_transformers(
        make("llama", **sizes), blocksize=blocksize, double_quant=double_quant
    )
    backbone.save_pretrained(tmp_path)
    model = load(tmp_path)
    tokens = ids(2, 13)
    with torch.no_grad():
        assert error(logits(backbone, tokens), model(tokens, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_a_checkpoint_left_in_float_stay_so(
    family: str, tmp_path: Path, make: Any, load: Any, logits: Any, error: Any
):
    make(family, **WHOLE).save_pretrained(tmp_path / "float")
    skipped = {
        "llama": ["lm_head", "model.layers.0.mlp.gate_proj", "model.layers.2.self_attn.o_proj"],
        "gpt2": ["lm_head", "transformer.h.0.mlp.c_fc"],
    }[family]
    model = theirs_nf4(load, tmp_path / "float", llm_int8_skip_modules=skipped)
    model.save_pretrained(tmp_path / "theirs")
    backbone = load_backbone(tmp_path / "theirs")
    assert sum(isinstance(module, FrozenLinear) for module in backbone.modules()) == (
        len(skipped) - 1
    )
    assert sorted(backbone.float_linears()) == sorted(skipped)
    tokens = ids(2, 13)
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
    assert error(logits(backbone, tokens), wanted) < 1e-5
    backbone.save_pretrained(tmp_path / "ours")
    assert_same_bits(load_backbone(tmp_path / "ours"), backbone)
    again = load(tmp_path / "ours")
    with torch.no_grad():
        assert error(again(tokens, use_cache=False).logits, wanted) < 1e-5


def test_tied_embeddings_are_stored_once(tmp_path: Path, make: Any):
    backbone_from_transformers(make("smollm3")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors


def test_fp4_and_int8_in_memory(tmp_path: Path, make: Any, load: Any):
    make("llama", **WHOLE).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = load(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="fp4"):
        backbone_from_transformers(model)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    model = load(tmp_path, quantization_config=eight)
    with pytest.raises(UnsupportedModelError, match="8 bits"):
        backbone_from_transformers(model)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, make: Any):
    backbone = backbone_from_transformers(make("llama", **WHOLE))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not an empty folder"):
        backbone.save_pretrained(tmp_path / "taken")
    with pytest.raises(OutputExistsError):
        backbone.save_pretrained(tmp_path / "taken" / "notes.txt")
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "notes.txt"]
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    backbone.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    backbone.save_pretrained(tmp_path / "not" / "yet" / "there")
    assert (tmp_path / "not" / "yet" / "there" / "model.safetensors").exists()


def test_a_save_that_fails_leaves_nothing(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
):
    backbone = backbone_from_transformers(make("llama", **WHOLE))

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("ladder_kernels.memory.tensor_file.TensorFileWriter._append", full)
    with pytest.raises(OSError, match="no space"):
        backbone.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("family", NATIVE)
def test_weight_by_weight_as_from_a_backbone(
    family: str, quantize_head: bool, tmp_path: Path, make: Any
):
    """The same files by bits, whether the source is float or was quantised before."""
    make(family).save_pretrained(tmp_path / "float")
    settings = Quantization(32, True, quantize_head)
    name = str(tmp_path / "float")
    for step in ("first", "again"):
        config, source = open_model(name, None)
        saved = quantize_model(
            source, config, tmp_path / step, quantization=settings, dtype=torch.bfloat16
        )
        options = {"dtype": torch.bfloat16, "blocksize": 32, "quantize_head": quantize_head}
        backbone = load_backbone(name, **options)
        backbone.save_pretrained(tmp_path / f"{step}-backbone")
        for file in ("model.safetensors", "config.json"):
            one, two = (tmp_path / each / file for each in (step, f"{step}-backbone"))
            assert one.read_bytes() == two.read_bytes()
        assert saved.parameters == backbone.num_parameters()
        assert saved.nf4_bytes == backbone.nf4_bytes()
        name = str(tmp_path / step)


def test_no_more_than_one_weight_is_held(tmp_path: Path, make: Any, live_floats: Any):
    model = make("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=8, head_dim=64)
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path / "float", max_shard_size=size // 5)
    largest = 1024 * 256 * 4
    del model
    config, source = open_model(str(tmp_path / "float"), None)
    with live_floats() as floats:
        quantize_model(
            source, config, tmp_path / "out", quantization=Quantization(), dtype=torch.float32
        )
    assert size > 28 * 2**20
    # The tensor at hand, its fp32 blocks and small change.
    assert floats.peak < 4 * largest


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path, make: Any):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "float")
    config, source = open_model(str(tmp_path / "float"), None)
    with pytest.raises(NonFiniteError, match=r"layers\.2\.mlp\.up_proj"):
        quantize_model(
            source, config, tmp_path / "out", quantization=Quantization(), dtype=torch.float32
        )
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
