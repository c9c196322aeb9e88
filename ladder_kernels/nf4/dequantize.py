"""From NF4 bits back to floats, for any range of a tensor.

    value = centroid * scale                  float32, rounded once to the output dtype
    scale = absmax                            or, with double quantisation,
    scale = round(map[q8] * absmax2) + offset the product rounded before the sum

Only the bytes and scales that a range needs are read, and nothing depends on the data, so that all
of it traces under ``torch.compile`` and runs on tensors without values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.nf4.codebook import nf4_code
from ladder_kernels.nf4.quantize import NESTED_BLOCKSIZE

__all__ = ["dequantize_range", "dequantize_scales"]


def dequantize_range(
    packed: Tensor, absmax: Tensor, blocksize: int, start: int, stop: int, *, first_block: int = 0
) -> Tensor:
    """Dequantise the elements ``start`` to ``stop`` (exclusive) of the flattened tensor.

    Args:
        packed: uint8 ``[ceil(numel / 2)]``.
        absmax: float32 scales of blocks ``first_block`` onwards.
        blocksize: Elements that share a scale.
        start: First element.
        stop: One past the last element.
        first_block: Which block ``absmax[0]`` belongs to.

    Returns:
        float32 ``[stop - start]``, a new contiguous tensor (or a view of one).
    """
    first_byte = start // 2
    pairs = _pair_table(packed.device)
    index = packed[first_byte : (stop + 1) // 2].to(torch.int32)
    values = pairs.index_select(0, index).view(torch.float32)
    offset = start - 2 * first_byte
    values = values[offset : offset + stop - start]
    return _multiply_blocks(values, absmax, blocksize, start - first_block * blocksize)


def dequantize_scales(
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_code: Tensor,
    nested_offset: Tensor,
    first: int,
    last: int,
) -> Tensor:
    """Return the scales of blocks ``first`` to ``last`` (exclusive) of double quantisation.

    Args:
        absmax: uint8 ``[blocks]``.
        nested_absmax: float32 ``[ceil(blocks / 256)]``.
        nested_code: float32 ``[256]``.
        nested_offset: float32 ``[]``.
        first: First block.
        last: One past the last block.

    Returns:
        float32 ``[last - first]``.
    """
    scales = nested_code.index_select(0, absmax[first:last].to(torch.int32))
    _multiply_blocks(scales, nested_absmax, NESTED_BLOCKSIZE, first)
    return scales.add_(nested_offset)


def _pair_table(device: torch.device) -> Tensor:
    """Two centroids for each byte, as one 8-byte number ``[256]``: one look-up gives both."""
    code = nf4_code(device)
    high, low = code.repeat_interleave(16), code.repeat(16)
    return torch.stack((high, low), dim=1).view(torch.int64).view(-1)


def _multiply_blocks(values: Tensor, scales: Tensor, blocksize: int, start: int) -> Tensor:
    """Multiply in place; ``values[0]`` is element ``start`` of what ``scales[0]`` begins."""
    length = values.shape[0]
    block = start // blocksize
    head = min(-start % blocksize, length)
    if head:
        values[:head] *= scales[block]
        block += 1
    whole = (length - head) // blocksize
    if whole:
        middle = values[head : head + whole * blocksize].view(whole, blocksize)
        middle *= scales[block : block + whole].view(whole, 1)
    if head + whole * blocksize < length:
        values[head + whole * blocksize :] *= scales[block + whole]
    return values
