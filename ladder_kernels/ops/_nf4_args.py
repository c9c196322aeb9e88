"""An :class:`NF4Weight` as arguments of a ``torch.library`` operator, whose schema knows tensors.

The order is fixed: packed, absmax, nested_absmax, nested_code, nested_offset, shape, blocksize.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ladder_kernels.nf4 import NF4Weight

__all__ = ["COUNT", "flatten", "rebuild", "schema"]

COUNT = 7
"""How many arguments one weight takes."""


def schema(prefix: str = "") -> str:
    """Return the piece of an operator schema that describes one weight."""
    return (
        f"Tensor {prefix}packed, Tensor {prefix}absmax, Tensor? {prefix}nested_absmax, "
        f"Tensor? {prefix}nested_code, Tensor? {prefix}nested_offset, SymInt[] {prefix}shape, "
        f"int {prefix}blocksize"
    )


def flatten(weight: NF4Weight) -> tuple[Any, ...]:
    """Return the weight's arguments, in the schema's order."""
    return (
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_code,
        weight.nested_offset,
        list(weight.shape),
        weight.blocksize,
    )


def rebuild(arguments: Sequence[Any], dtype: torch.dtype) -> NF4Weight:
    """Build the weight back from its arguments; ``dtype`` is what it dequantises to by default."""
    packed, absmax, nested_absmax, nested_code, nested_offset, shape, blocksize = arguments
    return NF4Weight(
        packed=packed,
        absmax=absmax,
        shape=tuple(shape),
        blocksize=blocksize,
        dtype=dtype,
        nested_absmax=nested_absmax,
        nested_code=nested_code,
        nested_offset=nested_offset,
    )
