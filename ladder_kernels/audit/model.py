"""A time for a launch from its machine code and published rates: *modelled*, never measured.

Four parts of a multiprocessor work at the same time, and the busiest of them sets the pace:

    matrix   operations of matrix instructions / their rate
    issue    instructions of all warps / (4 schedulers, each one instruction a clock)
    shared   wavefronts of 128 bytes of shared memory, and shuffles, one a clock
    memory   bytes that must come from or go to the GPU's memory at least once / its bandwidth

The whole GPU takes turns of as many programs as fit it; a last turn that is not full costs as much
as a full one. Latencies, caches, clocks under load and bank conflicts are not in the model: it is a
lower bound, good for saying what bounds a kernel and for ranking configurations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ladder_kernels.audit.binary import Binary, Instructions
from ladder_kernels.audit.targets import Device, target_of

__all__ = ["Work", "modelled_seconds", "wavefronts"]

_SCHEDULERS = 4
_WAVEFRONT = 128


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a launch does, whatever the code.

    Attributes:
        operations: Floating-point operations of its matrix products (2 for each multiplication with
            its addition).
        moved: Bytes that it must read and write at least.
        trips: How often a program goes through its inner loop.
        int8: Whether the products are of int8.
    """

    operations: float
    moved: float
    trips: float
    int8: bool = False


def modelled_seconds(
    binary: Binary, work: Work, device: Device, *, programs: int, warps: int
) -> Mapping[str, float]:
    """Seconds that each part of the GPU is busy; the largest is the modelled time.

    Args:
        binary: Compiled for the device's target.
        work: What the launch does.
        device: The GPU.
        programs: Of the launch.
        warps: Of a program.

    Returns:
        Seconds by "matrix", "issue", "shared" and "memory".
    """
    target = target_of(device.target)
    resident = max(1, binary.resident_warps(target, warps) // warps)
    turns = math.ceil(programs / (resident * device.multiprocessors))
    filled = programs / (turns * resident * device.multiprocessors)
    # Clocks of one multiprocessor over all its turns.
    at_once = turns * resident * warps
    loop, whole = binary.loop, binary.whole

    def over(count: float, in_loop: float) -> float:
        return count + in_loop * (work.trips - 1)

    issued = over(whole.total, loop.total if loop else 0) * at_once / _SCHEDULERS
    shared = over(wavefronts(whole), wavefronts(loop) if loop else 0) * at_once
    rate = device.int8 if work.int8 else device.bf16
    return {
        "matrix": work.operations / (rate * device.multiprocessors * device.clock) / filled,
        "issue": issued / device.clock,
        "shared": shared / device.clock,
        "memory": work.moved / device.bandwidth,
    }


def wavefronts(code: Instructions) -> float:
    """Clocks of a multiprocessor's shared memory that a warp needs, without bank conflicts."""
    return sum(count * _of_one(name) for name, count in code.names.items())


def _of_one(name: str) -> float:
    base = name.split(".")[0]
    if base == "SHFL":
        return 1
    if base in ("LDSM", "STSM"):
        parts = re.search(r"\.MT?88(?:\.([24]))?", name)
        return int(parts[1]) if parts and parts[1] else 1
    if base in ("LDS", "STS", "LDGSTS"):
        width = re.search(r"\.(64|128)\b", name)
        return max(1, (int(width[1]) // 8 * 32 // _WAVEFRONT) if width else 1)
    return 0
