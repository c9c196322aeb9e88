"""The least time that an operation could take: its multiply-adds and its bytes at the peak rates.

Peaks are measured on the device itself, on a CPU by small loops (``peak.cpp``), on a GPU by a large
matrix product of each kind and a copy. Machines drift, so they are measured before, among and after
the operations, and the best of all tries counts. On a CPU the rate of reading depends on where the
bytes lie: an operation's are held against that of as many bytes (or somewhat fewer) as all
candidates of a turn go through, read again and again, which come from caches if they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.peak import KINDS, Peak

__all__ = ["Ideal", "Roofline", "gpu_peak"]

_PRODUCT = 8192
_COPIED = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Ideal:
    """What an operation must do at least, however it is written.

    Attributes:
        flops: Of its products; a multiply-add is two.
        bytes_moved: Of inputs and results, once each.
        kind: Of its multiply-adds: one of :data:`~bench.peak.KINDS`.
    """

    flops: float
    bytes_moved: float
    kind: str

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.bytes_moved


class Roofline:
    """The peaks of a device: the best of those measured so far.

    Args:
        measure: Measures them once.

    Attributes:
        flops: Operations a second by kind.
        bytes_read: Bytes a second by the size of what is read.
    """

    def __init__(self, measure: Callable[[], Peak]) -> None:
        self._measure = measure
        self.flops: dict[str, float] = {}
        self.bytes_read: dict[int, float] = {}

    @classmethod
    def of(cls, device: torch.device, isa: str | None = None) -> Roofline:
        """That of a GPU, or of this processor on as many threads as PyTorch has."""
        if device.type == "cuda":
            return cls(lambda: gpu_peak(device))
        return cls(lambda: Peak.measure(torch.get_num_threads(), isa))

    def measure(self) -> None:
        """Measure once more."""
        found = self._measure()
        for kind, rate in found.flops.items():
            self.flops[kind] = max(rate, self.flops.get(kind, 0.0))
        for size, rate in found.bytes_read.items():
            self.bytes_read[size] = max(rate, self.bytes_read.get(size, 0.0))

    @property
    def memory(self) -> float:
        """Bytes a second from memory."""
        return self.bytes_read[max(self.bytes_read)]

    def bandwidth(self, size: float) -> float:
        """Bytes a second of reading ``size`` bytes again and again; rather too many than too few.

        That of the largest measured size that is no larger, or of a still larger one.
        """
        smaller = (known for known in self.bytes_read if known <= size)
        floor = max(smaller, default=min(self.bytes_read))
        return max(rate for known, rate in self.bytes_read.items() if known >= floor)

    def bound(self, ideal: Ideal, between: float = 0.0) -> float:
        """Seconds that an operation takes at least.

        Args:
            ideal: What it must do.
            between: Bytes that others go through before it comes again.
        """
        reading = ideal.bytes_moved / self.bandwidth(ideal.bytes_moved + between)
        return max(ideal.flops / self.flops[ideal.kind], reading)


def gpu_peak(device: torch.device) -> Peak:
    """What a GPU does in PyTorch's own products and copies of much.

    A kind that it has no product for has float32's rate. A copy's bytes are read and written.
    """
    from triton.testing import do_bench

    def rate(work: float, call: Callable[[], object]) -> float:
        milliseconds: Any = do_bench(call, return_mode="min")
        return work / (milliseconds / 1e3)

    flops = {}
    for kind in KINDS:
        a = torch.ones(_PRODUCT, _PRODUCT, device=device, dtype=getattr(torch, kind))
        product = torch.ops.aten._int_mm if kind == "int8" else torch.mm
        try:
            flops[kind] = rate(2 * _PRODUCT**3, lambda a=a, mm=product: mm(a, a))
        except RuntimeError:  # the build or the device has none
            flops[kind] = flops["float32"]
    data = torch.ones(_COPIED // 4, device=device)
    other = torch.empty_like(data)
    read = rate(2 * data.nbytes, lambda: other.copy_(data))
    return Peak(flops=flops, bytes_read={_COPIED: read})
