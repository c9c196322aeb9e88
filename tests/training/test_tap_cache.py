"""Runs whose taps wait elsewhere: the same losses and weights, by bits, whatever happens."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import BaseMismatchError
from ladder_kernels.memory.taps import TapWarning
from ladder_kernels.models.frozen_pass import Work
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.training.run import TrainOptions, newest_checkpoint, train
from ladder_kernels.training.trainer import PerplexityTrainer

ROWS = [
    {"prompt": f"count {i} ", "completion": f"{i} two {i + 1} four " * (i % 3 + 4)}
    for i in range(12)
]


@pytest.fixture
def options(base: Path, tmp_path: Path, write: Callable[..., Path]) -> TrainOptions:
    return TrainOptions(
        model=str(base),
        output=str(tmp_path / "plain"),
        data=str(write("rows.jsonl", ROWS)),
        context=48,
        reduction=4,
        kind="lst",
        epochs=3,
        batch_size=2,
        gradient_accumulation=2,
        logging_steps=1,
        learning_rate=1e-2,
        save_steps=2,
        tap_dtype="float32",
        device="cpu",
    )


@pytest.fixture
def sequences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each frozen pass of a training step ran."""
    ran: list[int] = []
    run = NativeBackbone._run

    def counted(this: NativeBackbone, works: Sequence[Work], stop: int) -> None:
        ran.append(sum(len(work.tokens) for work in works))
        run(this, works, stop)

    monkeypatch.setattr(NativeBackbone, "_run", counted)
    return ran


def outcome(options: TrainOptions) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss of each step, and the trained weights."""
    checkpoint = newest_checkpoint(options.output)
    assert checkpoint is not None
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses, load_file(options.output_folder / "model.safetensors")


def assert_same_run(one: TrainOptions, two: TrainOptions) -> None:
    losses, weights = outcome(one)
    others, other = outcome(two)
    assert losses == others
    assert weights.keys() == other.keys()
    for name in weights:
        assert torch.equal(weights[name], other[name]), name


@pytest.mark.parametrize("pack", [True, False])
def test_epochs_after_the_first_run_no_frozen_pass(
    pack: bool, options: TrainOptions, sequences: list[int], tmp_path: Path
):
    options = replace(options, pack=pack)
    train(options)
    rows = sum(sequences) // 3
    sequences.clear()
    cached = replace(
        options, output=str(tmp_path / "disk"), taps="disk", tap_cache=str(tmp_path / "cache")
    )
    train(cached)
    assert sum(sequences) == rows
    assert_same_run(options, cached)
    assert len(list((tmp_path / "cache").glob("*.taps"))) == rows
    # Another run finds them there.
    sequences.clear()
    again = replace(cached, output=str(tmp_path / "again"))
    train(again)
    assert sequences == []
    assert_same_run(options, again)


def test_a_cache_of_the_run_alone_goes_with_it(options: TrainOptions, tmp_path: Path):
    cached = replace(options, taps="disk", max_steps=2)
    train(cached)
    assert (cached.output_folder / "model.safetensors").is_file()
    assert not (cached.output_folder / "taps").exists()


def test_another_base_is_refused_before_training(options: TrainOptions, tmp_path: Path):
    cached = replace(options, taps="disk", tap_cache=str(tmp_path / "cache"), max_steps=1)
    train(cached)
    other = replace(cached, output=str(tmp_path / "other"), blocksize=32)
    with pytest.raises(BaseMismatchError, match=r"cache: found the taps of .* a folder of its own"):
        train(other)
    assert not other.output_folder.exists()


def test_a_full_disk_is_said_once_and_training_goes_on(options: TrainOptions, tmp_path: Path):
    """Under a limit on files that the ladder keeps, and the taps of a sequence do not."""
    options = replace(options, context=64, reduction=8, block="mlp", save_steps=None)
    plain = train(options)
    sizes = [path.stat().st_size for path in options.output_folder.rglob("*")]
    a_sequence = 4 * 64 * 64 * 4
    assert max(sizes) < 0.9 * a_sequence
    cached = replace(
        options, output=str(tmp_path / "disk"), taps="disk", tap_cache=str(tmp_path / "cache")
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_FSIZE, (a_sequence, hard))
        try:
            result = train(cached)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ours = [str(each.message) for each in said if each.category is TapWarning]
    assert len(ours) == 1
    assert "File too large); training goes on" in ours[0]
    assert result.train_loss == plain.train_loss
    one, two = (load_file(o.output_folder / "model.safetensors") for o in (options, cached))
    for name in one:
        assert torch.equal(one[name], two[name]), name


def kill_while_writing(worker: Any, folder: Path) -> None:
    """Stop a process again and again until a file is found half written, and kill it then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.0005)
        if not any(folder.glob("*.part")):
            continue
        os.kill(worker.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED | os.WNOWAIT)
        if any(folder.glob("*.part")) and len(list(folder.glob("*.taps"))) >= 2:
            worker.kill()
            return
        os.kill(worker.process.pid, signal.SIGCONT)
    raise AssertionError(worker.errors.read_text())


def test_killed_while_writing_taps_and_resumed(
    options: TrainOptions, start: Callable[..., Any], tmp_path: Path
):
    options = replace(options, batch_size=1, gradient_accumulation=1, save_steps=1, epochs=2)
    train(options)
    cache = tmp_path / "cut" / "taps"
    cut = replace(options, output=str(tmp_path / "cut"), taps="disk")
    worker = start({"options": vars(cut)})
    kill_while_writing(worker, cache)
    assert any(cache.glob("*.part"))
    assert newest_checkpoint(cut.output) is not None

    start({"options": vars(replace(cut, resume=True))}).finish()
    assert_same_run(options, cut)
    assert not cache.exists()


def test_micro_batches_share_a_frozen_pass_when_weights_are_read_anew(
    base: Path, packed: datasets.Dataset, sequences: list[int], tmp_path: Path
):
    """One pass an optimizer step, whatever is left for the last one; weights the same by bits."""
    load_backbone(base).save_pretrained(tmp_path / "nf4")
    found = []
    for weights in ("resident", "streamed"):
        model = LadderForCausalLM.from_pretrained(
            tmp_path / "nf4",
            ladder=LadderConfig.lst(reduction=4),
            weights=weights,
            tap_dtype="float32",
        )
        trainer = PerplexityTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / weights), per_device_train_batch_size=1,
                num_train_epochs=1, gradient_accumulation_steps=4, learning_rate=1e-2,
                logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=packed.select(range(10)),
        )  # fmt: skip
        sequences.clear()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, {name: p.detach() for name, p in model.named_parameters()}))
        assert sequences == ([4, 4, 2] if weights == "streamed" else [1] * 10)
    assert found[0][0] == found[1][0]
    for name, weight in found[0][1].items():
        assert torch.equal(weight, found[1][1][name]), name
