"""A run from options to a saved ladder, and what stops one early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ladder_kernels import LadderForCausalLM
from ladder_kernels.errors import (
    ConfigError,
    DataError,
    LadderKernelsError,
    MissingFileError,
    OutputExistsError,
)
from ladder_kernels.models.ladder import Ladder
from ladder_kernels.models.native_backbone import NativeBlock
from ladder_kernels.training.data import load_tokenizer, prepare_data
from ladder_kernels.training.evaluation import evaluate_perplexity
from ladder_kernels.training.run import TrainOptions, train

ROWS = [{"prompt": f"count {i} ", "completion": "one two " * (i % 4 + 1)} for i in range(50)]


@pytest.fixture
def options(base: Path, tmp_path: Path, write: Callable[..., Path]) -> TrainOptions:
    return TrainOptions(
        model=str(base),
        output=str(tmp_path / "out"),
        data=str(write("rows.jsonl", ROWS[:40])),
        eval_data=str(write("held_out.jsonl", ROWS[40:])),
        context=48,
        reduction=4,
        max_steps=8,
        logging_steps=2,
        eval_steps=4,
        learning_rate=1e-2,
        device="cpu",
    )


def test_a_run(options: TrainOptions, base: Path):
    result = train(replace(options, report_to="tensorboard"))
    assert result.steps == 8
    assert 0 < result.tokens <= 8 * 48
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 10_000_000
    assert result.base is not None
    assert result.tuned is not None
    assert result.tuned.perplexity < 0.9 * result.base.perplexity
    assert result.tuned.tokens == result.base.tokens

    model = LadderForCausalLM.from_pretrained(result.output)
    tokenizer = load_tokenizer(result.output)
    held_out = options.eval_data_options()
    assert held_out is not None
    rows = prepare_data(held_out, tokenizer, 48)
    assert evaluate_perplexity(model, rows).loss == result.tuned.loss
    assert evaluate_perplexity(model, rows, base=True).loss == result.base.loss
    assert tokenizer.get_vocab() == load_tokenizer(base).get_vocab()

    (file,) = result.output.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    assert {
        "train/loss", "train/learning_rate", "train/tokens_per_second", "train/peak_memory_bytes",
        "eval/loss", "eval/perplexity",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    assert [event.step for event in events.Scalars("eval/loss")] == [4, 8]
    assert events.Scalars("eval/loss")[-1].value == pytest.approx(result.tuned.loss)


def test_activations(options: TrainOptions):
    """They are passed on, saved, and the same when a run goes on."""
    options = replace(options, blocksize=32)
    rounded = replace(options, activations="int8", save_steps=4)
    result = train(rounded)
    exact = train(replace(options, output=f"{options.output}-exact"))
    assert result.base is not None
    assert exact.base is not None
    assert result.base.loss != exact.base.loss
    assert result.base.loss == pytest.approx(exact.base.loss, rel=0.01)
    assert LadderForCausalLM.from_pretrained(result.output).config.activations == "int8"
    assert train(replace(rounded, resume=True)).steps == result.steps
    with pytest.raises(ConfigError, match="found 'exact'; the checkpoint to resume has 'int8'"):
        train(replace(rounded, resume=True, activations=None))


def test_less_memory_changes_no_bit(options: TrainOptions, monkeypatch: pytest.MonkeyPatch):
    """Rungs and layers computed again, and slices of tokens."""
    options = replace(options, reentry=1, adapter_rank=2, batch_size=4, save_steps=4)
    plain = load_file(train(options).output / "model.safetensors")
    small = replace(
        options, output=f"{options.output}-small", gradient_checkpointing=True, slice_tokens=128
    )
    climbs: list[bool] = []
    climb = Ladder.forward

    def noted(ladder: Ladder, *args: Any, recompute: bool = False, **rest: Any) -> torch.Tensor:
        climbs.append(recompute)
        return climb(ladder, *args, recompute=recompute, **rest)

    monkeypatch.setattr(Ladder, "forward", noted)
    parts: list[int] = []
    advance = NativeBlock.advance

    def counted(block: NativeBlock, *args: Any) -> None:
        parts.append(len(args[-1]))
        advance(block, *args)

    monkeypatch.setattr(NativeBlock, "advance", counted)
    found = load_file(train(small).output / "model.safetensors")
    assert climbs.count(True) == 8
    assert max(parts) == 2
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    # A run may go on with other settings of this kind.
    (small.output_folder / "model.safetensors").unlink()
    shutil.rmtree(small.output_folder / "checkpoint-8")
    resumed = train(replace(small, resume=True, gradient_checkpointing=False, slice_tokens=None))
    found = load_file(resumed.output / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_nothing_is_left_to_resume(options: TrainOptions):
    """A run killed after its last checkpoint is finished, not trained further."""
    options = replace(options, save_steps=4)
    weights = load_file(train(options).output / "model.safetensors")
    (options.output_folder / "model.safetensors").unlink()
    resumed = train(replace(options, resume=True))
    assert resumed.steps == 8
    for name, tensor in load_file(resumed.output / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_two_processes_run_as_one(options: TrainOptions, start: Callable[..., Any], tmp_path: Path):
    """The same weights by bits, and the same held-out loss, each process taking its share."""
    # Reported each step: sums over several steps would add the processes' shares in another order.
    options = replace(options, save_steps=8, logging_steps=1)
    one = train(replace(options, gradient_accumulation=2))
    two = replace(options, output=str(tmp_path / "two"))
    start({"options": vars(two)}, processes=2).finish()
    weights = load_file(two.output_folder / "model.safetensors")
    expected = load_file(one.output / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    logs = [
        json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        for folder in (one.output, two.output_folder)
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert theirs.keys() == ours.keys()
        for name in {"loss", "eval_loss", "eval_tokens", "num_input_tokens_seen"} & ours.keys():
            assert theirs[name] == pytest.approx(ours[name], rel=1e-12), name


def test_rows_that_are_not_packed(options: TrainOptions):
    packed = train(options)
    padded = train(
        replace(options, output=options.output + "2", pack=False, batch_size=4, max_steps=10)
    )
    assert padded.base is not None
    assert packed.base is not None
    assert padded.base.tokens == packed.base.tokens
    assert padded.base.loss == pytest.approx(packed.base.loss, rel=1e-6)
    assert padded.train_loss < padded.base.loss


def test_a_saved_ladder_is_trained_further(options: TrainOptions):
    first = train(options)
    again = TrainOptions(
        model=str(first.output), output=options.output + "2", data=options.data, context=48,
        eval_data=options.eval_data, max_steps=8, learning_rate=1e-2, device="cpu",
    )  # fmt: skip
    second = train(again)
    assert first.base is not None
    assert second.base is not None
    assert first.tuned is not None
    assert second.tuned is not None
    assert second.base == replace(first.base, seconds=second.base.seconds)
    assert second.tuned.loss < first.tuned.loss
    with pytest.raises(ConfigError, match=r"reduction: .* is a saved ladder and has its own shape"):
        train(replace(options, model=str(first.output), output=options.output + "3"))


def test_a_used_output_folder_is_not_touched(options: TrainOptions):
    options.output_folder.mkdir()
    note = options.output_folder / "thesis.txt"
    note.write_text("do not lose")
    with pytest.raises(OutputExistsError, match="exists and is not empty; nothing in it was touch"):
        train(options)
    assert [path.name for path in options.output_folder.iterdir()] == ["thesis.txt"]
    assert note.read_text() == "do not lose"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"context": 65}, ConfigError, "context: found 65; .* allows 64 at most"),
        ({"model": "no/such/model/folder"}, MissingFileError, "no/such/model/folder"),
        ({"data": "none.jsonl"}, MissingFileError, "'none.jsonl' does not exist"),
        ({"text_column": "body", "format": "text"}, DataError, "no column 'body'; there are"),
        ({"optimizer": "magic"}, ConfigError, "magic"),
        ({"merge": "magic"}, ConfigError, "ladder.merge: found 'magic'"),
        ({"every": 9}, ConfigError, "ladder.every: found 9; the backbone has 3 layers"),
        ({"weights": "cloud"}, ConfigError, "weights: found 'cloud'"),
        ({"checkpoint": "none", "resume": True}, MissingFileError, "no whole checkpoint"),
    ],
)
def test_bad_options_leave_no_trace(
    change: dict[str, Any], error: type[LadderKernelsError], message: str, options: TrainOptions
):
    with pytest.raises(error, match=message) as caught:
        train(replace(options, **change))
    assert "\n" not in str(caught.value)
    assert not options.output_folder.exists()


def test_a_run_that_fails_leaves_what_was_saved(options: TrainOptions):
    from transformers import TrainerCallback

    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(replace(options, save_steps=4), callbacks=[Fail()])
    checkpoint = options.output_folder / "checkpoint-4"
    LadderForCausalLM.from_pretrained(checkpoint)
    whole = train(replace(options, output=options.output + "2"))
    resumed = train(replace(options, save_steps=4, resume=True))
    one, two = (load_file(r.output / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
