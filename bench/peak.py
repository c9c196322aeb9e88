"""What the processor can do at most, measured by ``peak.cpp``."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["KINDS", "Peak"]

KINDS = ("float32", "bfloat16", "int8")
"""Of multiply-adds."""

_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx2_vnni": ["-mavx2", "-mfma", "-mavxvnni"],
    None: ["-march=native"],
}
# From what fits into a core's own cache to what fits into none.
_SIZES = tuple(1 << power for power in range(18, 30))
_READ_AT_LEAST = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Upper bounds of this processor.

    Attributes:
        flops: Operations a second, by kind (:data:`KINDS`); a multiply-add is two. A kind without
            instructions of its own has float32's.
        bytes_read: Bytes read a second, by the size of what is read again and again: small ones
            come from caches, the largest from memory.
    """

    flops: dict[str, float]
    bytes_read: dict[int, float]

    @classmethod
    def measure(cls, threads: int, isa: str | None = None) -> Peak:
        """Run loops that were compiled for this processor (or for ``isa``).

        Raises:
            RuntimeError: There is no C++ compiler, or it fails.
        """
        loops = _loops(isa)
        flops = {kind: getattr(loops, f"peak_{kind}")(threads) for kind in KINDS}
        data = torch.ones(_SIZES[-1] // 4)
        read = {
            size: loops.peak_read(data.data_ptr(), size, max(1, _READ_AT_LEAST // size), threads)
            for size in _SIZES
        }
        return cls(
            flops={kind: found or flops["float32"] for kind, found in flops.items()},
            bytes_read=read,
        )


@functools.cache
def _loops(isa: str | None) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the benchmark needs a C++ compiler to measure this machine's peaks")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        source = str(Path(__file__).with_suffix(".cpp"))
        # Not -ffast-math: loading such a library makes the process take denormal numbers for zero.
        flags = ["-O3", *_FLAGS[isa], "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, source, "-o", str(library)], check=True)
        loops = ctypes.CDLL(str(library))
    for kind in KINDS:
        getattr(loops, f"peak_{kind}").restype = ctypes.c_double
    loops.peak_read.restype = ctypes.c_double
    loops.peak_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    return loops
