"""Quantising and dequantising on the native CPU kernels (``csrc/src/nf4_quantize.inc``).

The bits of ``quantize.py`` and ``dequantize.py``. The number of threads
(``torch.get_num_threads()``) changes no bit, but for the mean of many scales, which PyTorch sums.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.accounts import others_watch
from ladder_kernels.backend import get_backend, say_fallback
from ladder_kernels.errors import BackendError
from ladder_kernels.native.tensors import DTYPES, NOT_FINITE, check, library, matrix
from ladder_kernels.nf4.codebook import dynamic_code
from ladder_kernels.nf4.quantize import (
    GRID_POINTS,
    NESTED_BLOCKSIZE,
    has_values,
    mean_of_scales,
    nearest_code,
    non_finite,
)

if TYPE_CHECKING:
    from ladder_kernels.nf4.weight import NF4Weight

__all__ = ["dequantize", "is_chosen", "quantize_absmax", "quantize_blocks"]


def is_chosen(tensor: Tensor, dtype: torch.dtype, *, name: str = "nf4") -> bool:
    """Whether native kernels shall do what is asked of ``tensor``, rather than the reference.

    Args:
        tensor: What is read.
        dtype: Of the floats that are read or made.
        name: What asks, for the exception.

    Returns:
        ``False`` for other devices and float64; where nothing is computed or someone watches how
        (compilers, tensors without values, dispatch modes that do more than count memory), since
        they cannot see into a native kernel; and under ``use_backend("reference")`` or
        ``("triton")``. Without a library, too: that is said aloud.

    Raises:
        BackendError: The backend is "cpu" and there is no library.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or dtype not in DTYPES:
        return False
    if others_watch() or not has_values(tensor):
        return False
    backend = get_backend()
    if backend not in ("auto", "cpu"):
        return False
    reason = native.status().reason
    if reason is None:
        return True
    if backend == "cpu":
        raise BackendError(f"{name}: backend 'cpu' cannot run this call: {reason}")
    say_fallback("cpu", reason)
    return False


def quantize_blocks(weight: Tensor, blocksize: int, *, name: str) -> tuple[Tensor, Tensor]:
    """Return ``packed`` and ``absmax``; as the reference's. Only a strided weight is copied."""
    flat = weight.reshape(-1).contiguous()
    numel = flat.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device="cpu")
    code = library().lk_nf4_quantize(
        DTYPES[flat.dtype],
        flat.data_ptr(),
        numel,
        blocksize,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    if code == NOT_FINITE:
        raise non_finite(weight, name)
    check(code)
    return packed, absmax


def quantize_absmax(absmax: Tensor, *, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the 8-bit scales, their scales, the map and the offset; as the reference's."""
    offset = mean_of_scales(absmax, name)
    quantised = torch.empty(absmax.shape, dtype=torch.uint8, device="cpu")
    groups = -(-absmax.numel() // NESTED_BLOCKSIZE)
    largest = torch.empty(groups, dtype=torch.float32, device="cpu")
    code = library().lk_nf4_quantize_absmax(
        absmax.data_ptr(),
        absmax.numel(),
        offset.item(),
        _grid().data_ptr(),
        quantised.data_ptr(),
        largest.data_ptr(),
        torch.get_num_threads(),
    )
    check(code)
    return quantised, largest, dynamic_code("cpu"), offset


def dequantize(weight: NF4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return the elements ``start`` to ``stop`` (exclusive) of the flattened tensor.

    Args:
        weight: Any.
        start: First element.
        stop: One past the last element.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[stop - start]``, a new tensor. No other memory is used.
    """
    out = torch.empty(stop - start, dtype=dtype, device="cpu")
    code = library().lk_nf4_dequantize(
        matrix(weight, (1, weight.numel)),
        DTYPES[dtype],
        start,
        stop - start,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(code)
    return out


@functools.cache
def _grid() -> Tensor:
    """The map's nearest value for each point of the grid, uint8 ``[65536]``."""
    points = torch.arange(GRID_POINTS, dtype=torch.int32, device="cpu")
    return nearest_code(points, dynamic_code("cpu"))
