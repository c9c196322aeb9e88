"""What a GGUF file's header says, and where its tensors are.

The ``gguf`` package looks at each of a tokenizer's hundred thousand strings by itself, which takes
seconds. Here they are stepped over: a backbone does not depend on them. The format is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["KEPT", "GGUFFile", "GGUFTensor"]

KEPT = 2
"""Elements of a tokenizer's arrays that :meth:`GGUFFile.without_tokenizer` keeps at most."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}
_LENGTH = struct.Struct("<Q")
_TOKENIZER = "tokenizer."
_TOKENS = "tokenizer.ggml.tokens"

# Numbers that are dequantised at a time: the temporaries stay in the cache.
_PIECE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """One tensor of a file.

    Attributes:
        kind: How its numbers are stored.
        shape: Slowest dimension first.
        data: Its bytes, a view of the file, ``[blocks, bytes of a block]``.
    """

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def dequantize(self) -> np.ndarray:
        """Return the numbers as fp32, ``shape``; a view of the file if they are stored so.

        Raises:
            NotImplementedError: From the ``gguf`` package, which cannot dequantise this kind; the
                caller, who knows the tensor's name, makes a message of it.
        """
        if self.kind == gguf.GGMLQuantizationType.F32:
            return self.data.view(np.float32).reshape(self.shape)
        block = gguf.GGML_QUANT_SIZES[self.kind][0]
        out = np.empty((len(self.data), block), dtype=np.float32)
        step = _PIECE // block
        for start in range(0, len(out), step):
            # The package works on sixteen rows at a time, and the fewer they are the better.
            row = self.data[start : start + step].reshape(1, -1)
            out[start : start + step] = gguf.dequantize(row, self.kind).reshape(-1, block)
        return out.reshape(self.shape)


class GGUFFile:
    """A GGUF file, mapped into memory.

    Args:
        path: The file.

    Attributes:
        fields: The metadata that are numbers or strings, by key; arrays are left out.
        tensors: By name.
        vocabulary: How many tokens its tokenizer has; ``None`` if it holds none.

    Raises:
        ValueError: It is no GGUF file, of another version, or damaged.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._bytes = np.memmap(path, mode="r").view(np.ndarray)
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self.vocabulary: int | None = None
        self._alignment = 32
        self._field_pieces: list[bytes | memoryview] = []
        self._field_count = 0
        try:
            self._read(_Cursor(self._bytes.data))
        except (struct.error, OverflowError):
            raise ValueError("its header is cut short") from None

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        version, tensors, self._field_count = cursor.unpack("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version {version:#x} is not known")
        for _ in range(self._field_count):
            self._read_field(cursor)
        entries = []
        for _ in range(tensors):
            name = cursor.string()
            (dimensions,) = cursor.unpack("<I")
            shape = cursor.unpack(f"<{dimensions}Q")[::-1]
            entries.append((name, shape, *cursor.unpack("<IQ")))
        alignment = self.fields.get("general.alignment", self._alignment)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment {alignment!r} is not a power of two")
        self._alignment = alignment
        if cursor.at > len(self._bytes):
            raise ValueError("its header is cut short")
        start = cursor.at + -cursor.at % self._alignment
        for name, shape, kind, offset in entries:
            if name in self.tensors:
                raise ValueError(f"it holds two tensors '{name}'")
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)

    def _read_field(self, cursor: _Cursor) -> None:
        start = cursor.at
        key = cursor.string()
        (kind,) = cursor.unpack("<I")
        if kind == _ARRAY:
            inner, count = cursor.unpack("<IQ")
            values = cursor.at
            kept = min(count, KEPT)
            cursor.skip(inner, kept)
            kept_end = cursor.at
            cursor.skip(inner, count - kept)
            if key == _TOKENS:
                self.vocabulary = count
            if key.startswith(_TOKENIZER):
                before = cursor.memory[start : values - _LENGTH.size]
                first = cursor.memory[values:kept_end]
                self._field_pieces += [before, _LENGTH.pack(kept), first]
                return
        else:
            self.fields[key] = cursor.string() if kind == _STRING else cursor.number(kind)
        self._field_pieces.append(cursor.memory[start : cursor.at])

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, at: int) -> GGUFTensor:
        known = gguf.GGMLQuantizationType(kind)
        numbers, size = gguf.GGML_QUANT_SIZES[known]
        total = 1
        for length in shape:
            total *= length
        if total % numbers:
            raise ValueError(f"'{name}' is no whole number of its blocks")
        blocks = total // numbers
        if at + blocks * size > len(self._bytes):
            raise ValueError(f"it ends before '{name}' does")
        data = self._bytes[at : at + blocks * size].reshape(blocks, size)
        return GGUFTensor(kind=known, shape=shape, data=data)

    def without_tokenizer(self) -> bytes:
        """A GGUF file with this one's metadata and names of tensors, for those who ask no more.

        Of the tokenizer's arrays the first two elements are there (one alone, transformers would
        take for no array); every tensor is one number.
        """
        pieces = [_MAGIC, struct.pack("<IQQ", 3, len(self.tensors), self._field_count)]
        pieces += self._field_pieces
        for name in self.tensors:
            encoded = name.encode()
            pieces += [_LENGTH.pack(len(encoded)), encoded]
            pieces.append(struct.pack("<IQIQ", 1, 1, gguf.GGMLQuantizationType.F32, 0))
        header = b"".join(pieces)
        return header + bytes(-len(header) % self._alignment + np.dtype(np.float32).itemsize)


class _Cursor:
    """Reads one value after another; ``struct.error`` or ``OverflowError`` where the file ends."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.at = 0

    def unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.memory, self.at)
        self.at += struct.calcsize(form)
        return values

    def take(self, count: int) -> bytes:
        return self.unpack(f"<{count}s")[0]

    def string(self) -> str:
        return self.take(self.unpack("<Q")[0]).decode()

    def number(self, kind: int) -> Any:
        return self.unpack(f"<{_scalar(kind)}")[0]

    def skip(self, kind: int, count: int) -> None:
        """Step over values of a kind."""
        if kind == _STRING:
            for _ in range(count):
                (length,) = _LENGTH.unpack_from(self.memory, self.at)
                self.at += _LENGTH.size + length
        elif kind == _ARRAY:
            for _ in range(count):
                self.skip(*self.unpack("<IQ"))
        else:
            self.at += struct.calcsize(f"<{_scalar(kind)}") * count


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a field of type {kind} is not known")
    return _SCALARS[kind]
