"""Tensors in safetensors files: written one after another, read or mapped one by one.

The format is safetensors' own (https://github.com/huggingface/safetensors#format), and quantised
weights are under bitsandbytes' keys, so any reader of either reads such a file. Two things are
particular to those written here: tensors lie in the order in which they were given, and the header
holds a digest of each weight, so that a model is known by its file without reading all of it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ladder_kernels.errors import CheckpointError, MissingFileError
from ladder_kernels.models.fingerprint import digest_float, digest_nf4, digest_pieces
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.checkpoint import is_state, to_state_dict

__all__ = ["Entry", "TensorFile", "TensorFileWriter"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100_000_000
_METADATA, _DIGESTS = "__metadata__", "ladder_kernels.digests"

# Weights begin at multiples of it, and so does the first tensor.
_ALIGNED = 64
# Bytes that are read at a time.
_PIECE = 1 << 24
# No item of a tensor is longer: what begins at a multiple of it is aligned.
_WIDEST = 8
# Bytes of a header's entry besides the name, four sizes of fifteen digits included; how many a
# weight has, its digest included.
_ENTRY, _ENTRIES = 192, 7


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file.

    Attributes:
        dtype: ``None`` if PyTorch has none that is meant here.
        shape: Of the tensor.
        offset: Of its first byte, from the beginning of the file.
        nbytes: How long it is.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFile:
    """A safetensors file whose header was read and whose size fits it.

    Nothing else is read, and no file stays open, until a tensor is mapped.

    Args:
        path: The file.

    Attributes:
        path: As above.
        entries: Where each tensor lies, by key.
        digests: Of each weight as :mod:`~ladder_kernels.models.fingerprint` takes it, by name;
            empty if the file was not written here.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: It is no safetensors file, or another length than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping: mmap.mmap | None = None
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(_LENGTH.size)
                length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else size
                if length > min(size - _LENGTH.size, _LONGEST_HEADER):
                    raise self._bad(f"its {size} bytes do not hold its header")
                header = json.loads(file.read(length))
        except FileNotFoundError:
            raise MissingFileError(f"'{path}' does not exist") from None
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._bad(str(error)) from None
        try:
            metadata = header.pop(_METADATA, {})
            digests = json.loads(metadata.get(_DIGESTS, "{}"))
            self.digests = {name: bytes.fromhex(value) for name, value in digests.items()}
            start = _LENGTH.size + length
            self.entries = {name: self._entry(name, value, start) for name, value in header.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._bad(f"its header is not that of safetensors ({error!r})") from None
        end = max((entry.offset + entry.nbytes for entry in self.entries.values()), default=start)
        if end != size:
            raise self._bad(f"it is {size} bytes long, and by its header it is {end}")

    def _bad(self, why: str) -> CheckpointError:
        return CheckpointError(f"'{self.path}' is truncated or corrupt: {why}")

    def _entry(self, name: str, value: Mapping[str, Any], start: int) -> Entry:
        first, last = value["data_offsets"]
        dtype, shape = _DTYPES.get(value["dtype"]), tuple(value["shape"])
        nbytes = last - first
        if first < 0 or (dtype is not None and math.prod(shape) * dtype.itemsize != nbytes):
            raise self._bad(f"'{name}' has {nbytes} bytes, which do not fit its shape")
        return Entry(dtype, shape, start + first, nbytes)

    def mapped(self, key: str) -> Tensor:
        """One tensor as it lies in the file: a view of the file's pages, not to be written to.

        Raises:
            MissingFileError: The file is gone.
            CheckpointError: It became shorter, or PyTorch's dtypes do not have the tensor's.
        """
        entry = self.entries[key]
        if entry.dtype is None:
            raise self._bad(f"'{key}' has a dtype that is not known")
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if self._mapping is None:
            self._mapping = self._map()
        if len(self._mapping) < entry.offset + entry.nbytes:
            raise self._bad(f"it has become shorter, and ends before '{key}' does")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not writable.*")
            flat = torch.frombuffer(
                self._mapping, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.offset
            )
        return flat.view(entry.shape)

    def digest(self, key: str) -> bytes:
        """The digest of a float tensor, read a piece at a time: none of its pages stay mapped.

        Raises:
            MissingFileError: The file is gone.
            CheckpointError: It became shorter, or PyTorch's dtypes do not have the tensor's.
        """
        return digest_pieces(self.entries[key].shape, self._pieces(key))

    def _pieces(self, key: str) -> Iterator[Tensor]:
        entry = self.entries[key]
        if entry.dtype is None:
            raise self._bad(f"'{key}' has a dtype that is not known")
        memory = torch.empty(min(_PIECE, entry.nbytes), dtype=torch.uint8)
        left = entry.nbytes
        try:
            with self.path.open("rb") as file:
                file.seek(entry.offset)
                while left:
                    piece = memory[: min(left, _PIECE)]
                    if file.readinto(piece.numpy().data) != piece.numel():
                        raise self._bad(f"it ends within '{key}'")
                    yield piece.view(entry.dtype)
                    left -= piece.numel()
        except FileNotFoundError:
            raise MissingFileError(f"'{self.path}' does not exist") from None

    def unmap(self) -> None:
        """Give the file's pages back, as soon as no tensor that was mapped is left."""
        self._mapping = None

    def _map(self) -> mmap.mmap:
        # Shared and read-only: page cache, which no limit on a process's own memory counts.
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise MissingFileError(f"'{self.path}' does not exist") from None
        except (OSError, ValueError) as error:
            raise self._bad(str(error)) from None


class TensorFileWriter:
    """Writes a safetensors file, one weight after another; only the one at hand is in memory.

    The header comes first and says where each tensor lies, so room is left for it, and it is
    written at the end. A file without one is no safetensors file: what was not closed is not read.

    Args:
        path: The file; it must not exist.
        names: Of all weights that may be added.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        # Digests are JSON within JSON, where a name is escaped twice.
        lengths = [len(json.dumps(json.dumps(name))) for name in names]
        room = sum(_ENTRIES * (length + _ENTRY) for length in lengths) + _ENTRY
        self._start = -(-(_LENGTH.size + room) // _ALIGNED) * _ALIGNED
        self._header: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._last: list[tuple[str, Tensor]] = []
        self._at = 0
        self._path = path
        self._file = path.open("xb", buffering=0)
        self._file.seek(self._start)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def add(self, name: str, weight: Tensor | NF4Weight) -> None:
        """Append a weight.

        Args:
            name: One of those announced.
            weight: On any device; written under bitsandbytes' keys if it is quantised.
        """
        if isinstance(weight, Tensor):
            tensor = weight.detach().cpu().contiguous()
            self._digests[name] = digest_float(tensor).hex()
            if tensor.nbytes % _WIDEST:
                # It would leave what follows misaligned: a vector of odd length, or the like.
                self._last.append((name, tensor.clone()))
            else:
                self._append(name, tensor)
            return
        weight = weight.to("cpu")
        self._digests[name] = digest_nf4(weight).hex()
        tensors = to_state_dict(name, weight)
        for key in sorted(tensors, key=lambda key: (is_state(key), -tensors[key].itemsize)):
            tensor = tensors[key]
            if is_state(key):
                # JSON may end in spaces.
                missing = -(self._at + tensor.numel()) % _ALIGNED
                tensor = torch.nn.functional.pad(tensor, (0, missing), value=ord(" "))
            self._append(key, tensor)

    def _append(self, key: str, tensor: Tensor) -> None:
        stop = self._at + tensor.nbytes
        self._header[key] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._at, stop],
        }
        self._write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._at = stop

    def _write(self, content: bytes | memoryview) -> None:
        left = memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            # A full disk, which the system's own error does not name.
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def _finish(self) -> None:
        for name, tensor in sorted(self._last, key=lambda each: -each[1].itemsize):
            self._append(name, tensor)
        metadata = {"format": "pt", _DIGESTS: json.dumps(self._digests)}
        header = json.dumps({_METADATA: metadata, **self._header}).encode()
        room = self._start - _LENGTH.size
        if len(header) > room:
            raise ValueError(f"a header of {len(header)} bytes was given room for {room}")
        self._file.seek(0)
        self._write(_LENGTH.pack(room) + header.ljust(room))
