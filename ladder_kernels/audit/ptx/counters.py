"""What a hardware profiler would count: instructions, sectors, bank conflicts, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from ladder_kernels.audit.ptx.types import Array

__all__ = ["CATEGORIES", "Category", "Counters", "GlobalTraffic", "SharedTraffic"]

Category = Literal["integer", "float", "tensor", "shared", "global", "control", "convert", "other"]
"""What an instruction is counted as."""

CATEGORIES: tuple[Category, ...] = (
    "integer",
    "float",
    "tensor",
    "shared",
    "global",
    "control",
    "convert",
    "other",
)
"""All of them."""

_SECTOR = 32
_BANKS = 32
_BANK_WIDTH = 4
_WARP = 32


@dataclass
class GlobalTraffic:
    """Global loads, or global stores and atomics.

    Attributes:
        requests: Instructions of warps with at least one thread that took part.
        sectors: 32-byte sectors that they touched.
        ideal_sectors: The fewest sectors that could hold the bytes that they touched.
        bytes: Bytes asked for, a byte counted once for each request.
    """

    requests: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    bytes: int = 0

    @property
    def coalescing(self) -> float:
        """``ideal_sectors / sectors``: 1 is perfect."""
        return self.ideal_sectors / self.sectors if self.sectors else 1.0

    @property
    def bytes_moved(self) -> int:
        """Bytes of the sectors, which is what moves if no cache holds them."""
        return self.sectors * _SECTOR

    def record(self, addresses: Array, active: Array, nbytes: int) -> None:
        """Count one access.

        Args:
            addresses: int64 ``[warps, 32]``.
            active: bool ``[warps, 32]``, which threads take part.
            nbytes: Bytes of each thread, a power of two to which its address is aligned.
        """
        warp, lane = np.nonzero(active)
        starts = addresses[warp, lane]
        pieces = max(nbytes // _SECTOR, 1)
        sectors = starts[:, None] // _SECTOR + np.arange(pieces)
        distinct = np.bincount(_distinct(warp, starts // nbytes)[0], minlength=len(active))
        self.requests += int(active.any(axis=1).sum())
        self.sectors += len(_distinct(np.repeat(warp, pieces), sectors.ravel())[0])
        self.ideal_sectors += int((-(-distinct * nbytes // _SECTOR)).sum())
        self.bytes += int(distinct.sum()) * nbytes


@dataclass
class SharedTraffic:
    """Shared memory accesses, matrix loads and stores among them.

    Attributes:
        requests: Instructions of warps with at least one thread that took part.
        wavefronts: Passes over the 32 banks of 4 bytes that they took. Threads that touch the same
            4 bytes share a pass; 8 and 16 bytes a thread take at least two and four passes, of 16
            and 8 threads.
        conflicts: Wavefronts beyond those that the bytes need.
    """

    requests: int = 0
    wavefronts: int = 0
    conflicts: int = 0

    @property
    def slowdown(self) -> float:
        """Wavefronts in proportion to what the bytes need: 1 is perfect."""
        needed = self.wavefronts - self.conflicts
        return self.wavefronts / needed if needed else 1.0

    def record(self, addresses: Array, active: Array, nbytes: int) -> None:
        """Count one access; the arguments are those of :meth:`GlobalTraffic.record`."""
        words = max(nbytes // _BANK_WIDTH, 1)
        passes = np.arange(active.shape[0] * words).reshape(-1, words)
        passes = np.repeat(passes, _WARP // words, axis=1)[active]
        touched = addresses[active][:, None] // _BANK_WIDTH + np.arange(words)
        which, word = _distinct(np.repeat(passes, words), touched.ravel())
        loads = np.bincount(which * _BANKS + word % _BANKS, minlength=active.size * words)
        wavefronts = loads.reshape(-1, _BANKS).max(axis=1)
        self.requests += int(active.any(axis=1).sum())
        self.wavefronts += int(wavefronts.sum())
        self.conflicts += int(np.maximum(wavefronts - 1, 0).sum())


@dataclass
class Counters:
    """Counts of one or more launches; they add up.

    Attributes:
        instructions: Executed instructions of warps by category; one whose guard is false
            for every thread still counts, as it does on the hardware.
        loads_of: Global loads, ``cp.async`` among them, by the argument whose memory they read.
        stores_of: Global stores and atomics, by the argument whose memory they write.
        shared: Shared memory.
    """

    instructions: dict[Category, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    loads_of: dict[str, GlobalTraffic] = field(default_factory=dict)
    stores_of: dict[str, GlobalTraffic] = field(default_factory=dict)
    shared: SharedTraffic = field(default_factory=SharedTraffic)

    @property
    def total(self) -> int:
        """All executed instructions."""
        return sum(self.instructions.values())

    @property
    def loads(self) -> GlobalTraffic:
        """Global loads of all arguments."""
        return _sum(self.loads_of)

    @property
    def stores(self) -> GlobalTraffic:
        """Global stores and atomics of all arguments."""
        return _sum(self.stores_of)

    def add(self, other: Counters) -> None:
        """Add another launch's counts."""
        for category, count in other.instructions.items():
            self.instructions[category] += count
        _add(self.shared, other.shared)
        for mine, theirs in (
            (self.loads_of, other.loads_of),
            (self.stores_of, other.stores_of),
        ):
            for name, traffic in theirs.items():
                _add(mine.setdefault(name, GlobalTraffic()), traffic)


def _sum(of_arguments: Mapping[str, GlobalTraffic]) -> GlobalTraffic:
    total = GlobalTraffic()
    for traffic in of_arguments.values():
        _add(total, traffic)
    return total


def _add(mine: Any, theirs: Any) -> None:
    for entry in fields(mine):
        setattr(mine, entry.name, getattr(mine, entry.name) + getattr(theirs, entry.name))


def _distinct(group: Array, value: Array) -> tuple[Array, Array]:
    """The distinct pairs of a group and a value."""
    order = np.lexsort((value, group))
    group, value = group[order], value[order]
    new = np.ones(len(group), bool)
    new[1:] = (group[1:] != group[:-1]) | (value[1:] != value[:-1])
    return group[new], value[new]
