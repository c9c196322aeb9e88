"""Training on weights that are read from their file layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ladder_kernels.errors import CheckpointError
from ladder_kernels.memory.streaming import LayerFiles
from ladder_kernels.memory.tensor_file import TensorFile
from ladder_kernels.training.run import TrainOptions, newest_checkpoint, train


@pytest.fixture
def options(packed_base: Path, tmp_path: Path, write: Callable[..., Path]) -> TrainOptions:
    rows = [{"prompt": f"count {i} ", "completion": "one two " * (i % 5 + 1)} for i in range(60)]
    return TrainOptions(
        model=str(packed_base),
        output=str(tmp_path / "resident"),
        data=str(write("rows.jsonl", rows)),
        context=48,
        kind="lst",
        reduction=4,
        max_steps=4,
        gradient_accumulation=3,
        save_steps=2,
        learning_rate=1e-2,
        device="cpu",
    )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were read, in order."""
    layers: list[int] = []
    original = LayerFiles.read

    def counted(self: LayerFiles, layer: int, memory: torch.Tensor) -> None:
        layers.append(layer)
        original(self, layer, memory)

    monkeypatch.setattr(LayerFiles, "read", counted)
    return layers


def assert_same_weights(one: TrainOptions, two: TrainOptions) -> None:
    left, right = (load_file(each.output_folder / "model.safetensors") for each in (one, two))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_each_weight_is_read_once_a_step(
    options: TrainOptions, read: list[int], tmp_path: Path
) -> None:
    """Or not at all, however many micro-batches there are; the same bits, after a resume too."""
    train(options)
    assert read == []
    streamed = replace(options, weights="streamed", output=str(tmp_path / "streamed"))
    train(streamed)
    # Of three layers, the one in the middle has its slot for itself.
    assert read == [0, 1, 2] + [0, 2] * 3
    assert_same_weights(streamed, options)

    resumed = replace(
        streamed,
        output=str(tmp_path / "resumed"),
        resume=True,
        checkpoint=str(streamed.output_folder / "checkpoint-2"),
    )
    read.clear()
    train(resumed)
    assert read == [0, 1, 2, 0, 2]
    assert_same_weights(resumed, options)


def test_a_damaged_weight_stops_the_first_step(
    options: TrainOptions, packed_base: Path, tmp_path: Path, read: list[int]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in packed_base.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    path = own / "model.safetensors"
    entry = TensorFile(path).entries["model.layers.1.mlp.down_proj.weight"]
    content = bytearray(path.read_bytes())
    content[entry.offset] ^= 1
    path.write_bytes(content)
    damaged = replace(options, model=str(own), weights="streamed", output=str(tmp_path / "out"))
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' in .* is"
    ):
        train(damaged)
    assert newest_checkpoint(damaged.output) is None
    assert read[-1] in (1, 2)
