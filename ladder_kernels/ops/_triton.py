"""What the Triton launchers of operations share: which tensors their kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.launch import host, launch, missing

__all__ = ["DTYPES", "host", "launch", "missing", "unsupported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What kernels compute with."""


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
