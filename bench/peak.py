"""What the processor can do at most, measured by ``peak.cpp``."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak"]

_FLAGS = {"avx2": ["-mavx2", "-mfma"], None: ["-march=native"]}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Upper bounds of this processor.

    Attributes:
        flops: fp32 operations a second; a multiply-add is two.
        bytes_read: Bytes read from memory a second.
    """

    flops: float
    bytes_read: float

    @classmethod
    def measure(cls, threads: int, isa: str | None = None) -> Peak:
        """Compile the loops for this processor (or ``isa``) and run them.

        Raises:
            RuntimeError: There is no C++ compiler, or it fails.
        """
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            raise RuntimeError("the benchmark needs a C++ compiler to measure this machine's peaks")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "peak.so"
            source = str(Path(__file__).with_suffix(".cpp"))
            flags = ["-O3", *_FLAGS[isa], "-ffast-math", "-shared", "-fPIC", "-pthread"]
            subprocess.run([compiler, *flags, source, "-o", str(library)], check=True)
            loops = ctypes.CDLL(str(library))
        loops.peak_flops.restype = loops.peak_read.restype = ctypes.c_double
        loops.peak_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        data = torch.ones(1 << 27)
        return cls(
            flops=loops.peak_flops(threads),
            bytes_read=loops.peak_read(data.data_ptr(), data.nbytes, threads),
        )
