"""Tap stores by name."""

from __future__ import annotations

import os

from ladder_kernels.errors import ConfigError
from ladder_kernels.memory.taps import DeviceTaps, TapStore
from ladder_kernels.memory.taps_disk import DiskTaps
from ladder_kernels.memory.taps_host import HostTaps

__all__ = ["TAP_STORES", "tap_store_of"]

TAP_STORES = (DeviceTaps.name, HostTaps.name, DiskTaps.name)
"""Where taps can wait between the two passes, by name."""


def tap_store_of(
    taps: str | TapStore,
    *,
    cache: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> TapStore:
    """The store of a name; a store is returned as it is.

    Args:
        taps: One of :data:`TAP_STORES`, or a store.
        cache: For "disk": the folder of its files.
        limit: For "disk": most bytes of those.

    Raises:
        ConfigError: If there is none of that name, "disk" has no folder, or another has one.
    """
    if taps == DiskTaps.name:
        if cache is None:
            raise ConfigError("tap_cache: found nothing; taps 'disk' need a folder to be kept in")
        return DiskTaps(cache, limit=limit)
    for name, value in (("tap_cache", cache), ("tap_cache_bytes", limit)):
        if value is not None:
            raise ConfigError(f"{name}: found {value!s}, but taps are {taps!r}; it is for 'disk'")
    if isinstance(taps, TapStore):
        return taps
    if taps not in TAP_STORES:
        allowed = ", ".join(map(repr, TAP_STORES))
        raise ConfigError(f"taps: found {taps!r}; allowed are {allowed}")
    return DeviceTaps() if taps == DeviceTaps.name else HostTaps()
