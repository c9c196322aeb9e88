"""What the Triton launchers of operations share: which tensors their kernels take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ladder_kernels.launch import architecture, host, launch, missing
from ladder_kernels.ops._numeric import flatten_rows

__all__ = [
    "DTYPES",
    "by_architecture",
    "launch",
    "missing",
    "rows",
    "unsupported",
    "without_matrix_units",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What kernels compute with."""

_FIRST_WITH_MATRIX_UNITS = 80

T = TypeVar("T")


def rows(value: Tensor) -> Tensor:
    """View or copy ``[..., D]`` as ``[rows, D]`` with adjacent elements in a row."""
    flat = flatten_rows(value)
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def by_architecture(table: Mapping[str, T], device: torch.device) -> T:
    """The entry for a device: of the longest name that its architecture begins with.

    Args:
        table: By names such as ``"sm_90"`` or ``"gfx1"``; ``""`` stands for all others.
        device: Where the kernel runs.
    """
    name = architecture(device)
    return table[max((each for each in table if name.startswith(each)), key=len)]


def without_matrix_units(device: torch.device) -> str | None:
    """Why a device multiplies matrices slowly in Triton; ``None`` if it does not."""
    name = architecture(device)
    if name.startswith("sm_") and int(name.removeprefix("sm_")) < _FIRST_WITH_MATRIX_UNITS:
        return f"Triton multiplies matrices without tensor cores on {name}"
    return None


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
