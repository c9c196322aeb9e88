"""Which memory lives, and what for: the books of the live-byte meter."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ladder_kernels.accounts import Category

__all__ = ["CATEGORIES", "Ledger", "Moment", "Usage", "is_file_mapped"]

CATEGORIES: tuple[Category, ...] = ("weights", "taps", "transients", "ladder", "optimizer")
"""What memory is for; see :data:`ladder_kernels.accounts.Category`."""

_MAPS = Path("/proc/self/maps")
# Mappings of what is no file on a disk: memory as any other.
_IN_MEMORY = ("/dev/", "/memfd:", "/SYSV", "/run/shm/", "[")
_PAGE = 4096


class Usage(NamedTuple):
    """Bytes that live at one moment, by what they are for.

    Attributes:
        weights: The frozen model.
        taps: What the frozen pass keeps for the side pass.
        transients: Whatever lives for a part of the step only.
        ladder: What is trained, and its gradients.
        optimizer: Its states, and its temporaries.
        mapped: Memory-mapped files: page cache, which the system takes back at will.
        host: Where a GPU's memory is counted: on its host.
    """

    weights: int = 0
    taps: int = 0
    transients: int = 0
    ladder: int = 0
    optimizer: int = 0
    mapped: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All but what is mapped or on the host."""
        return sum(self[: len(CATEGORIES)])


class Moment(NamedTuple):
    """What lives after a change.

    Attributes:
        operation: What ran, such as ``"aten.mm.default"``; memory that was freed since the
            operation before is freed under this name.
        usage: The bytes.
        seconds: When, on :func:`time.perf_counter`'s clock.
    """

    operation: str
    usage: Usage
    seconds: float = 0.0


@dataclass
class _Held:
    """A piece of memory that is counted; the reference tells when it is gone."""

    kind: str
    size: int
    alive: weakref.ref[Any]


class Ledger:
    """Counts storages: each once, however many tensors share it, until nobody refers to it.

    Storages are told from the first tensor of theirs on. Any thread may tell, and they may be freed
    in any.

    Args:
        device: Whose memory counts. Of a GPU: memory of the CPU is its host's then.

    Attributes:
        operation: What runs, for the timeline.
        peak: When the total was largest.
        timeline: Usage after every change.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.operation = ""
        self.peak = Moment("", Usage())
        self.timeline: list[Moment] = []
        self._bytes = dict.fromkeys(Usage._fields, 0)
        self._held: dict[int, _Held] = {}
        # Filled by callbacks, which may come in the middle of anything; emptied before each change.
        self._gone: deque[int] = deque()
        self._lock = threading.RLock()

    @property
    def usage(self) -> Usage:
        """What lives now."""
        self.settle()
        return Usage(**self._bytes)

    def restart(self) -> None:
        """Forget timeline and peak; what lives stays counted."""
        with self._lock:
            self.settle()
            self.timeline.clear()
            self.peak = Moment("", Usage(**self._bytes))

    def settle(self) -> None:
        """Take off what has been freed."""
        with self._lock:
            changed = False
            while self._gone:
                held = self._held.pop(self._gone.popleft())
                self._bytes[held.kind] -= held.size
                changed = True
            if changed:
                self._note()

    def add(self, tensor: Tensor, category: Category, *, claim: bool, fresh: bool = False) -> None:
        """Count a tensor's storage.

        Args:
            tensor: Any; those without memory are passed over.
            category: What a storage that is new here is for.
            claim: Whether a known storage is moved to ``category``.
            fresh: Whether an operation has just made it, so that it is no mapped file.
        """
        storage = _storage(tensor)
        if storage is None:
            return
        with self._lock:
            self.settle()
            key, size = storage._cdata, storage.nbytes()
            held = self._held.get(key)
            if held is None:
                kind = self._kind(tensor, category, fresh)
                if kind is None or not size:
                    return
                gone = self._gone
                alive = weakref.ref(storage, lambda _: gone.append(key))
                held = self._held[key] = _Held(kind, 0, alive)
            elif claim and held.kind in CATEGORIES and held.kind != category:
                self._bytes[held.kind] -= held.size
                held.kind, held.size = category, 0
            if held.size != size:
                self._bytes[held.kind] += size - held.size
                held.size = size
                self._note()

    def _kind(self, tensor: Tensor, category: Category, fresh: bool) -> str | None:
        traced = isinstance(tensor, FakeTensor)
        device = tensor.fake_device if traced else tensor.device
        if device.type == "cpu":
            if not fresh and not traced and is_file_mapped(tensor):
                return "mapped"
            return category if self.device.type == "cpu" else "host"
        return category if device.type == self.device.type else None

    def _note(self) -> None:
        usage = Usage(**self._bytes)
        moment = Moment(self.operation, usage, time.perf_counter())
        self.timeline.append(moment)
        if usage.total > self.peak.usage.total:
            self.peak = moment


def _storage(tensor: Tensor) -> Any:
    """A tensor's storage; ``None`` where it has none."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:  # sparse tensors and the like
        return None


def is_file_mapped(tensor: Tensor) -> bool:
    """Whether a CPU tensor's memory is a file's on a disk, mapped: page cache, not the process's.

    Args:
        tensor: With values.

    Returns:
        False where the system does not say (it is asked on Linux; elsewhere PyTorch knows of files
        that it mapped itself).
    """
    storage = tensor.untyped_storage()
    if storage.filename is not None:
        return not storage.filename.startswith(_IN_MEMORY)
    if storage.nbytes() < _PAGE or not _MAPS.is_file():
        return False
    address = storage.data_ptr()
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        where, _, _, _, _, *name = line.split(maxsplit=5)
        first, last = (int(each, 16) for each in where.split("-"))
        if first <= address < last:
            return bool(name) and not name[0].startswith(_IN_MEMORY)
    return False
