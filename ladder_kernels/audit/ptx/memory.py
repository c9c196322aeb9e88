"""Simulated memory that knows which of its bytes exist.

Every access is checked, reads too: it must be aligned to its size and touch nothing but bytes of an
argument (global), of the block (shared) or of the thread (local).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ladder_kernels.audit.ptx.errors import MemoryAccessError
from ladder_kernels.audit.ptx.types import UNSIGNED, Array

if TYPE_CHECKING:
    from ladder_kernels.audit.ptx.state import Threads

__all__ = [
    "GARBAGE",
    "GLOBAL_BASE",
    "LOCAL_BASE",
    "MODULE_BASE",
    "SHARED_BASE",
    "BlockMemory",
    "Buffer",
    "GlobalMemory",
    "Memory",
]

GLOBAL_BASE = 0x7F00_0000_0000
"""The device address of global memory's first byte."""
_FIRST = 1 << 16
MODULE_BASE = GLOBAL_BASE + _FIRST
"""The device address of the first buffer, if its skew is 0: of what the module itself holds."""
SHARED_BASE = 0x400
"""The shared address of a block's first byte; not 0, so that a null pointer is no shared memory."""
LOCAL_BASE = 0x10_0000
"""The local address of a thread's first byte."""
GARBAGE = 0xFF
"""What fills memory that nothing was written to: NaN in every float type, -1 in integers."""

_LEAST_GAP = 1 << 16
_ALIGNMENT = 512
_MOST_DISTANCE = 1 << 31
_TRUE = {nbytes: UNSIGNED[8 * nbytes].type(int("01" * nbytes, 16)) for nbytes in (1, 2, 4, 8)}


class Memory(ABC):
    """Bytes of one state space.

    Attributes:
        space: "global", "shared" or "local".
        base: The address of the first byte.
        bytes: All of them.
        words: The same memory as unsigned integers of 8, 16, 32 and 64 bits.
    """

    def __init__(self, space: str, base: int, content: Array) -> None:
        self.space = space
        self.base = base
        self.bytes = content
        self.words: Mapping[int, Array] = {bits: content.view(UNSIGNED[bits]) for bits in UNSIGNED}

    def locate(
        self, threads: Threads, addresses: Array, mask: Array | None, nbytes: int, what: str
    ) -> Array:
        """Check an access and say where it lies.

        Args:
            threads: Who accesses.
            addresses: int64, one for each thread.
            mask: Which threads take part; all if None.
            nbytes: Bytes that each of them accesses.
            what: What they do, for the error.

        Returns:
            int64, an index into ``bytes`` for each thread that takes part.

        Raises:
            MemoryAccessError: An access is out of bounds or misaligned.
        """
        if mask is not None:
            addresses = addresses[mask]
        offsets = addresses - self.base
        misaligned = offsets % nbytes != 0 if nbytes > 1 else np.zeros(len(offsets), bool)
        outside = self._outside(np.where(misaligned, -1, offsets), nbytes)
        if outside.any():
            lanes = np.arange(threads.count) if mask is None else np.flatnonzero(mask)
            kind = "misaligned" if misaligned[outside].any() else "out-of-bounds"
            self._fail(threads, lanes[outside], addresses[outside], f"{kind} {{}} {what}", nbytes)
        return self._place(offsets, threads, mask)

    def _fail(
        self, threads: Threads, lanes: Array, addresses: Array, what: str, nbytes: int
    ) -> None:
        address = int(addresses[0])
        argument, offset, where = self._describe(address - self.base)
        raise MemoryAccessError(
            f"{what.format(self.space)} of {nbytes} bytes at {where} by {len(lanes)} thread(s), "
            f"first {threads.describe(int(lanes[0]))}",
            argument=argument,
            offset=offset,
        )

    @abstractmethod
    def _outside(self, offsets: Array, nbytes: int) -> Array:
        """Which accesses touch a byte that does not exist."""

    @abstractmethod
    def _place(self, offsets: Array, threads: Threads, mask: Array | None) -> Array:
        """Offsets from an address space's start to indices into ``bytes``."""

    @abstractmethod
    def _describe(self, offset: int) -> tuple[str | None, int | None, str]:
        """Argument, its byte, and both in words."""


@dataclass(frozen=True)
class Buffer:
    """Memory that arguments point into.

    Attributes:
        content: uint8.
        valid: bool, which bytes belong to an argument.
        skew: Where the first byte lies from a 512-byte boundary.
        names: ``(argument, first byte, bytes)`` for each argument in it.
    """

    content: Array
    valid: Array
    skew: int
    names: Sequence[tuple[str, int, int]]


class GlobalMemory(Memory):
    """The arguments' memory, each far from the next so that no overrun lands in another.

    Attributes:
        starts: Where each buffer's first byte lies in ``bytes``.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.starts: list[int] = []
        end = _FIRST
        for buffer in buffers:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT + buffer.skew
            self.starts.append(start)
            end = start + len(buffer.content) + max(_LEAST_GAP, len(buffer.content))
        size = -(-(end + _LEAST_GAP) // 64) * 64
        # Pages of the gaps are never touched, so zeros cost no memory there.
        super().__init__("global", GLOBAL_BASE, np.zeros(size, np.uint8))
        self._valid = np.zeros(size, bool)
        self._valid_words = {n: self._valid.view(UNSIGNED[8 * n]) for n in _TRUE}
        self._names: list[tuple[str, int, int]] = []
        for buffer, start in zip(buffers, self.starts, strict=True):
            self.bytes[start : start + len(buffer.content)] = buffer.content
            self._valid[start : start + len(buffer.content)] = buffer.valid
            self._names += [(name, start + first, size) for name, first, size in buffer.names]
        self._names.sort(key=lambda named: named[1])

    def argument_at(self, address: int) -> str:
        """The argument whose memory an address is in; of several, the one that begins last."""
        after = bisect_right(self._names, address - self.base, key=lambda named: named[1])
        return self._names[after - 1][0]

    def read_back(self, index: int, nbytes: int) -> Array:
        """The bytes of a buffer as they are now."""
        start = self.starts[index]
        return self.bytes[start : start + nbytes]

    def _outside(self, offsets: Array, nbytes: int) -> Array:
        beyond = (offsets < 0) | (offsets + nbytes > len(self.bytes))
        inside = np.where(beyond, 0, offsets)
        step = min(nbytes, 8)
        words, true = self._valid_words[step], _TRUE[step]
        for first in range(0, nbytes, step):
            beyond |= words[(inside + first) // step] != true
        return beyond

    def _place(self, offsets: Array, threads: Threads, mask: Array | None) -> Array:
        return offsets

    def _describe(self, offset: int) -> tuple[str | None, int | None, str]:
        def distance(named: tuple[str, int, int]) -> int:
            _, start, size = named
            return max(start - offset, offset - (start + size - 1), 0)

        nearest = min(self._names, key=distance, default=None)
        if nearest is None or distance(nearest) > _MOST_DISTANCE:
            return None, None, f"address {self.base + offset:#x}, near no argument"
        name, start, size = nearest
        return name, offset - start, f"argument '{name}', byte {offset - start} of {size}"


class BlockMemory(Memory):
    """Memory that every block (shared) or thread (local) has of its own, full of garbage."""

    def __init__(self, space: str, size: int, owners: int) -> None:
        self._size = size
        self._stride = -(-max(size, 16) // 64) * 64
        base = SHARED_BASE if space == "shared" else LOCAL_BASE
        super().__init__(space, base, np.full(self._stride * owners, GARBAGE, np.uint8))

    def _outside(self, offsets: Array, nbytes: int) -> Array:
        return (offsets < 0) | (offsets + nbytes > self._size)

    def _place(self, offsets: Array, threads: Threads, mask: Array | None) -> Array:
        owners = threads.owners[self.space]
        if owners is None:
            return offsets
        return offsets + self._stride * (owners if mask is None else owners[mask])

    def _describe(self, offset: int) -> tuple[str | None, int | None, str]:
        return None, offset, f"byte {offset} of {self._size}"
