"""transformers' own Trainer drives a ladder: accumulation, processes, precision, reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from ladder_kernels import LadderForCausalLM
from ladder_kernels.training.callbacks import ThroughputCallback

Weights = dict[str, torch.Tensor]


def learned(row: dict[str, list[int]]) -> int:
    return sum(label != -100 for label in row["labels"][1:])


def assert_same_bits(one: Weights, two: Weights) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_close(one: Weights, two: Weights, tolerance: float) -> None:
    """Largest difference, relative to how large the weights are."""
    assert one.keys() == two.keys()
    for name in one:
        difference = (one[name] - two[name]).abs().max()
        assert difference <= tolerance * max(float(two[name].abs().max()), 1e-2), name


@pytest.fixture
def uneven(packed: datasets.Dataset) -> datasets.Dataset:
    """Rows whose numbers of learned tokens differ widely, from neighbour to neighbour."""
    order = sorted(range(len(packed)), key=lambda i: learned(packed[i]))
    half = len(order) // 2
    pairs = [i for pair in zip(order[:half], order[::-1][:half], strict=True) for i in pair]
    return packed.select(pairs[:24])


def test_the_first_loss_is_the_mean_over_learned_tokens(
    base: Path, uneven: datasets.Dataset, plain: Callable[..., Any], tmp_path: Path, make_model: Any
):
    """Not the mean over rows or micro-batches, whatever their numbers of learned tokens."""
    losses, _, _ = plain(
        base, uneven.select(range(4)), tmp_path, max_steps=1, gradient_accumulation_steps=4
    )
    model = make_model().train()
    sums, counts = [], []
    for row in uneven.select(range(4)):
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        sums.append(model(**batch, num_items_in_batch=1).loss.item())
        counts.append(learned(row))
    assert min(counts) < max(counts) / 2
    assert losses[0] == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    mean_of_means = sum(s / c for s, c in zip(sums, counts, strict=True)) / 4
    assert abs(losses[0] - mean_of_means) > 1e-3


def test_accumulation_equals_the_larger_batch(
    base: Path, uneven: datasets.Dataset, plain: Callable[..., Any], tmp_path: Path
):
    """Up to rounding: one matrix product over all tokens sums in another order than several.

    AdamW turns a rounding error of a gradient near zero into a whole step, so weights are compared
    with plain SGD.
    """
    options = {"optim": "sgd", "max_steps": 6}
    one, weights, _ = plain(base, uneven, tmp_path / "1", per_device_train_batch_size=4, **options)
    two, accumulated, _ = plain(
        base, uneven, tmp_path / "2", gradient_accumulation_steps=4, **options
    )
    assert two == pytest.approx(one, rel=2e-6)
    assert_close(accumulated, weights, 1e-5)


def test_two_processes_equal_one(
    base: Path,
    uneven: datasets.Dataset,
    plain: Callable[..., Any],
    start: Callable[..., Any],
    tmp_path: Path,
):
    """By bits, accumulating the same micro-batches; up to rounding, with twice the batch.

    Two processes add two gradients, as accumulation does; doubling each (the Trainer's scale of the
    loss) and halving it (the average over processes) is exact. A batch of two rows adds their
    tokens inside a matrix product, in another order.
    """
    rows = tmp_path / "rows"
    uneven.save_to_disk(rows)
    runs = {}
    for optimizer in ("adamw_torch_fused", "sgd"):
        spec = {
            "base": str(base), "rows": str(rows), "output": str(tmp_path / optimizer),
            "arguments": {"optim": optimizer},
        }  # fmt: skip
        start(spec, processes=2).finish()
        report = json.loads((tmp_path / optimizer / "report.json").read_text())
        assert report["processes"] == 2
        runs[optimizer] = (
            report["losses"],
            load_file(tmp_path / optimizer / "weights.safetensors"),
        )
        losses, weights, _ = plain(
            base, uneven, tmp_path / "one", gradient_accumulation_steps=2, optim=optimizer
        )
        assert runs[optimizer][0] == losses
        assert_same_bits(runs[optimizer][1], weights)
    losses, weights, _ = plain(
        base, uneven, tmp_path / "two", per_device_train_batch_size=2, optim="sgd"
    )
    assert runs["sgd"][0] == pytest.approx(losses, rel=2e-6)
    assert_close(runs["sgd"][1], weights, 1e-5)


def test_a_row_without_anything_to_learn_changes_nothing(make_model: Callable[..., Any]):
    """Its loss is 0 and its gradients are there, as processes that wait for them need."""
    model = make_model().train()
    ids = torch.randint(3, 300, (1, 16))
    out = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(0))
    assert out.loss.item() == 0.0
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_same_seed_same_bits(
    base: Path, packed: datasets.Dataset, plain: Callable[..., Any], tmp_path: Path
):
    one, weights, _ = plain(base, packed, tmp_path / "1")
    two, again, _ = plain(base, packed, tmp_path / "2")
    assert one == two
    assert_same_bits(weights, again)


def test_bfloat16_autocast(
    base: Path, packed: datasets.Dataset, plain: Callable[..., Any], tmp_path: Path
):
    exact, _, _ = plain(base, packed, tmp_path / "1", max_steps=10)
    losses, weights, _ = plain(base, packed, tmp_path / "2", max_steps=10, bf16=True)
    assert losses != exact
    assert losses == pytest.approx(exact, rel=1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_checkpoints_hold_the_ladder_only(
    base: Path, packed: datasets.Dataset, plain: Callable[..., Any], tmp_path: Path
):
    _, weights, trainer = plain(base, packed, tmp_path, save_strategy="steps", save_steps=3)
    folder = tmp_path / "checkpoint-6"
    saved = load_file(folder / "model.safetensors")
    assert_same_bits(saved, weights)
    assert all(name.startswith("ladder.") for name in saved)
    size = (folder / "model.safetensors").stat().st_size
    assert size < 4 * trainer.model.num_parameters(only_trainable=True) + 20_000

    ids = torch.tensor([packed[0]["input_ids"]])
    expected = trainer.model.eval()(ids).logits
    for loaded in (
        LadderForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    ):
        assert torch.equal(loaded(ids).logits, expected)


def test_evaluation_during_training(
    base: Path, packed: datasets.Dataset, make_model: Callable[..., Any], tmp_path: Path
):
    held_out = packed.select(range(40, 50))
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=packed.select(range(40)),
        eval_dataset=held_out,
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(found) == 3
    assert first != found[0] != found[1] != found[2]


def test_metrics_of_the_predictions(packed: datasets.Dataset, make_model: Any, tmp_path: Path):
    """With ``return_logits`` a Trainer's ``compute_metrics`` sees logits."""
    model = make_model()
    model.config.return_logits = True

    def accuracy(prediction: Any) -> dict[str, float]:
        guesses = prediction.predictions.argmax(-1)[:, :-1]
        labels = prediction.label_ids[:, 1:]
        return {"accuracy": float((guesses == labels)[labels != -100].mean())}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True
        ),
        eval_dataset=packed.select(range(6)),
        compute_metrics=accuracy,
    )
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


class Watch(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_tensorboard_holds_our_metrics(
    packed: datasets.Dataset, make_model: Callable[..., Any], tmp_path: Path
):
    watch, throughput = Watch(), ThroughputCallback()
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            logging_steps=2,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=packed,
        eval_dataset=packed.select(range(4)),
        callbacks=[throughput, TensorBoardCallback(), watch],
    )
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    for name in ("loss", "learning_rate", "tokens_per_second", "peak_memory_bytes"):
        scalars = events.Scalars(f"train/{name}")
        assert [event.step for event in scalars] == [2, 4, 6]
        logged = [logs[name] for logs in watch.logs if "loss" in logs]
        assert [event.value for event in scalars] == pytest.approx(logged, rel=1e-6)
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 6]
    assert watch.logs[0]["peak_memory_bytes"] > 10_000_000
