"""Everything that saves memory at once: a run whose weights are those of an ordinary one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ladder_kernels.training.run import TrainOptions, train

SMALL: dict[str, Any] = {
    "weights": "streamed",
    "gradient_checkpointing": True,
    "slice_tokens": 128,
    "free_gradients": True,
}
LADDERS: dict[str, dict[str, Any]] = {
    "lst": {"every": 1, "reduction": 1},
    "re-entry": {"every": 1, "reentry": 1, "adapter_rank": 2, "merge": "gate"},
    "two_taps": {"kind": "explicit", "rungs": ((1,), (1, 2, 3), ())},
}


@pytest.fixture
def options(packed_base: Path, tmp_path: Path, write: Callable[..., Path]) -> TrainOptions:
    rows = [{"prompt": f"count {i} ", "completion": "one two " * (i % 5 + 1)} for i in range(60)]
    return TrainOptions(
        model=str(packed_base),
        output=str(tmp_path / "plain"),
        data=str(write("rows.jsonl", rows)),
        context=48,
        batch_size=4,
        gradient_accumulation=2,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        max_grad_norm=0,
        optimizer="adamw_8bit",
        device="cpu",
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("ladder", "taps"),
    [("lst", "host"), ("lst", "disk"), ("re-entry", "disk"), ("two_taps", "host")],
)
def test_a_run_and_its_resumption(options: TrainOptions, ladder: str, taps: str, tmp_path: Path):
    options = replace(options, **LADDERS[ladder])
    wanted = weights_of(train(options).output)
    small = replace(options, output=str(tmp_path / "small"), taps=taps, **SMALL)
    found = weights_of(train(small).output)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    shutil.rmtree(small.output_folder / "checkpoint-4")
    (small.output_folder / "model.safetensors").unlink()
    found = weights_of(train(replace(small, resume=True)).output)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
