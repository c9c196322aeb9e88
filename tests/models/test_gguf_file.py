"""Headers of GGUF files, against the ``gguf`` package's own reader."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ladder_kernels.models.gguf_file import GGUFFile

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
FIELDS: dict[str, tuple[Any, gguf.GGUFValueType]] = {
    "a.u8": (200, gguf.GGUFValueType.UINT8),
    "a.i8": (-100, gguf.GGUFValueType.INT8),
    "a.u16": (60000, gguf.GGUFValueType.UINT16),
    "a.i16": (-30000, gguf.GGUFValueType.INT16),
    "a.u32": (4_000_000_000, gguf.GGUFValueType.UINT32),
    "a.i32": (-2_000_000_000, gguf.GGUFValueType.INT32),
    "a.u64": (1 << 63, gguf.GGUFValueType.UINT64),
    "a.i64": (-(1 << 62), gguf.GGUFValueType.INT64),
    "a.f32": (0.15625, gguf.GGUFValueType.FLOAT32),
    "a.f64": (0.1, gguf.GGUFValueType.FLOAT64),
    "a.yes": (True, gguf.GGUFValueType.BOOL),
    "a.text": ("größer als\n", gguf.GGUFValueType.STRING),
    "a.empty": ("", gguf.GGUFValueType.STRING),
}
ARRAYS: dict[str, list[Any]] = {
    "a.layers": [1, 2, 3],
    "a.names": ["one", "", "drei"],
    "tokenizer.ggml.tokens": [f"token {i} é" for i in range(300)],
    "tokenizer.ggml.scores": [float(i) for i in range(300)],
    "tokenizer.ggml.merges": ["a b"],
}


def write(path: Path, *, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (value, kind) in FIELDS.items():
        writer.add_key_value(key, value, kind)
    for key, values in ARRAYS.items():
        writer.add_array(key, values)
    generator = np.random.default_rng(0)
    for number, kind in enumerate(KINDS):
        known = gguf.GGMLQuantizationType[kind]
        values = generator.standard_normal((3, 64 * (number + 1)), dtype=np.float32)
        writer.add_tensor(f"{kind}.weight", gguf.quantize(values, known), raw_dtype=known)
    writer.add_tensor("deep", generator.standard_normal((2, 3, 4, 5), dtype=np.float32))
    writer.add_tensor("large", generator.standard_normal((300, 1024), dtype=np.float32))
    large = gguf.quantize(
        generator.standard_normal((600, 1024), dtype=np.float32), gguf.GGMLQuantizationType.Q4_1
    )
    writer.add_tensor("large.Q4_1", large, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("whole", np.arange(7, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 1024])
def test_against_their_reader(tmp_path: Path, alignment: int | None):
    path = write(tmp_path / "file.gguf", alignment=alignment)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for key, (value, kind) in FIELDS.items():
        assert ours.fields[key] == value == theirs.fields[key].contents(), key
        assert type(ours.fields[key]) is type(value), kind
    assert not set(ARRAYS) & set(ours.fields)
    assert ours.vocabulary == 300
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.kind == tensor.tensor_type
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        if tensor.name == "whole":
            # The gguf package knows the kind's size, and cannot dequantise it.
            with pytest.raises(NotImplementedError):
                mine.dequantize()
            continue
        values = mine.dequantize()
        assert values.dtype == np.float32
        assert np.array_equal(values, gguf.dequantize(tensor.data, tensor.tensor_type))


def test_without_tokenizer(tmp_path: Path):
    """Their reader finds everything but the tokenizer's strings and the tensors' numbers."""
    path = write(tmp_path / "file.gguf", alignment=64)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(GGUFFile(path).without_tokenizer())
    assert copy.stat().st_size < 4000
    whole, short = gguf.GGUFReader(path), gguf.GGUFReader(copy)
    assert list(whole.fields) == list(short.fields)
    for key, field in whole.fields.items():
        found, wanted = short.fields[key].contents(), field.contents()
        if key.startswith("tokenizer."):
            wanted = wanted[:2]
        if not key.startswith("GGUF."):
            assert found == wanted, key
    assert [tensor.name for tensor in short.tensors] == [tensor.name for tensor in whole.tensors]


def test_a_file_without_tokenizer(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "file.gguf")
    assert file.vocabulary is None
    assert file.tensors == {}
    assert file.fields == {"general.architecture": "llama"}


def test_any_truncation_is_noticed(tmp_path: Path):
    content = write(tmp_path / "file.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    sizes = [*range(0, 9000, 23), *range(9000, len(content) - 4, 300_007), len(content) - 5]
    for size in sizes:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"."):
            GGUFFile(cut)


def test_damage_is_refused_or_harmless(tmp_path: Path):
    """Whatever stands in the header: read, or refused with ValueError, and soon."""
    content = bytearray(write(tmp_path / "file.gguf").read_bytes())
    damaged = tmp_path / "damaged.gguf"
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        copy = bytearray(content)
        at = chance.randrange(9000)
        length = chance.choice((1, 4, 8))
        copy[at : at + length] = chance.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * length
        damaged.write_bytes(copy)
        try:
            GGUFFile(damaged).without_tokenizer()
        except ValueError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(100), "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 0x1 is not known"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 0x3000000 is not known"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 63) + b"key", "cut short"),
        (
            b"GGUF" + struct.pack("<IQQQ3sIIQ", 3, 0, 1, 3, b"key", 9, 77, 1),
            "field of type 77 is not known",
        ),
        (b"GGUF" + struct.pack("<IQQQ3sIIQ", 3, 0, 1, 3, b"key", 9, 0, 1 << 40), "cut short"),
        (
            b"GGUF" + struct.pack("<IQQQ17sII", 3, 0, 1, 17, b"general.alignment", 4, 24),
            "alignment 24 is not a power of two",
        ),
    ],
)
def test_refused(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GGUFFile(path)
