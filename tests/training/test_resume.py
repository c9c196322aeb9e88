"""A run that is killed and resumed ends where an uninterrupted one ends, by bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

from ladder_kernels import LadderForCausalLM
from ladder_kernels.errors import ConfigError, MissingFileError
from ladder_kernels.training.run import TrainOptions, newest_checkpoint, train

STEPS = 20


@pytest.fixture
def options(base: Path, tmp_path: Path, write: Callable[..., Path]) -> TrainOptions:
    rows = [{"prompt": f"count {i} ", "completion": "one two " * (i % 5 + 1)} for i in range(60)]
    return TrainOptions(
        model=str(base),
        output=str(tmp_path / "whole"),
        data=str(write("rows.jsonl", rows)),
        context=48,
        reduction=4,
        max_steps=STEPS,
        gradient_accumulation=2,
        save_steps=5,
        logging_steps=1,
        learning_rate=1e-2,
        device="cpu",
    )


def losses(folder: Path, step: int = STEPS) -> list[float]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_killed_and_resumed_equals_uninterrupted_by_bits(
    options: TrainOptions, start: Callable[..., Any], tmp_path: Path
):
    train(options)
    cut = replace(options, output=str(tmp_path / "cut"))
    worker = start({"options": vars(cut), "hang_at": 13})
    worker.wait_for("reached")
    worker.kill()
    assert newest_checkpoint(cut.output) == cut.output_folder / "checkpoint-10"
    assert not (cut.output_folder / "model.safetensors").exists()

    start({"options": vars(replace(cut, resume=True))}).finish()
    assert len(losses(options.output_folder)) == STEPS
    assert losses(cut.output_folder) == losses(options.output_folder)
    one, two = (load_file(o.output_folder / "model.safetensors") for o in (options, cut))
    assert_same_bits(one, two)
    start_weights = LadderForCausalLM.from_pretrained(
        options.model, ladder=options.ladder_config()
    ).state_dict()
    assert not torch.equal(one["ladder.entry.down"], start_weights["ladder.entry.down"])


def test_a_plain_trainer_resumes_by_bits(
    base: Path, packed: datasets.Dataset, plain: Callable[..., Any], tmp_path: Path
):
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole, weights, _ = plain(base, packed, tmp_path / "run", **saving)
    again, resumed, _ = plain(
        base, packed, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-3"), **saving
    )
    assert again == whole
    assert_same_bits(weights, resumed)


def test_resume_goes_past_a_checkpoint_that_was_cut_short(options: TrainOptions, tmp_path: Path):
    train(options)
    folder = options.output_folder
    whole = load_file(folder / "model.safetensors")
    (folder / "checkpoint-20" / "trainer_state.json").unlink()
    state = folder / "checkpoint-15" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert newest_checkpoint(folder) == folder / "checkpoint-10"
    result = train(replace(options, resume=True))
    assert result.steps == STEPS
    assert_same_bits(load_file(folder / "model.safetensors"), whole)


def test_a_named_checkpoint_is_resumed(options: TrainOptions):
    train(options)
    folder = options.output_folder
    whole = load_file(folder / "model.safetensors")
    shutil.rmtree(folder / "checkpoint-15")
    train(replace(options, resume=True, checkpoint=str(folder / "checkpoint-5")))
    assert (folder / "checkpoint-15").is_dir()
    assert_same_bits(load_file(folder / "model.safetensors"), whole)


def test_what_cannot_be_resumed_is_refused(options: TrainOptions, tmp_path: Path):
    with pytest.raises(MissingFileError, match="no whole checkpoint"):
        train(replace(options, resume=True))
    train(replace(options, max_steps=5))
    with pytest.raises(ConfigError, match=r"reduction: found 8; the checkpoint .* has 4"):
        train(replace(options, resume=True, reduction=8))
    with pytest.raises(MissingFileError, match="no whole checkpoint"):
        train(replace(options, resume=True, checkpoint=str(tmp_path / "none")))
