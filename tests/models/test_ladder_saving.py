"""Saved ladders: what is stored, what comes back, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    MissingFileError,
    OutputExistsError,
)
from ladder_kernels.models import checkpoint
from ladder_kernels.models.config import LadderModelConfig
from ladder_kernels.models.loading import backbone_from_transformers

IDS = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
SHAPE = LadderConfig.xladder(connected=2, free=1, reduction=4, merge="gate")


def shake(model: LadderForCausalLM, seed: int = 1) -> LadderForCausalLM:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype))
    return model


@pytest.fixture(scope="module")
def base(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    model = make("llama")
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_base(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "other"
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(base: Path) -> LadderForCausalLM:
    return shake(LadderForCausalLM.from_pretrained(base, ladder=SHAPE))


@pytest.fixture
def saved(model: LadderForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "ladder")
    return tmp_path / "ladder"


def assert_same(one: LadderForCausalLM, two: LadderForCausalLM) -> None:
    assert one.config.ladder == two.config.ladder
    assert one.tap_dtype == two.tap_dtype
    for (name, left), (other, right) in zip(
        one.state_dict().items(), two.state_dict().items(), strict=True
    ):
        assert name == other
        assert left.dtype == right.dtype
        assert torch.equal(left, right), name
    assert torch.equal(one(IDS).logits, two(IDS).logits)


def test_round_trip_by_bits(model: LadderForCausalLM, saved: Path):
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    again = LadderForCausalLM.from_pretrained(saved)
    assert_same(model, again)
    assert not again.training
    assert again.generation_config.repetition_penalty == 1.25
    again.save_pretrained(saved)
    assert_same(model, LadderForCausalLM.from_pretrained(str(saved)))


def test_only_the_ladder_is_stored(model: LadderForCausalLM, saved: Path):
    stored = load_file(saved / "model.safetensors")
    assert set(stored) == {name for name, _ in model.named_parameters()}
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "ladder"
    assert config["base_fingerprint"] == model.backbone.fingerprint
    assert config["base_name_or_path"] == model.backbone.name_or_path
    assert config["base_quantization"] == {
        "blocksize": 64,
        "double_quant": True,
        "quantize_head": False,
        "calibrated": False,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_keep_their_dtype(dtype: torch.dtype, model: LadderForCausalLM, tmp_path: Path):
    model.ladder.to(dtype)
    model.save_pretrained(tmp_path / "cast")
    assert_same(model, LadderForCausalLM.from_pretrained(tmp_path / "cast"))


def test_the_bases_quantisation_comes_back(base: Path, tmp_path: Path):
    options = {"blocksize": 32, "double_quant": False, "quantize_head": True}
    one = LadderForCausalLM.from_pretrained(base, ladder=SHAPE, tap_dtype="float32", **options)
    shake(one).save_pretrained(tmp_path / "ladder")
    assert_same(one, LadderForCausalLM.from_pretrained(tmp_path / "ladder"))
    with pytest.raises(BaseMismatchError):
        LadderForCausalLM.from_pretrained(tmp_path / "ladder", blocksize=64)


def test_options_of_loading(saved: Path, base: Path):
    model = LadderForCausalLM.from_pretrained(saved, dtype="bfloat16", tap_dtype=torch.float32)
    assert (model.dtype, model.tap_dtype) == (torch.bfloat16, torch.float32)
    assert model.config.tap_dtype == "float32"
    fresh = LadderForCausalLM.from_pretrained(base)
    wanted = LadderConfig.recommended().settled(fresh.backbone.num_layers)
    assert fresh.config.ladder_config == wanted


def test_transformers_auto_classes_load_it(model: LadderForCausalLM, saved: Path):
    assert isinstance(AutoConfig.from_pretrained(saved), LadderModelConfig)
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(again, LadderForCausalLM)
    assert_same(model, again)


def test_another_base_is_refused(saved: Path, base: Path, other_base: Path):
    with pytest.raises(BaseMismatchError, match=r"trained on .*base .*, found .*other") as caught:
        LadderForCausalLM.from_pretrained(saved, base=other_base)
    assert "\n" not in str(caught.value)
    shutil.copytree(base, saved.parent / "moved")
    LadderForCausalLM.from_pretrained(saved, base=saved.parent / "moved")


def test_a_base_whose_files_changed_is_refused(base: Path, other_base: Path, tmp_path: Path):
    shutil.copytree(base, tmp_path / "mine")
    model = LadderForCausalLM.from_pretrained(tmp_path / "mine", ladder=SHAPE)
    model.save_pretrained(tmp_path / "ladder")
    shutil.copy(other_base / "model.safetensors", tmp_path / "mine" / "model.safetensors")
    with pytest.raises(BaseMismatchError, match="its own base only"):
        LadderForCausalLM.from_pretrained(tmp_path / "ladder")


def test_a_loaded_base_serves_several_ladders(model: LadderForCausalLM, saved: Path):
    again = LadderForCausalLM.from_pretrained(saved, base=model.backbone)
    assert again.backbone is model.backbone
    assert_same(model, again)


def test_a_base_in_memory_must_be_given(make: Callable[..., Any], tmp_path: Path):
    backbone = backbone_from_transformers(make("llama"))
    model = LadderForCausalLM.from_backbone(backbone, SHAPE)
    model.save_pretrained(tmp_path / "ladder")
    with pytest.raises(ConfigError, match=r"base: .*names none"):
        LadderForCausalLM.from_pretrained(tmp_path / "ladder")
    assert_same(model, LadderForCausalLM.from_pretrained(tmp_path / "ladder", base=backbone))


def test_relative_bases_are_found_from_either_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(base, tmp_path / "home" / "mine")
    monkeypatch.chdir(tmp_path / "home")
    LadderForCausalLM.from_pretrained("mine", ladder=SHAPE).save_pretrained("ladder")
    LadderForCausalLM.from_pretrained("ladder")
    shutil.move("mine", "ladder/mine")
    LadderForCausalLM.from_pretrained("ladder")
    monkeypatch.chdir(tmp_path)
    LadderForCausalLM.from_pretrained("home/ladder")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ladder": SHAPE}, "is a saved ladder and has its own shape"),
    ({"weights": "nowhere"}, "weights: found 'nowhere'; allowed are 'resident'"),
    ({"taps": "tape"}, "taps: found 'tape'; allowed are 'device'"),
    ({"tap_dtype": "int4"}, "tap_dtype: found 'int4'"),
    ({"dtype": "int8"}, "dtype: found 'int8'; allowed are 'auto', 'bfloat16'"),
    ({"load_in_4bit": True}, "unknown option 'load_in_4bit'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_options(options: dict[str, Any], message: str, saved: Path):
    with pytest.raises(ConfigError, match=message):
        LadderForCausalLM.from_pretrained(saved, **options)


def test_a_base_for_a_base_is_refused(base: Path):
    with pytest.raises(ConfigError, match="is no saved ladder"):
        LadderForCausalLM.from_pretrained(base, base=base)


def test_missing_folders_and_files(saved: Path):
    with pytest.raises(MissingFileError):
        LadderForCausalLM.from_pretrained(saved.parent / "nothing")
    with pytest.raises(MissingFileError):
        LadderForCausalLM.from_pretrained(saved, base=saved.parent / "nothing")
    (saved / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"model\.safetensors: no such file"):
        LadderForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_truncated_weights_are_refused(keep: int, saved: Path):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or corrupt safetensors") as caught:
        LadderForCausalLM.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_wrong_tensors_are_named(saved: Path):
    path = saved / "model.safetensors"
    weights = load_file(path)
    weights["ladder.extra"] = torch.zeros(2)
    del weights["ladder.entry.down"]
    weights["ladder.output.up"] = torch.zeros(3, 3)
    save_file(weights, path)
    with pytest.raises(
        CheckpointError,
        match=r"ladder\.entry\.down is missing; ladder\.extra is not known; "
        r"ladder\.output\.up has shape \[3, 3\], not \[64, 16\]",
    ):
        LadderForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_configuration_is_refused(text: str, saved: Path):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LadderForCausalLM.from_pretrained(saved)


def test_a_failed_save_leaves_the_old_ladder(
    model: LadderForCausalLM, saved: Path, monkeypatch: pytest.MonkeyPatch
):
    (saved / "notes.txt").write_text("mine")
    newer = shake(LadderForCausalLM.from_backbone(model.backbone, SHAPE), seed=2)

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            newer.save_pretrained(saved)
        with pytest.raises(OSError, match="no space"):
            newer.save_pretrained(saved.parent / "new")
    assert_same(model, LadderForCausalLM.from_pretrained(saved))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["ladder"]
    newer.save_pretrained(saved)
    assert_same(newer, LadderForCausalLM.from_pretrained(saved))
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_save_cut_between_two_renames_is_whole(
    model: LadderForCausalLM, saved: Path, monkeypatch: pytest.MonkeyPatch
):
    newer = LadderForCausalLM.from_backbone(model.backbone, LadderConfig.lst(every=2, reduction=8))
    replace = Path.replace

    def cut(self: Path, target: Path) -> Path:
        if self.name == "config.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            newer.save_pretrained(saved)
    assert_same(newer, LadderForCausalLM.from_pretrained(saved))


def test_where_a_ladder_is_saved(model: LadderForCausalLM, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="found a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ConfigError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    model.save_pretrained(tmp_path / "a" / "b", is_main_process=False)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a" / "b", max_shard_size="1GB")
    assert_same(model, LadderForCausalLM.from_pretrained(tmp_path / "a" / "b"))
