"""Products with an NF4 weight on the native CPU kernels (``csrc/src/nf4_linear.inc``).

The same functions as ``reference.py``. Sums are float32 whatever x's dtype, bias and residual are
added before the only rounding, and the number of threads (``torch.get_num_threads()``) changes no
bit. float64 has no native kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _native

__all__ = ["nf4_linear", "nf4_linear_transposed", "unsupported"]


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run natively; ``None`` if it can."""
    return _native.unsupported(x)


def nf4_linear(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return ``x @ W^T (+ bias) (+ residual)``; as the reference's."""
    return _native.nf4_linear("lk_nf4_linear", x, weight, bias, residual)


def nf4_linear_transposed(
    grad: Tensor, weight: NF4Weight, below: NF4Weight | None = None
) -> Tensor:
    """Return ``grad @ W``; as the reference's.

    Args:
        grad: ``[M, N]``.
        weight: ``[N, K]``; or, with ``below``, the first rows of it.
        below: The other rows, or ``None``.

    Returns:
        ``[M, K]`` in grad's dtype, rounded once.
    """
    grad = _native.adjacent_columns(grad)
    out = grad.new_empty((grad.shape[0], weight.shape[1]))
    code = _native.library().lk_nf4_linear_transposed(
        _native.matrix(weight),
        None if below is None else _native.matrix(below),
        _native.DTYPES[grad.dtype],
        grad.shape[0],
        grad.data_ptr(),
        grad.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    _native.check(code)
    return out
