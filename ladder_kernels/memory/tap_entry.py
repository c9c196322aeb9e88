"""Files of taps: one sequence each, written beside their place and renamed when they are whole.

A file is a header and then, for every slot of a :class:`~.taps.TapPlan`, the encoded states of the
sequence's tokens, each tensor at a multiple of 4,096 bytes:

    8 bytes   magic, the last of which is the version
    8 bytes   length of the description, little-endian
    32 bytes  sha256 of the description
    ...       the description, JSON: key, number of tokens, place of each tensor, size of the file

The header follows from the key and the sizes alone, and is written last. So a file is whole if its
size is right and it begins with the header that it must have.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from ladder_kernels.memory.taps import TapPlan

__all__ = ["ENTRY_SUFFIX", "Entry", "EntryLayout", "NewEntry", "remove_abandoned"]

ENTRY_SUFFIX = ".taps"
_PART_SUFFIX = ".part"
_MAGIC = b"LKTAPS\0\1"
_ALIGNMENT = 4096
_numbers = count()


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: slot, index among the slot's tensors, dtype, last size, first byte."""

    slot: int
    part: int
    dtype: torch.dtype
    width: int
    offset: int


class EntryLayout:
    """Where everything is in the file of a sequence.

    Args:
        key: Name of the entry, hexadecimal.
        plan: What is kept.
        tokens: Of the sequence; those whose states are kept.

    Attributes:
        key: As above.
        tokens: As above.
        header: The file's first bytes.
        places: Of each slot's tensors.
        size: Of the whole file, in bytes.
    """

    def __init__(self, key: str, plan: TapPlan, tokens: int) -> None:
        self.key = key
        self.tokens = tokens
        kinds = [
            (slot, part, dtype, width)
            for slot in plan.slots
            for part, (dtype, width) in enumerate(plan.encoding_of(slot).parts(plan.width))
        ]
        # Offsets are counted from the end of the header, whose length they would change.
        offset, described, offsets = 0, [], []
        for slot, part, dtype, width in kinds:
            name = str(dtype).removeprefix("torch.")
            described.append([slot, part, name, width, offset])
            offsets.append(offset)
            offset += _aligned(tokens * width * dtype.itemsize)
        description = json.dumps(
            {"key": key, "tokens": tokens, "tensors": described, "bytes": offset}
        ).encode("ascii")
        head = _MAGIC + len(description).to_bytes(8, "little")
        head += hashlib.sha256(description).digest() + description
        self.header = head.ljust(_aligned(len(head)), b"\0")
        self.size = len(self.header) + offset
        self.places: dict[int, list[_Place]] = {slot: [] for slot in plan.slots}
        for (slot, part, dtype, width), start in zip(kinds, offsets, strict=True):
            place = _Place(slot, part, dtype, width, len(self.header) + start)
            self.places[slot].append(place)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Entry:
    """The tensors of a file that is mapped into memory: page cache, which the system may drop.

    Args:
        layout: Of the file.
        file: Descriptor of a file of that size; may be closed afterwards.
    """

    def __init__(self, layout: EntryLayout, file: int) -> None:
        self.layout = layout
        # Shared and read-only: pages are never copied and count as no memory of the process.
        self._map = mmap.mmap(file, layout.size, access=mmap.ACCESS_READ)
        self._bytes = torch.from_numpy(np.asarray(_Constant(self._map)))

    @classmethod
    def find(cls, folder: Path, layout: EntryLayout) -> Entry | None:
        """Map the entry of that key; ``None`` if there is no whole one."""
        try:
            file = os.open(folder / f"{layout.key}{ENTRY_SUFFIX}", os.O_RDONLY)
        except OSError:
            return None
        try:
            whole = os.fstat(file).st_size == layout.size
            if whole and os.pread(file, len(layout.header), 0) == layout.header:
                return cls(layout, file)
            return None
        except OSError:
            return None
        finally:
            os.close(file)

    def read(self, slot: int) -> tuple[Tensor, ...]:
        """The tensors of a slot, ``[tokens, width]`` each, in the file's own pages: constants."""
        tokens = self.layout.tokens
        return tuple(
            self._bytes[p.offset : p.offset + tokens * p.width * p.dtype.itemsize]
            .view(p.dtype)
            .view(tokens, p.width)
            for p in self.layout.places[slot]
        )

    def expect(self, slot: int) -> None:
        """Say that a slot will be read soon."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        places = self.layout.places[slot]
        start, last = places[0].offset, places[-1]
        end = last.offset + self.layout.tokens * last.width * last.dtype.itemsize
        if end > start:
            self._map.madvise(mmap.MADV_WILLNEED, start, end - start)


class _Constant:
    """The bytes of a read-only map as numpy takes them without asking for a copy.

    PyTorch has no constant tensors and warns of arrays that are; nobody writes to a tap.
    """

    def __init__(self, held: mmap.mmap) -> None:
        self._held = np.frombuffer(held, np.uint8)
        self.__array_interface__ = {
            "data": (self._held.ctypes.data, False),
            "shape": self._held.shape,
            "typestr": "|u1",
            "version": 3,
        }


class NewEntry(Entry):
    """A file that is being written; each slot can be read as soon as it is there.

    Args:
        layout: Of the file.
        folder: Where to.
        kept: Whether :meth:`finish` gives it its name; otherwise it is gone when it is dropped.

    Raises:
        OSError: If there is no room for it, or the file system refuses it.
    """

    def __init__(self, layout: EntryLayout, folder: Path, *, kept: bool) -> None:
        name = f"{layout.key}.{platform.node()}.{os.getpid()}-{next(_numbers)}{_PART_SUFFIX}"
        self._folder = folder
        self._part: Path | None = folder / name
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(self._file, layout.size)
            super().__init__(layout, self._file)
            if not kept:
                self._unlink()
        except BaseException:
            self.discard()
            raise

    def write(self, slot: int, parts: tuple[Tensor, ...]) -> None:
        """Write the tensors of a slot.

        Args:
            slot: One of the layout's.
            parts: CPU tensors, ``[tokens, width]`` each.

        Raises:
            OSError: If the disk is full, or a limit is reached.
        """
        for place, part in zip(self.layout.places[slot], parts, strict=True):
            flat = part.detach().contiguous().view(-1)
            if flat.numel():
                self._put(flat.view(torch.uint8).numpy().data, place.offset)

    def finish(self) -> None:
        """Give the file its name, if it is kept; it can be read further.

        Raises:
            OSError: If the disk is full, or a limit is reached.
        """
        if self._part is not None:
            self._put(memoryview(self.layout.header), 0)
            os.fsync(self._file)
            self._part.replace(self._folder / f"{self.layout.key}{ENTRY_SUFFIX}")
            self._part = None
        self._close()

    def discard(self) -> None:
        """Never give the file a name; what was written can be read further."""
        self._unlink()
        self._close()

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def _unlink(self) -> None:
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.discard()


def remove_abandoned(folder: Path) -> None:
    """Remove files that processes of this machine were writing when they ended."""
    for path in folder.glob(f"*{_PART_SUFFIX}"):
        key, _, rest = path.name.removesuffix(_PART_SUFFIX).partition(".")
        node, _, numbers = rest.rpartition(".")
        process = numbers.partition("-")[0]
        ours = key and node == platform.node() and process.isdigit()
        if ours and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)
