"""Gradients freed as they are applied, and optimizer states of 8 bits."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from safetensors.torch import load_file
from transformers import Adafactor, TrainingArguments

from ladder_kernels import LadderForCausalLM
from ladder_kernels.errors import ConfigError
from ladder_kernels.training.freeing import GradientFreeing
from ladder_kernels.training.run import TrainOptions, train
from ladder_kernels.training.trainer import PerplexityTrainer

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(2))
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "adafactor": lambda groups: Adafactor(groups, lr=1e-2, relative_step=False),
    "8 bits": lambda groups: AdamW8bit(groups, lr=1e-2),
}


def groups_of(model: LadderForCausalLM) -> list[dict[str, Any]]:
    """Two, of which one decays."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "lr": 3e-2},
    ]


def assert_same_state(one: Any, two: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same_state(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        for ours, theirs in zip(one, two, strict=True):
            assert_same_state(ours, theirs)
    else:
        assert one == two


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_weights_and_state_are_those_of_an_ordinary_step(
    name: str, recompute: bool, make_model: Callable[..., LadderForCausalLM]
):
    found = []
    for freed in (False, True):
        model = make_model(reduction=1, merge="gate", reentry=1, adapter_rank=2).train()
        model.gradient_checkpointing = recompute
        optimizer = OPTIMIZERS[name](groups_of(model))
        last = [False]
        freeing = GradientFreeing(optimizer, lambda: last[0]) if freed else None  # noqa: B023
        norms = []
        for step in range(3):
            for micro in range(2):
                last[0] = micro == 1
                ids = IDS.roll(2 * step + micro, dims=1)
                model(ids, labels=ids).loss.backward()
                waiting = [p.grad is not None for p in model.parameters()]
                assert all(waiting) if not (freed and last[0]) else not any(waiting)
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(
                torch.nn.utils.get_total_norm(gradients) if freeing is None else freeing.take_norm()
            )
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 0.5  # as a schedule does
        found.append((model.state_dict(), optimizer.state_dict(), norms))
    (weights, state, norms), (freed_weights, freed_state, freed_norms) = found
    assert_same_state(freed_weights, weights)
    assert_same_state(freed_state, state)
    for ours, theirs in zip(freed_norms, norms, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_few_gradients_exist_at_a_time(make_model: Callable[..., LadderForCausalLM]):
    """Those of one rung: a rung's are all computed before the next rung's are."""
    model = make_model(every=1).train()
    model.gradient_checkpointing = True
    parameters = list(model.parameters())
    most = [0]

    def count(_: torch.Tensor) -> None:
        most[0] = max(most[0], sum(p.grad is not None for p in parameters))

    handles = [p.register_post_accumulate_grad_hook(count) for p in parameters]
    model(IDS, labels=IDS).loss.backward()
    assert most[0] == len(parameters)
    model.zero_grad()
    for handle in handles:
        handle.remove()
    most[0] = 0
    for p in parameters:
        p.register_post_accumulate_grad_hook(count)
    freeing = GradientFreeing(torch.optim.AdamW(parameters), lambda: True)
    model(IDS, labels=IDS).loss.backward()
    assert most[0] == 1
    assert freeing.take_norm() is not None
    assert freeing.take_norm() is None
    freeing.close()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_outlives_its_caller(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = OPTIMIZERS[name]([{"params": [weight]}])
    GradientFreeing(optimizer, lambda: True)
    weight.square().sum().backward()
    assert weight.grad is None
    state = list(tensors_of(optimizer.state[weight]))
    left = [weakref.ref(each) for each in (weight, optimizer, *state)]
    del weight, optimizer, state
    gc.collect()
    assert [each() for each in left] == [None] * len(left)


@pytest.fixture
def options(base: Path, tmp_path: Path, write: Callable[..., Path]) -> TrainOptions:
    rows = [{"prompt": f"count {i} ", "completion": "one two " * (i % 5 + 1)} for i in range(60)]
    return TrainOptions(
        model=str(base),
        output=str(tmp_path / "plain"),
        data=str(write("rows.jsonl", rows)),
        context=48,
        every=1,
        reduction=1,
        max_steps=8,
        gradient_accumulation=2,
        save_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0,
        device="cpu",
    )


def logs_of(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit"])
def test_a_run_and_its_resumption(options: TrainOptions, optimizer: str, tmp_path: Path):
    plain = replace(options, optimizer=optimizer)
    train(plain)
    freed = replace(
        plain, output=str(tmp_path / "freed"), free_gradients=True, gradient_checkpointing=True
    )
    train(freed)
    wanted = load_file(plain.output_folder / "model.safetensors")
    assert_same_state(load_file(freed.output_folder / "model.safetensors"), wanted)
    for ours, theirs in zip(
        logs_of(freed.output_folder), logs_of(plain.output_folder), strict=True
    ):
        for name in ("loss", "learning_rate"):
            assert ours[name] == theirs[name]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["grad_norm"] > 0
    state, theirs = (
        torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)
        for folder in (freed.output_folder, plain.output_folder)
    )
    assert_same_state(state, theirs)

    shutil.rmtree(freed.output_folder / "checkpoint-8")
    (freed.output_folder / "model.safetensors").unlink()
    train(replace(freed, resume=True))
    assert_same_state(load_file(freed.output_folder / "model.safetensors"), wanted)


def test_states_of_8_bits_learn_as_others_do(options: TrainOptions, tmp_path: Path):
    exact = train(options)
    small = train(replace(options, output=str(tmp_path / "small"), optimizer="adamw_8bit"))
    assert small.train_loss != exact.train_loss
    assert small.train_loss == pytest.approx(exact.train_loss, rel=0.02)
    saved = torch.load(tmp_path / "small" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    sizes = [w.numel() for w in load_file(small.output / "model.safetensors").values()]
    # bitsandbytes leaves small weights their float32 states.
    of_8_bits = sum(size for size in sizes if size >= 4096)
    assert of_8_bits > 0.9 * sum(sizes)
    numbers = [tensor for tensor in tensors_of(saved["state"]) if tensor.dtype == torch.uint8]
    assert sum(tensor.numel() for tensor in numbers) == 2 * of_8_bits


def test_without_bitsandbytes_8_bits_are_refused_at_once(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(ConfigError, match="optimizer: adamw_8bit needs bitsandbytes, which is not"):
        train(replace(options, optimizer="adamw_8bit", model="nowhere"))
    assert not options.output_folder.exists()


def test_a_trainer_may_train_again(
    make_model: Callable[..., LadderForCausalLM], packed: datasets.Dataset, tmp_path: Path
):
    """What steps during backward passes is there during ``train`` only, and only once."""
    found = []
    for freed in (False, True):
        model = make_model()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = PerplexityTrainer(
            model=model, args=arguments, train_dataset=packed, free_gradients=freed
        )
        for _ in range(2):
            trainer.train()
            model(IDS, labels=IDS).loss.backward()
            assert all(p.grad is not None for p in model.parameters())
            model.zero_grad()
        found.append(model.state_dict())
    assert_same_state(found[1], found[0])


def test_what_needs_all_gradients_at_once_is_refused(
    make_model: Callable[..., LadderForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def make(**options: Any) -> PerplexityTrainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", **options
        )
        return PerplexityTrainer(model=make_model(), args=arguments, free_gradients=True)

    assert make(max_grad_norm=0.0)
    with pytest.raises(ConfigError, match=r"with max_grad_norm 1\.0, .*; allowed is max_grad_norm"):
        make()
    with pytest.raises(ConfigError, match="with fp16, whose scaling needs all"):
        make(max_grad_norm=0.0, fp16=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ConfigError, match="on 2 processes, which average"):
        make(max_grad_norm=0.0)
