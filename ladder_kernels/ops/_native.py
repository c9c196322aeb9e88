"""What the native CPU side of every operation shares: tensors as the C interface takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.native.tensors import (
    DTYPES,
    adjacent_columns,
    check,
    library,
    matrix,
    pointer,
)
from ladder_kernels.nf4 import NF4Weight

__all__ = [
    "DTYPES",
    "adjacent_columns",
    "check",
    "dense_matrix",
    "library",
    "matrix",
    "nf4_linear",
    "nf4_swiglu",
    "pointer",
    "unsupported",
]


def unsupported(x: Tensor) -> str | None:
    """Say why a call whose activations are ``x`` cannot run natively; ``None`` if it can."""
    if x.dtype not in DTYPES:
        return f"there is no native kernel for {x.dtype}"
    return native.status().reason


def dense_matrix(value: Tensor) -> native.DenseMatrix:
    """Return a matrix with adjacent columns as ``lk_dense_matrix``; it must outlive the call."""
    return native.DenseMatrix(value.data_ptr(), DTYPES[value.dtype], *value.shape, value.stride(0))


def nf4_linear(
    entry: str, x: Tensor, weight: NF4Weight, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Call ``lk_nf4_linear`` or one of the same signature.

    Args:
        entry: Its name.
        x: ``[M, K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or ``None``.
        residual: ``[M, N]`` or ``None``.

    Returns:
        ``[M, N]``.
    """
    x = adjacent_columns(x)
    residual = None if residual is None else adjacent_columns(residual)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((x.shape[0], weight.shape[0]))
    code = getattr(library(), entry)(
        matrix(weight),
        DTYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        pointer(bias),
        pointer(residual),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(code)
    return out


def nf4_swiglu(entry: str, x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Call ``lk_nf4_swiglu`` or one of the same signature.

    Args:
        entry: Its name.
        x: ``[M, K]``.
        w_gate: ``[N, K]``.
        w_up: ``[N, K]``.

    Returns:
        ``[M, N]``.
    """
    x = adjacent_columns(x)
    out = x.new_empty((x.shape[0], w_gate.shape[0]))
    code = getattr(library(), entry)(
        matrix(w_gate),
        matrix(w_up),
        DTYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(code)
    return out
