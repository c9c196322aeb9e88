"""The GPUs that kernels are compiled for, and what their makers publish about them.

A target is an instruction set with the limits of one multiprocessor (on AMD, a compute unit). A
device is a product; its rates are those of data sheets and architecture white papers, for dense
matrices with sums in float32 (GeForce cards run bfloat16 at half the rate of sums in float16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ladder_kernels.errors import ConfigError

__all__ = ["DEVICES", "TARGETS", "Device", "Target", "target_of"]

_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Target:
    """What code is generated for.

    Attributes:
        name: ``"sm_86"``, ``"gfx942"``.
        vendor: Whose.
        shared_limit: Bytes of shared memory that one program can have.
        shared_size: Bytes of shared memory of a multiprocessor.
        registers: 32-bit registers of a multiprocessor.
        most_registers: Of one thread.
        most_warps: Resident on a multiprocessor.
        warp: Threads of a warp.
        matrix_units: Whether there are instructions that multiply matrices of bfloat16 and int8.
    """

    name: str
    vendor: Literal["nvidia", "amd"] = "nvidia"
    shared_limit: int
    shared_size: int
    registers: int = 65536
    most_registers: int = 255
    most_warps: int
    warp: int = 32
    matrix_units: bool = True


@dataclass(frozen=True, kw_only=True)
class Device:
    """A product, by published figures.

    Attributes:
        name: As it is sold.
        target: Name of its :class:`Target`.
        multiprocessors: How many.
        clock: In Hz, under load (boost).
        bf16: Floating-point operations of matrix instructions a clock and multiprocessor.
        int8: The same for int8.
        bandwidth: Of its memory, bytes a second.
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    bf16: int
    int8: int
    bandwidth: float


def _nvidia(name: str, *, limit: int, size: int, warps: int, matrix: bool = True) -> Target:
    return Target(
        name=name,
        shared_limit=limit * _KIB,
        shared_size=size * _KIB,
        most_warps=warps,
        matrix_units=matrix,
    )


def _amd(name: str, *, registers: int, most: int, warps: int, warp: int) -> Target:
    return Target(
        name=name,
        vendor="amd",
        shared_limit=64 * _KIB,
        shared_size=64 * _KIB,
        registers=registers,
        most_registers=most,
        most_warps=warps,
        warp=warp,
    )


TARGETS = {
    target.name: target
    for target in (
        # Turing multiplies float16 and int8 only, and Triton leaves both to ordinary instructions.
        _nvidia("sm_75", limit=64, size=64, warps=32, matrix=False),
        _nvidia("sm_80", limit=163, size=164, warps=64),
        _nvidia("sm_86", limit=99, size=100, warps=48),
        _nvidia("sm_89", limit=99, size=100, warps=48),
        _nvidia("sm_90", limit=227, size=228, warps=64),
        _nvidia("sm_100", limit=227, size=228, warps=64),
        _nvidia("sm_120", limit=99, size=100, warps=48),
        _amd("gfx90a", registers=4 * 512 * 64, most=512, warps=32, warp=64),
        _amd("gfx942", registers=4 * 512 * 64, most=512, warps=32, warp=64),
        _amd("gfx1100", registers=2 * 1536 * 32, most=256, warps=32, warp=32),
        _amd("gfx1201", registers=2 * 1536 * 32, most=256, warps=32, warp=32),
    )
}
"""Every target by name."""

DEVICES = (
    Device(
        name="RTX 3060", target="sm_86", multiprocessors=28, clock=1.777e9,
        bf16=512, int8=2048, bandwidth=360e9,
    ),
    Device(
        name="RTX 4070", target="sm_89", multiprocessors=46, clock=2.475e9,
        bf16=512, int8=2048, bandwidth=504.2e9,
    ),
    Device(
        name="RTX 4090", target="sm_89", multiprocessors=128, clock=2.52e9,
        bf16=512, int8=2048, bandwidth=1008e9,
    ),
    Device(
        name="RTX 5090", target="sm_120", multiprocessors=170, clock=2.407e9,
        bf16=512, int8=2048, bandwidth=1792e9,
    ),
    Device(
        name="A100", target="sm_80", multiprocessors=108, clock=1.41e9,
        bf16=2048, int8=4096, bandwidth=2039e9,
    ),
    Device(
        name="H100", target="sm_90", multiprocessors=132, clock=1.83e9,
        bf16=4096, int8=8192, bandwidth=3352e9,
    ),
)  # fmt: skip
"""Devices that times are modelled for."""


def target_of(name: str) -> Target:
    """The target of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in TARGETS:
        raise ConfigError(f"target '{name}': found no such target; there are {', '.join(TARGETS)}")
    return TARGETS[name]
