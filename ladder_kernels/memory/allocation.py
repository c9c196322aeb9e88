"""How the C library's allocator treats memory that was freed."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["return_freed_memory"]

# Of <malloc.h>.
_M_MMAP_THRESHOLD = -3


def return_freed_memory(at_least: int = 1 << 20) -> bool:
    """Let freed blocks go back to the system at once, in this process, from here on.

    By default, glibc cuts tensors of up to 32 MB out of one heap, whose holes stay the process's:
    what a training step keeps lies between what it frees, and the process takes hundreds of
    megabytes more than its tensors do. With this, each large block is a mapping of its own. That
    costs the system's time to fill new pages with zeros, so it is for when memory counts more.

    Args:
        at_least: Bytes of a block that is large.

    Returns:
        Whether the allocator took it: false where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, at_least))
