"""Backbones that are calibrated as they are loaded."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladder_kernels import LadderConfig, LadderForCausalLM, quantize_nf4
from ladder_kernels.errors import BaseMismatchError, ConfigError, UnsupportedModelError
from ladder_kernels.models.calibration import check_rows
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.attention import SequenceLayout

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
SHAPE = LadderConfig.lst(reduction=4)


def texts(rows: int, length: int = 48, seed: int = 0) -> list[torch.Tensor]:
    """Token ids that follow each other in few ways, so that inputs are alike."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 128, (rows, 1), generator=generator)
    steps = torch.randint(1, 4, (rows, length), generator=generator)
    return list((starts + steps.cumsum(dim=1)) % 128)


CALIBRATION = texts(24)


def last_states(backbone: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    tokens = torch.stack(rows)
    layout = SequenceLayout.build(*tokens.shape)
    return backbone.final_norm(backbone.frozen_pass(tokens, layout=layout).hidden)


def weights(backbone: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, weight in backbone.named_weights()
        if isinstance(weight, NF4Weight)
        for key, tensor in weight.tensors().items()
    }


def same(a: Any, b: Any) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def folder(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make("llama", **SIZES).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> Any:
    return load_backbone(folder, calibration=CALIBRATION)


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_states_are_nearer_to_the_float_models(
    family: str, double_quant: bool, tmp_path: Path, make: Any
):
    model = make(family)
    model.save_pretrained(tmp_path)
    unseen = texts(8, seed=1)
    with torch.no_grad():
        wanted = model.model(torch.stack(unseen), use_cache=False).last_hidden_state
    errors = [
        (last_states(backbone, unseen) - wanted).square().sum()
        for backbone in (
            load_backbone(tmp_path, double_quant=double_quant),
            load_backbone(tmp_path, double_quant=double_quant, calibration=CALIBRATION),
        )
    ]
    assert errors[1] < 0.6 * errors[0]


def test_the_same_texts_give_the_same_bits(folder: Path, calibrated: Any):
    again = load_backbone(folder, calibration=[row.tolist() for row in CALIBRATION])
    assert same(again, calibrated)
    assert again.fingerprint == calibrated.fingerprint
    nearest = load_backbone(folder)
    assert not same(nearest, calibrated)
    assert nearest.fingerprint != calibrated.fingerprint
    assert nearest.nf4_bytes() == calibrated.nf4_bytes()
    assert calibrated.quantization.calibrated
    assert not nearest.quantization.calibrated


def test_weights_can_be_saved_for_gradients(calibrated: Any):
    """They are ordinary tensors: autograd refuses those of inference mode."""
    assert not any(tensor.is_inference() for tensor in calibrated.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_compute_dtypes(folder: Path, dtype: torch.dtype):
    backbone = load_backbone(folder, dtype=dtype, calibration=CALIBRATION)
    nearest = load_backbone(folder, dtype=dtype)
    assert backbone.dtype == dtype
    unseen = texts(8, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        wanted = model.model(torch.stack(unseen), use_cache=False).last_hidden_state
    ours, theirs = ((last_states(b, unseen) - wanted).square().sum() for b in (backbone, nearest))
    assert ours < 0.7 * theirs


def test_a_head_is_calibrated_too(folder: Path, logits: Any):
    unseen = torch.stack(texts(8, seed=1))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(unseen, use_cache=False).logits
    nearest, ours = (
        load_backbone(folder, quantize_head=True, calibration=rows) for rows in (None, CALIBRATION)
    )
    assert isinstance(nearest.head, NF4Weight)
    assert isinstance(ours.head, NF4Weight)
    assert not torch.equal(ours.head.packed, nearest.head.packed)
    errors = [(logits(backbone, unseen) - wanted).square().sum() for backbone in (nearest, ours)]
    assert errors[1] < 0.6 * errors[0]
    body = load_backbone(folder, calibration=CALIBRATION)
    others = {name: tensor for name, tensor in weights(ours).items() if "lm_head" not in name}
    assert all(torch.equal(weights(body)[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_saved_one_is_an_ordinary_base(folder: Path, tmp_path: Path, double_quant: bool):
    backbone = load_backbone(folder, double_quant=double_quant, calibration=CALIBRATION)
    backbone.save_pretrained(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    assert same(again, backbone)
    assert again.fingerprint == backbone.fingerprint
    assert torch.equal(last_states(again, CALIBRATION), last_states(backbone, CALIBRATION))
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        load_backbone(tmp_path / "saved", calibration=CALIBRATION)


def test_transformers_reads_a_saved_one(calibrated: Any, tmp_path: Path, exact: Any, error: Any):
    calibrated.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map="cpu", dtype=torch.float32
    )
    tokens = torch.stack(CALIBRATION[:2])
    with torch.no_grad():
        wanted = exact(theirs.eval()).model(tokens, use_cache=False).last_hidden_state
    assert error(last_states(calibrated, CALIBRATION[:2]), wanted) < 1e-5


def test_one_block_is_in_float_at_a_time(tmp_path: Path, make: Any, live_floats: Any):
    peaks, sizes = [], []
    for layers in (2, 5):
        model = make("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=layers)
        sizes.append(sum(p.numel() * 4 for p in model.model.layers.parameters()))
        model.save_pretrained(tmp_path / str(layers))
        del model
        gc.collect()
        with live_floats() as floats:
            load_backbone(tmp_path / str(layers), calibration=CALIBRATION[:2])
        peaks.append(floats.peak)
    # Norms and scales of the further layers stay.
    assert peaks[1] - peaks[0] < 0.05 * (sizes[1] - sizes[0])


def test_hooked_backbones_refuse(tmp_path: Path, make: Any):
    make("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'gpt2' runs on the layers of transformers"):
        load_backbone(tmp_path, calibration=CALIBRATION)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["no texts"]),
        ("text", ["a str"]),
        (7, ["a int"]),
        (["text"], ["calibration[0]", "'text'"]),
        ([[1, 2], []], ["calibration[1]", "no tokens"]),
        ([[1.5, 2.0]], ["calibration[0]", "float32"]),
        ([torch.ones(3, dtype=torch.bool)], ["calibration[0]", "bool"]),
        ([torch.ones(2, 3, dtype=torch.long)], ["calibration[0]", "[2, 3]"]),
        ([[1, -1]], ["calibration[0]", "token -1", "0 to 127"]),
        ([[1, 128]], ["calibration[0]", "token 128", "0 to 127"]),
        ([[1] * 65], ["calibration[0]", "65 tokens", "64"]),
    ],
)
def test_wrong_texts(folder: Path, rows: Any, words: list[str]):
    with pytest.raises(ConfigError, match="calibration") as caught:
        load_backbone(folder, calibration=rows)
    for word in words:
        assert word in str(caught.value)


def test_texts_may_be_of_any_length_and_kind():
    rows = check_rows(
        [[1, 2, 3], (4,), torch.tensor([5, 6], dtype=torch.int32)], vocab_size=7, max_context=None
    )
    assert [row.tolist() for row in rows] == [[1, 2, 3], [4], [5, 6]]
    assert all(row.dtype == torch.int64 for row in rows)
    assert len(check_rows(torch.ones(2, 3, dtype=torch.long), vocab_size=7, max_context=3)) == 2


def test_a_ladder_on_a_base_calibrated_in_memory(folder: Path, calibrated: Any, tmp_path: Path):
    model = LadderForCausalLM.from_pretrained(folder, ladder=SHAPE, calibration=CALIBRATION)
    assert model.backbone.fingerprint == calibrated.fingerprint
    model.save_pretrained(tmp_path / "ladder")
    with pytest.raises(ConfigError, match=r"calibrated in memory.*ladder-kernels quantize") as said:
        LadderForCausalLM.from_pretrained(tmp_path / "ladder")
    assert str(folder) in str(said.value)
    with pytest.raises(BaseMismatchError, match=r"calibrated in memory.*ladder-kernels quantize"):
        LadderForCausalLM.from_pretrained(tmp_path / "ladder", base=folder)

    model.backbone.save_pretrained(tmp_path / "base")
    tokens = torch.stack(texts(2, seed=3))
    with torch.no_grad():
        wanted = model(tokens).logits
        for given in (
            {"base": tmp_path / "base"},
            {"base": calibrated},
            {"calibration": CALIBRATION},  # on this machine, the same bits
        ):
            again = LadderForCausalLM.from_pretrained(tmp_path / "ladder", **given)
            assert torch.equal(again(tokens).logits, wanted)


def test_a_ladder_on_a_saved_calibrated_base(calibrated: Any, tmp_path: Path):
    calibrated.save_pretrained(tmp_path / "base")
    model = LadderForCausalLM.from_pretrained(tmp_path / "base", ladder=SHAPE)
    model.save_pretrained(tmp_path / "ladder")
    again = LadderForCausalLM.from_pretrained(tmp_path / "ladder")
    assert again.backbone.fingerprint == calibrated.fingerprint


def test_the_first_layers_are_those_of_quantize_nf4(folder: Path, calibrated: Any):
    """What queries read has met no quantised layer yet, so that it is known from outside."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(torch.stack(CALIBRATION))).flatten(0, 1)
        expected = quantize_nf4(layer.self_attn.q_proj.weight, calibration=x.t() @ x)
    found = dict(calibrated.named_weights())["model.layers.0.self_attn.q_proj.weight"]
    agreeing = (found.packed == expected.packed).float().mean()
    assert agreeing > 0.95  # sums in another order tip a few
