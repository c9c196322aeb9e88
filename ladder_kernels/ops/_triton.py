"""What the Triton launchers of operations share: which tensors their kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.launch import host, launch, missing
from ladder_kernels.ops._numeric import flatten_rows

__all__ = ["DTYPES", "host", "launch", "missing", "rows", "unsupported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What kernels compute with."""


def rows(value: Tensor) -> Tensor:
    """View or copy ``[..., D]`` as ``[rows, D]`` with adjacent elements in a row."""
    flat = flatten_rows(value)
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def unsupported(*tensors: Tensor | None, products: bool = False) -> str | None:
    """Say why kernels cannot take these tensors; ``None`` if they can.

    Args:
        tensors: Floating operands; ``None`` is passed over.
        products: Whether the kernel multiplies matrices of them.
    """
    for value in tensors:
        if value is None:
            continue
        if value.dtype not in DTYPES:
            return f"the kernels take float16, bfloat16 and float32, not {value.dtype}"
        if products and value.dtype == torch.bfloat16 and host() == "interpreter":
            return "Triton's interpreter miscomputes matrix products of bfloat16"
    return None
