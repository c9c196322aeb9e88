"""The benchmark of memory on a GPU: its settings, its meter and its rival, on the CPU."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch

from bench import gpu_memory, rows

# Weights wait in pinned memory beside a GPU alone.
SETTINGS = {
    name: dataclasses.replace(
        setting, weights="resident", slice_tokens=setting.slice_tokens and 128
    )
    for name, setting in gpu_memory.SETTINGS.items()
}


@pytest.fixture
def shape(tmp_path, tiny_config):
    tiny_config().save_pretrained(tmp_path)
    return str(tmp_path)


def compared(shape, monkeypatch, tmp_path, **options):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    failed = gpu_memory.compare(
        shape, device=torch.device("cpu"), steps=1, settings=SETTINGS, **options
    )
    with (tmp_path / "gpu_memory.csv").open(newline="") as file:
        return failed, list(csv.DictReader(file))


def test_every_setting_trains_and_is_written_down(shape, tmp_path, monkeypatch, capsys):
    failed, found = compared(shape, monkeypatch, tmp_path, contexts=[32, 160])
    assert failed == 0, capsys.readouterr().out
    timed = [(row["candidate"], row["shape"]) for row in found if row["metric"] == "seconds"]
    names = [f"{s}: {ladder}" for s in SETTINGS for ladder in gpu_memory._LADDERS]
    names.append(gpu_memory._RIVAL)
    assert sorted(timed) == sorted(
        (name, f"B=1 S={context} loss on 1 in 1") for name in names for context in (32, 160)
    )
    live = {
        (row["candidate"], row["shape"]): float(row["median"])
        for row in found
        if row["metric"] == "bytes"
    }
    grown = "B=1 S=32..160 loss on 1 in 1"
    for name in names:
        least, most = (
            live[f"{name} [live tensors]", f"B=1 S={context} loss on 1 in 1"]
            for context in (32, 160)
        )
        per_token = live[f"{name} [live tensors, per extra token]", grown]
        assert per_token == round((most - least) / 128) > 0
    # Bytes of an allocator are known on a GPU alone.
    assert not any("allocated" in candidate for candidate, _ in live)
    saved, plain = (
        live[f"{place}: every layer [live tensors]", "B=1 S=160 loss on 1 in 1"]
        for place in ("all on the host", "resident")
    )
    assert saved < plain


def test_a_method_that_does_not_learn_is_not_written_down(shape, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    failed, found = compared(
        shape, monkeypatch, tmp_path, contexts=[32], only=("resident: every t",)
    )
    assert failed == 1
    assert "not timed" in capsys.readouterr().out
    assert found == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says where there is no GPU")
def test_without_a_gpu(capsys):
    assert gpu_memory.main([]) == 0
    assert capsys.readouterr().out.startswith("There is no GPU here, so nothing was measured")
