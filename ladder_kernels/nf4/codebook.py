"""The two code tables of the format: NF4's 16 centroids and the 256 of the *dynamic* map.

NF4 is from QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E); the dynamic map, which
quantises the scales of double quantisation, from 8-bit optimizers (arXiv:2110.02861, section 1.3).
"""

from __future__ import annotations

import functools

import numpy as np
import torch

__all__ = ["NF4_VALUES", "dynamic_code", "nf4_code"]

NF4_VALUES: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The centroids, ascending; each is exactly a float32. Index 7 is zero."""

_DECADES = 7


def nf4_code(device: torch.device | str | None = None) -> torch.Tensor:
    """Return the NF4 centroids, ascending: float32 ``[16]`` on ``device``."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def dynamic_code(device: torch.device | str | None = None) -> torch.Tensor:
    """Return the signed 8-bit dynamic map, ascending: float32 ``[256]`` on ``device``.

    Seven decades; decade ``i`` covers ``10**(i-6) * [0.1, 1]`` with ``2**i`` values of each sign,
    the middles of as many equal intervals. Zero and one complete it.
    """
    return torch.tensor(_dynamic_values(), dtype=torch.float32, device=device)


@functools.cache
def _dynamic_values() -> tuple[float, ...]:
    # bitsandbytes takes the interval bounds from torch.linspace, whose last bits depend on the
    # CPU's vector unit. Here they are computed as torch does it with AVX2 and AVX-512 (fused
    # multiply-add from the nearer end), so that one model has the same bits on every machine.
    low, high = np.float32(0.1), np.float32(1.0)
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        intervals = 2**decade
        # float32 times a small integer is exact in float64: one rounding, as in a fused operation.
        step = np.float64((high - low) / np.float32(intervals))
        index = np.arange(intervals + 1)
        from_low = low + step * index
        from_high = high - step * (intervals - index)
        near_low = index < (intervals + 1) // 2
        bounds = np.where(near_low, from_low, from_high).astype(np.float32)
        middles = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - _DECADES + 1)) * middles
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return tuple(sorted(values))
