"""The memory that one call takes beyond what is there before it and what it returns. Linux only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from ladder_kernels.memory.peak import peak_memory_bytes

__all__ = ["bytes_beyond"]


def bytes_beyond(call: Callable[[], list[torch.Tensor]]) -> int:
    """Bytes of the process's largest resident set during ``call``, beyond inputs and outputs.

    Meant for a process of its own, in which no larger call was made: memory that the allocator kept
    from an earlier one would not be counted.

    Args:
        call: Returns its outputs, whose bytes are taken off.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the largest so far
    status = Path("/proc/self/status").read_text(encoding="ascii")
    before = re.search(r"VmRSS:\s+(\d+) kB", status)
    if before is None:
        raise RuntimeError("/proc/self/status has no VmRSS")
    outputs = call()
    most = peak_memory_bytes()
    return most - int(before[1]) * 1024 - sum(output.nbytes for output in outputs)
