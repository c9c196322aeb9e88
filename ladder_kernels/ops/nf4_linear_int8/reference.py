"""A product with an NF4 weight ``W`` ``[N, K]`` in whole numbers ("W4A8"), in plain PyTorch.

    a[m, b] = max over k in b of |x[m, k]|       b: a block of W, `blocksize` elements of a row
    q[m, k] = round(x[m, k] * (127 / a[m, b]))   t[m, b] = a[m, b] / 127
    c[n, k] = round(127 * centroid of W[n, k])   s[n, b] = scale of block b of row n
    i[m, n, b] = sum over k in b of q[m, k] c[n, k]
    out[m, n] = (sum_b s[n, b] t[m, b] i[m, n, b]) / 127 (+ bias[n]) (+ residual[m, n])

``q`` and ``c`` are whole numbers from -127 to 127 (ties are rounded to even) and ``i`` is exact.
Everything else is float32 (float64 for float64), with one rounding to x's dtype at the end. Blocks
of zeros, or so small that ``127 / a`` is infinite, count as zeros; rows with NaN or infinity give
NaN. (Sums are 127 times the result: float32 overflows that much earlier.)

A scale for each token and block, since outliers sit in few channels (LLM.int8(), arXiv:2208.07339):
one of them then spoils its block only, where a scale for the whole token spoils every channel.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.dequantize import dequantize_scales
from ladder_kernels.ops._numeric import accumulation_dtype, blocks

__all__ = [
    "BLOCK_NUMBERS",
    "LARGEST",
    "block_sums",
    "codes_of_rows",
    "nf4_linear_int8",
    "product_rows",
    "quantize_rows",
    "rows_at_a_time",
    "scales_of_rows",
]

LARGEST = 127
"""Largest magnitude of a quantised activation or centroid."""

BLOCK_NUMBERS = 1 << 22
"""Numbers of ``i`` that exist at a time, unless one row of W has more."""

_EXACT_IN_FLOAT32 = (1 << 24) // LARGEST**2


def quantize_rows(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Round rows to 8 bits, block by block.

    Args:
        x: ``[M, K]``, floating; ``K`` is a multiple of ``blocksize``.
        blocksize: Elements that share a scale.

    Returns:
        ``q`` int8 ``[M, K]``, and ``t`` ``[M, K / blocksize]`` in float32 (float64 for float64),
        NaN for blocks with NaN or infinity.
    """
    shape = x.shape[0], x.shape[1] // blocksize, blocksize
    wide = x.to(accumulation_dtype(x.dtype)).reshape(shape)
    most = wide.abs().amax(2)
    by = torch.full_like(most, LARGEST) / most  # a number over a tensor would be rounded twice
    counts = most.isfinite() & by.isfinite()
    q = torch.where(counts[..., None], (wide * by[..., None]).round(), 0).to(torch.int8)
    steps = torch.where(counts, most / torch.full_like(most, LARGEST), 0)
    return q.view(x.shape), torch.where(most.isfinite(), steps, torch.nan)


def codes_of_rows(weight: NF4Weight, start: int, stop: int) -> Tensor:
    """Return ``c`` of rows ``start`` to ``stop``: int8 ``[stop - start, K]``."""
    ones = torch.ones(weight.absmax.shape, device=weight.device)
    bare = replace(weight, absmax=ones, nested_absmax=None, nested_code=None, nested_offset=None)
    return (LARGEST * bare.dequantize_rows(start, stop, torch.float32)).round().to(torch.int8)


def scales_of_rows(weight: NF4Weight, start: int, stop: int) -> Tensor:
    """Return ``s`` of rows ``start`` to ``stop``: float32 ``[stop - start, blocks of a row]``."""
    of_row = weight.shape[1] // weight.blocksize
    first, last = start * of_row, stop * of_row
    if weight.nested_absmax is None or weight.nested_code is None or weight.nested_offset is None:
        scales = weight.absmax[first:last]
    else:
        nested = (weight.nested_absmax, weight.nested_code, weight.nested_offset)
        scales = dequantize_scales(weight.absmax, *nested, first, last)
    return scales.view(stop - start, of_row)


def block_sums(q: Tensor, codes: Tensor, blocksize: int) -> Tensor:
    """Return ``i`` of int8 ``[M, K]`` and ``[N, K]``: whole numbers, in floats, ``[M, N, B]``.

    Float32 holds sums of up to 1040 products exactly, float64 those of larger blocks.
    """
    exact = torch.float32 if blocksize <= _EXACT_IN_FLOAT32 else torch.float64
    blocks_of_row = q.shape[1] // blocksize, blocksize
    a = q.to(exact).unflatten(1, blocks_of_row).transpose(0, 1)
    b = codes.to(exact).unflatten(1, blocks_of_row).permute(1, 2, 0)
    return torch.bmm(a, b).permute(1, 2, 0)


def rows_at_a_time(count: int, weight: NF4Weight) -> int:
    """Rows of W whose sums ``i`` with ``count`` rows of x are at most ``BLOCK_NUMBERS``, or one."""
    return max(1, BLOCK_NUMBERS // max(1, count * weight.shape[1] // weight.blocksize))


def product_rows(q: Tensor, steps: Tensor, weight: NF4Weight, start: int, stop: int) -> Tensor:
    """Return columns ``start`` to ``stop`` of the product, of ``q`` and ``t``, in t's dtype."""
    sums = block_sums(q, codes_of_rows(weight, start, stop), weight.blocksize).to(steps.dtype)
    sums *= steps[:, None] * scales_of_rows(weight, start, stop)
    return sums.sum(2) * (1 / LARGEST)


def nf4_linear_int8(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return about ``x @ W^T (+ bias) (+ residual)``.

    Args:
        x: ``[M, K]``, floating.
        weight: ``[N, K]``, its rows whole numbers of blocks.
        bias: ``[N]`` in x's dtype, or ``None``.
        residual: ``[M, N]`` in x's dtype, or ``None``.

    Returns:
        ``[M, N]`` in x's dtype, a new contiguous tensor.
    """
    q, steps = quantize_rows(x, weight.blocksize)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    for start, stop in blocks(weight.shape[0], rows_at_a_time(x.shape[0], weight)):
        part = product_rows(q, steps, weight, start, stop)
        if bias is not None:
            part += bias[start:stop]
        if residual is not None:
            part += residual[:, start:stop]
        out[:, start:stop] = part
    return out
