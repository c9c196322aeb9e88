"""The most memory that was in use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["peak_memory_bytes"]

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory that was in use so far.

    Args:
        device: On a GPU: the most that tensors took there, since the process started or
            ``torch.cuda.reset_peak_memory_stats``. Elsewhere: the process's largest resident set,
            code and libraries included.

    Returns:
        Bytes.
    """
    import torch

    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place)
    if _STATUS.is_file():
        # Not getrusage's figure: that one survives exec and so counts the parent process too.
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _peak_elsewhere()


def _peak_elsewhere() -> int:
    """The peak where there is no /proc."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
