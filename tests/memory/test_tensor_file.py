"""Files of tensors: any reader of safetensors reads ours, and ours reads any writer's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ladder_kernels.errors import CheckpointError, MissingFileError
from ladder_kernels.memory.ledger import is_file_mapped
from ladder_kernels.memory.tensor_file import TensorFile, TensorFileWriter
from ladder_kernels.models.fingerprint import digest_float, digest_nf4
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.nf4.checkpoint import from_state_dict, to_state_dict


def write(path: Path, weights: dict[str, Any]) -> TensorFile:
    with TensorFileWriter(path, weights) as writer:
        for name, weight in weights.items():
            writer.add(name, weight)
    return TensorFile(path)


def same_weight(a: NF4Weight, b: NF4Weight) -> bool:
    left, right = a.tensors(), b.tensors()
    alike = (a.shape, a.blocksize, a.dtype) == (b.shape, b.blocksize, b.dtype)
    return alike and left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 70)), min_size=1, max_size=5),
    kinds=st.lists(st.sampled_from(["nf4", "single", "F32", "BF16", "F16", "F64"]), min_size=5),
)
@settings(max_examples=30, deadline=None)
def test_both_readers_give_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[Any], kinds: list[str]
) -> None:
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.half, "F64": torch.double}
    weights: dict[str, Any] = {}
    for index, (shape, kind) in enumerate(zip(shapes, kinds, strict=False)):
        value = torch.randn(shape)
        name = f'layer "{index}" – 🪜.weight'
        if kind in dtypes:
            weights[name] = value.to(dtypes[kind])
        else:
            weights[name] = quantize_nf4(value, 32, kind == "nf4")
    file = write(path, weights)
    theirs = load_file(path)
    assert theirs.keys() == file.entries.keys()
    for key, tensor in theirs.items():
        entry, ours = file.entries[key], file.mapped(key)
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)
        assert entry.offset % tensor.itemsize == 0
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor):
            assert torch.equal(theirs[name], weight)
            assert file.digests[name] == digest_float(weight)
        else:
            assert same_weight(from_state_dict(name, theirs), weight)
            assert file.digests[name] == digest_nf4(weight)
    with safe_open(path, "pt") as handle:
        assert handle.metadata()["format"] == "pt"


def test_weights_lie_in_the_order_of_writing(tmp_path: Path) -> None:
    names = ["z", "a", "m"]
    weights = {name: quantize_nf4(torch.randn(64, 128)) for name in names}
    file = write(tmp_path / "a.safetensors", weights)
    assert sorted(names, key=lambda name: file.entries[name].offset) == names


def test_a_file_of_another_writer(tmp_path: Path) -> None:
    weight = quantize_nf4(torch.randn(33, 65))
    tensors = {**to_state_dict("w", weight), "b": torch.arange(5), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.digests == {}
    assert same_weight(from_state_dict("w", {k: file.mapped(k) for k in tensors}), weight)
    assert file.mapped("b").tolist() == [0, 1, 2, 3, 4]
    assert file.mapped("none").shape == (0, 3)


def test_what_is_mapped_is_the_files_own_memory(tmp_path: Path) -> None:
    value = torch.randn(1000, 1000)
    file = write(tmp_path / "a.safetensors", {"w": value})
    tensor = file.mapped("w")
    assert is_file_mapped(tensor)
    assert not is_file_mapped(tensor.clone())
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = [line for line in maps.read_text().splitlines() if str(tmp_path) in line]
        # Shared and not writable: no limit on a process's data counts it.
        assert {line.split()[1] for line in lines} == {"r--s"}
    file.path.unlink()
    assert torch.equal(tensor, value)
    file.unmap()
    assert torch.equal(tensor, value)
    with pytest.raises(MissingFileError, match="does not exist"):
        file.mapped("w")


@pytest.mark.parametrize("keep", [0, 5, 8, 30, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.randn(20, 20)})
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"a\.safetensors' is truncated or corrupt"):
        TensorFile(path)
    path.write_bytes(content + b"more")
    with pytest.raises(CheckpointError, match="is truncated or corrupt"):
        TensorFile(path)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"w": 3}',
        '{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"w": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        "not json",
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"1234")
    with pytest.raises(CheckpointError, match=r"a\.safetensors' is truncated or corrupt"):
        TensorFile(path)


def test_a_dtype_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"1")
    with pytest.raises(CheckpointError, match="'w' has a dtype that is not known"):
        TensorFile(path).mapped("w")


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"v": torch.randn(20, 20), "w": torch.randn(20, 20)})
    with file.path.open("r+b") as raw:
        raw.truncate(file.entries["w"].offset + 7)
    assert file.mapped("v").shape == (20, 20)
    assert file.digest("v") == file.digests["v"]
    for access in (file.mapped, file.digest):
        with pytest.raises(CheckpointError, match=r"is truncated or corrupt: it .*ends .*'w'"):
            access("w")
    file.path.unlink()
    with pytest.raises(MissingFileError, match="does not exist"):
        file.digest("v")


def test_nothing_that_is_missing_or_not_finished_is_read(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        TensorFile(tmp_path / "nowhere")
    path = tmp_path / "a.safetensors"
    writer = TensorFileWriter(path, ["w", "x"])
    writer.add("w", torch.randn(64, 64))
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert path.stat().st_size > 64 * 64 * 4
    with pytest.raises(CheckpointError, match="is truncated or corrupt"):
        TensorFile(path)
    with pytest.raises(FileExistsError):
        TensorFileWriter(path, [])
