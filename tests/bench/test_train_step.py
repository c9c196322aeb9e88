"""The train-step bench: its methods are equal in what they train, learn, and are written down."""

from __future__ import annotations

import csv
import itertools
import sys
from dataclasses import replace

import pytest
import torch

from bench import rows, train_step, train_worker
from bench.hold import held, held_suffix
from bench.methods import METHODS, Trainee, Work, fitted, parameters_of_qlora
from bench.qlora import UnavailableError
from bench.random_weights import random_backbone
from bench.train_worker import MOMENTS, Found, Task
from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.memory.tracing import fake_cuda
from ladder_kernels.models.loading import backbone_from_config


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("base") / "base"
    backbone = random_backbone(
        tiny_config(tie_word_embeddings=True), device="cpu", dtype=torch.float32
    )
    backbone.save_pretrained(folder)
    return folder


@pytest.fixture
def task(base):
    return Task(method="ladder", base=str(base), dtype="float32", rank=16, context=48, seconds=0.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_as_much_and_learns(task, base, name):
    task = replace(task, method=name, answers=(1, 4), at_least=2)
    work = Work(base=base, dtype=torch.float32, rank=16, device=torch.device("cpu"))
    found = train_worker.run(task)
    assert found.fits
    if found.refused:
        pytest.skip(found.refused)
    wanted = parameters_of_qlora(work)
    assert abs(found.trained - wanted) <= 0.1 * wanted
    assert [len(steps) for steps in found.steps] == [2, 2]
    assert all(len(phases) == 3 for steps in found.steps for phases in steps)
    assert found.losses[0][-1] < found.losses[0][0]
    found = train_worker.run(replace(task, memory=True))
    assert not found.steps
    memory = found.memory
    assert memory["live at the peak"] == memory["weights"] + memory["live beyond the weights"]
    assert memory["live beyond the weights"] > 0
    assert {len(numbers) for numbers in found.timeline.values()} == {MOMENTS + 1}
    totals = [sum(moment) for moment in zip(*found.timeline.values(), strict=True)]
    assert max(totals) == memory["live at the peak"]


def test_qlora_has_peft_s_number_of_parameters(task):
    found = train_worker.run(replace(task, method="QLoRA"))
    work = Work(base=task.base, dtype=torch.float32, rank=task.rank, device=torch.device("cpu"))
    assert found.trained == parameters_of_qlora(work)


def test_checkpointing_takes_less(task):
    peaks = {
        name: train_worker.run(replace(task, method=name, memory=True, context=256)).memory
        for name in ("QLoRA", "QLoRA, checkpointed")
    }
    live = {name: memory["live beyond the weights"] for name, memory in peaks.items()}
    assert live["QLoRA, checkpointed"] < 0.8 * live["QLoRA"]


def test_a_method_that_does_not_learn_is_refused(task, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(RuntimeError, match=r"the loss went from .*; not timed"):
        train_worker.run(task)


def test_steps_go_on_until_it_can_be_told_whether_a_method_learns(task, monkeypatch):
    step = torch.optim.AdamW.step
    calls = itertools.count()
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: step(self) if next(calls) >= 2 else None
    )
    found = train_worker.run(task)
    assert found.losses[0][0] == found.losses[0][2] > found.losses[0][3]
    assert len(found.steps[0]) == 3


def test_sizes_are_fitted():
    assert fitted(lambda size: 10 * size, 104) == 10
    assert fitted(lambda size: 10 * size, 120, step=4) == 12
    with pytest.raises(ValueError, match="the nearest sizes, 4 and 8, train 400 and 800"):
        fitted(lambda size: 100 * size, 600, step=4)


def test_turns_rows_and_a_table(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    tasks = {"ladder": replace(task, memory=True, answers=(1, 2))}
    measured = train_step.compare(tasks, turns=2, environment=held("avx2"))
    assert len(measured["ladder"].steps[1]) == 2
    suffix = held_suffix("avx2")
    found = list(
        train_step.rows_of("ladder", tasks["ladder"], measured["ladder"], model="m", suffix=suffix)
    )
    found += train_step.timeline_rows("ladder", tasks["ladder"], measured["ladder"], model="m")
    rows.report(found, "train_step.csv", *train_step.table_of(task, measured))
    assert "| ladder | 0." in capsys.readouterr().out
    with (tmp_path / "train_step.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    by_metric = {(row["shape"], row["metric"]): row for row in written}
    assert len(by_metric) == len(written)
    every, half = (f"B=1 S=48 loss on 1 in {answers}" for answers in (1, 2))
    phases = [f"seconds: {phase}" for phase in ("forward", "backward", "optimizer")]
    for shape in (every, half):
        total = float(by_metric[shape, "seconds"]["median"])
        parts = sum(float(by_metric[shape, phase]["median"]) for phase in phases)
        assert total == pytest.approx(parts, rel=0.5)
        assert by_metric[shape, "seconds"]["device"].endswith(", held to AVX2")
    assert (every, "bytes: resident") in by_metric
    assert (half, "bytes: resident") not in by_metric
    assert (every, f"bytes: live ladder at {MOMENTS}/{MOMENTS} of the step") in by_metric


def test_memory_alone(task):
    measured = train_step.compare({"ladder": replace(task, memory=True)}, turns=0)
    metrics = {
        row.metric for row in train_step.rows_of("ladder", task, measured["ladder"], model="m")
    }
    assert "bytes: live beyond the weights" in metrics
    assert "seconds" not in metrics
    header, (line,) = train_step.table_of(task, measured)
    cells = dict(zip(header, line, strict=True))
    assert cells["tokens/s, loss on 1 in 1"] == ""
    assert cells["live beyond the weights"].endswith(" MB")


def test_seconds_alone(task):
    measured = train_step.compare({"ladder": task}, turns=1)
    header, (line,) = train_step.table_of(task, measured)
    cells = dict(zip(header, line, strict=True))
    assert float(cells["tokens/s, loss on 1 in 1"].replace(",", "")) > 0
    assert cells["live beyond the weights"] == cells["resident"] == ""


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_what_does_not_fit_has_a_row(task, capsys):
    tasks = {"QLoRA": replace(task, method="QLoRA", context=4096, limit=100 << 20)}
    measured = train_step.compare(tasks, turns=2)["QLoRA"]
    assert measured.limit == 100 << 20
    (row,) = train_step.rows_of("QLoRA", tasks["QLoRA"], measured, model="m")
    assert (row.metric, row.median) == ("bytes: limit that did not suffice", 100 << 20)
    out = capsys.readouterr().out
    assert out.count("QLoRA: does not fit into 0.1 GB") == 1  # and is not tried again


def test_what_cannot_run_has_a_row(task, monkeypatch):
    def refuse(work):
        raise UnavailableError("it needs a GPU")

    monkeypatch.setitem(METHODS, "ladder", refuse)
    found = train_worker.run(task)
    assert found == Found(refused="it needs a GPU")
    measured = train_step.Measured()
    measured.add(task, found)
    (row,) = train_step.rows_of("ladder", task, measured, model="m")
    assert (row.metric, row.median) == ("not run", 0)
    assert train_step.table_of(task, {"ladder": measured})[1][0][0] == (
        "ladder: not run: it needs a GPU"
    )


def test_a_process_that_fails_is_told(task, capfd):
    tasks = {"ladder": replace(task, base="/nowhere"), "QLoRA": replace(task, method="QLoRA")}
    measured = train_step.compare(tasks, turns=1)
    assert measured["ladder"].failed
    assert not list(train_step.rows_of("ladder", task, measured["ladder"], model="m"))
    assert not measured["QLoRA"].failed
    out, err = capfd.readouterr()
    assert "ladder: failed" in out
    assert "/nowhere" in err


def test_a_step_on_a_gpu_that_is_not_there(tiny_config):
    with fake_cuda() as device:
        backbone = backbone_from_config(tiny_config(), device=device, dtype=torch.bfloat16)
        model = LadderForCausalLM.from_backbone(backbone, LadderConfig.lst(every=1)).train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], fused=True
        )
        trainee = Trainee(model=model, optimizer=optimizer, autocast=True)
        ids = torch.zeros(1, 32, dtype=torch.long, device=device)
        losses: list[torch.Tensor] = []
        train_worker.take_step(trainee, {"input_ids": ids, "labels": ids}, losses)
    assert losses[0].device.type == "cuda"
    assert optimizer.state


def test_its_help_can_be_read(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_step.main(["--help"])
    assert "--context" in capsys.readouterr().out
