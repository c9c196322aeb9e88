"""The native CPU library: finding it, loading it, and what it can do.

``csrc/`` is compiled into one shared library that is installed beside this file. It is loaded when
an operation first needs it, never at import. Environment: ``LADDER_KERNELS_CPU_ISA`` names the
instruction set variant to use instead of the best that the processor runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ladder_kernels import __version__
from ladder_kernels.errors import ConfigError

__all__ = [
    "ABI_VERSION",
    "ISA_VARIABLE",
    "MODULE",
    "DenseMatrix",
    "NF4Matrix",
    "RungTap",
    "Status",
    "Strides",
    "library",
    "load",
    "share_threads",
    "status",
]

ABI_VERSION = 9
"""The interface (``csrc/include/ladder_kernels.h``) that this package calls."""

ISA_VARIABLE = "LADDER_KERNELS_CPU_ISA"
"""Environment variable that forces an instruction set variant."""

MODULE = "ladder_kernels.native._library"
"""Name under which importlib finds the library's file."""


class NF4Matrix(ctypes.Structure):
    """``lk_nf4_matrix``: pointers to an NF4 weight's tensors, and its sizes."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("absmax_q8", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_code", ctypes.c_void_p),
        ("nested_offset", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("blocksize", ctypes.c_int64),
    )


class DenseMatrix(ctypes.Structure):
    """``lk_dense_matrix``: a pointer to floats, their dtype, and sizes."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


class RungTap(ctypes.Structure):
    """``lk_rung_tap``: what a rung reads of one layer, its projection, and the gradient's place."""

    _fields_ = (
        ("tap", DenseMatrix),
        ("down", DenseMatrix),
        ("ddown", ctypes.c_void_p),
    )


class Strides(ctypes.Structure):
    """``lk_strides``: elements from one batch entry, head and token to the next."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class Status:
    """Whether native kernels run here.

    Attributes:
        available: Whether they do.
        reason: Why not; ``None`` if they do.
        version: Release that the library was built from; ``None`` if there is none.
        isa: Instruction set in use, such as ``"avx2"``; ``None`` if there is none.
        isas: The variants that this processor runs, best first.
        path: The library's file, found or not loadable; ``None`` if there is none.
        shares_threads: Whether kernels run on PyTorch's own OpenMP threads; else on a pool of
            theirs.
    """

    available: bool
    reason: str | None = None
    version: str | None = None
    isa: str | None = None
    isas: tuple[str, ...] = ()
    path: str | None = None
    shares_threads: bool = False


def status() -> Status:
    """Load the library, the first time, and say whether it can be used.

    Raises:
        ConfigError: ``LADDER_KERNELS_CPU_ISA`` names a variant that this processor does not run.
    """
    return load()[1]


def library() -> ctypes.CDLL | None:
    """Return the loaded library with its functions' types declared; ``None`` if there is none.

    Raises:
        ConfigError: As :func:`status`.
    """
    return load()[0]


@functools.cache
def load() -> tuple[ctypes.CDLL | None, Status]:
    """Load the library, once: what :func:`library` and :func:`status` return."""
    spec = importlib.util.find_spec(MODULE)
    path = None if spec is None else spec.origin
    if path is None:
        return None, Status(
            available=False,
            reason="the native library is not installed (it is compiled when the package is "
            "installed where there is a C++17 compiler)",
        )

    def unusable(reason: str) -> tuple[None, Status]:
        return None, Status(available=False, path=path, reason=reason)

    if not _is_whole(Path(path)):
        return unusable(f"the native library is truncated ({path}); install the package again")
    try:
        loaded = ctypes.CDLL(path)
        loaded.lk_abi_version.restype = ctypes.c_int32
        loaded.lk_version.restype = ctypes.c_char_p
        abi, version = loaded.lk_abi_version(), loaded.lk_version().decode()
    except (OSError, AttributeError, UnicodeDecodeError) as error:
        return unusable(f"the native library cannot be loaded ({error})")
    if (abi, version) != (ABI_VERSION, __version__):
        return unusable(
            f"the native library is of release {version} (interface {abi}), this package of "
            f"release {__version__} (interface {ABI_VERSION}); install the package again"
        )
    _declare(loaded)
    isas = tuple(loaded.lk_isas().decode().split())
    forced = os.environ.get(ISA_VARIABLE)
    if forced and loaded.lk_set_isa(forced.encode()) != 0:
        raise ConfigError(
            f"{ISA_VARIABLE} is {forced!r}; this processor and library have {', '.join(isas)}"
        )
    return loaded, Status(
        available=True,
        version=version,
        isa=loaded.lk_isa().decode(),
        isas=isas,
        path=path,
        shares_threads=share_threads(loaded),
    )


def share_threads(loaded: ctypes.CDLL) -> bool:
    """Have kernels run on PyTorch's OpenMP threads, and say whether they do.

    Those spin for some milliseconds after each of PyTorch's operations, and where there are no more
    cores than threads, any of another pool would wait for them. The runtime is found through
    PyTorch's library, since a process may have loaded several.
    """
    import torch

    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        region = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).GOMP_parallel
    except (AttributeError, OSError):  # no OpenMP in this build of PyTorch, or none of this kind
        return False
    loaded.lk_set_parallel_region.argtypes = [ctypes.c_void_p]
    loaded.lk_set_parallel_region.restype = None
    loaded.lk_set_parallel_region(ctypes.cast(region, ctypes.c_void_p))
    return True


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to the end of its section table, which linkers put last.

    The system's loader maps a truncated file without complaint, and the process dies when it
    touches what is missing. Files of other systems are left to their loaders.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":
        return True
    offset = int.from_bytes(header[40:48], sys.byteorder)
    entry_size, entries = (int.from_bytes(header[i : i + 2], sys.byteorder) for i in (58, 60))
    return path.stat().st_size >= offset + entry_size * entries


def _declare(loaded: ctypes.CDLL) -> None:
    matrix, strides = ctypes.POINTER(NF4Matrix), ctypes.POINTER(Strides)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name in ("lk_isa", "lk_isas"):
        getattr(loaded, name).restype = ctypes.c_char_p
    linear = (matrix, number, size, pointer, size, pointer, pointer, size, pointer, number)
    swiglu = (matrix, matrix, number, size, pointer, size, pointer, number)
    attention = (
        *(number, size, size, size, size, size, size),
        *(pointer, strides, pointer, strides, pointer, strides, pointer, ctypes.c_float),
    )
    signatures = {
        "lk_set_isa": (ctypes.c_char_p,),
        "lk_nf4_linear": linear,
        "lk_nf4_linear_int8": linear,
        "lk_nf4_linear_transposed": (matrix, matrix, number, size, pointer, size, pointer, number),
        "lk_linear_cross_entropy": (
            *(matrix, ctypes.POINTER(DenseMatrix), number, pointer, size, pointer, pointer, size),
            *(ctypes.c_float, ctypes.c_float, pointer, pointer, pointer, size, number),
        ),
        "lk_ranged_attention": (*attention, pointer, pointer, number),
        "lk_ranged_attention_backward": (*attention, *[pointer] * 6, number),
        "lk_nf4_quantize": (number, pointer, size, size, pointer, pointer, number),
        "lk_nf4_quantize_absmax": (
            *(pointer, size, ctypes.c_float, pointer, pointer, pointer, number),
        ),
        "lk_nf4_dequantize": (matrix, number, size, size, pointer, number),
        "lk_nf4_swiglu": swiglu,
        "lk_nf4_swiglu_int8": swiglu,
        "lk_rms_norm": (
            *(number, size, size, pointer, size, pointer, size, pointer, ctypes.c_float),
            *(pointer, pointer, number),
        ),
        "lk_rms_norm_backward": (
            *(number, size, size, pointer, size, pointer, size, pointer, ctypes.c_float),
            *(pointer, pointer, number),
        ),
        "lk_rung_merge": (
            *(number, size, size, pointer, size, ctypes.POINTER(RungTap), size, pointer, size),
            *(ctypes.c_float, pointer, number),
        ),
        "lk_rung_merge_backward": (
            *(number, size, size, pointer, size, pointer, size, ctypes.POINTER(RungTap), size),
            *(pointer, size, ctypes.c_float, pointer, pointer, number),
        ),
        "lk_low_rank_narrow": (number, *[size] * 3, pointer, size, pointer, pointer, number),
        "lk_low_rank_widen": (number, *[size] * 3, pointer, pointer, number, pointer, number),
        "lk_low_rank_gradient": (number, *[size] * 3, pointer, pointer, size, pointer, number),
        "lk_swiglu": (number, size, pointer, pointer, number),
        "lk_swiglu_backward": (number, size, pointer, pointer, pointer, number),
        "lk_rotary": (
            *(number, size, size, size, size, pointer, strides, pointer, pointer, strides, number),
        ),
    }
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes = list(arguments)
        function.restype = number
