"""Holding processes to an older instruction set, to measure what older processors would do.

PyTorch, oneDNN, MKL, OpenBLAS and this library take it from the environment when they start, so it
is for processes to come. The machine code of bitsandbytes' own library is not held down.
"""

from __future__ import annotations

__all__ = ["ISAS", "held", "held_suffix"]

_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "LADDER_KERNELS_CPU_ISA": "avx2",
}
_VARIABLES = {
    "avx2": _AVX2,
    "avx2_vnni": _AVX2 | {"LADDER_KERNELS_CPU_ISA": "avx2_vnni"},
}

ISAS = tuple(_VARIABLES)
"""What processes can be held to; "avx2_vnni" is AVX2 with the 256-bit form of VNNI, ours alone."""


def held(isa: str | None) -> dict[str, str]:
    """Environment variables that hold a process to ``isa``; none for ``None``."""
    return {} if isa is None else dict(_VARIABLES[isa])


def held_suffix(isa: str | None) -> str:
    """What the device's name in a row ends with."""
    return "" if isa is None else f", held to {isa.upper().replace('_', ' with ')}"
