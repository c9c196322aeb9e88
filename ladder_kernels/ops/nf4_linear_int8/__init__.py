"""Linear layer with a frozen NF4 weight in whole numbers: 4-bit weights, 8-bit activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _checks, _nf4_args
from ladder_kernels.ops._dispatch import call, run
from ladder_kernels.ops._numeric import flatten_rows

__all__ = ["check_no_gradient", "check_whole_blocks", "nf4_linear_int8"]

_OP = "nf4_linear_int8"


def nf4_linear_int8(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply by a frozen NF4 weight in whole numbers: about ``x @ W^T (+ bias) (+ residual)``.

    Each block of a row of x is scaled by its largest magnitude and rounded to 8 bits, as are the 16
    centroids of NF4; products are summed exactly within a block, blocks in float32, and bias and
    residual are added before the only rounding (``reference.py`` has the formulas). On activations
    of a language model the result is within 1 to 2.5 % of :func:`nf4_linear`'s, in the Frobenius
    norm (``bench/ops/int8_error.py`` measures it), and takes less time on CPUs and on GPUs whose
    tensor cores are much faster in int8 than in bfloat16 (GeForce): it is for passes that carry no
    gradient. A row with NaN or infinity gives NaN. Under autocast the floating inputs are
    cast to its dtype.

    Args:
        x: ``[..., K]``, float16, bfloat16, float32 or float64.
        weight: ``[N, K]``; ``K`` must be a multiple of its blocksize.
        bias: ``[N]`` in x's dtype, or ``None``.
        residual: ``[..., N]`` in x's dtype, added last, or ``None``.

    Returns:
        ``[..., N]`` in x's dtype, without gradient.

    Raises:
        ConfigError: a shape, dtype or device does not fit, blocks do not begin with rows, or a
            gradient is wanted of an input.
        BackendError: a backend forced by name cannot run this call.
    """
    x = _nf4_args.checked_input(_OP, "x", x, weight, 1)
    check_whole_blocks(_OP, "weight", weight)
    bias, residual = _nf4_args.checked_addends(_OP, x, weight, bias, residual)
    check_no_gradient(_OP, x=x, bias=bias, residual=residual)
    return call(_linear, x, *_nf4_args.flatten(weight), bias, residual)


def check_whole_blocks(op: str, argument: str, weight: NF4Weight) -> None:
    """Refuse a weight whose blocks do not begin with its rows."""
    if weight.shape[1] % weight.blocksize:
        raise _checks.refuse(
            op,
            argument,
            f"has rows of {weight.shape[1]} and blocks of {weight.blocksize}",
            "a row must be a whole number of blocks",
        )


def check_no_gradient(op: str, **tensors: Tensor | None) -> None:
    """Refuse inputs whose gradient is wanted: rounding to 8 bits has none that is of use."""
    if not torch.is_grad_enabled():
        return
    for argument, value in tensors.items():
        if value is not None and value.requires_grad:
            raise _checks.refuse(
                op,
                argument,
                "requires a gradient",
                "this operation has none (torch.no_grad(), or the operation without _int8)",
            )


@torch.library.custom_op(
    "ladder_kernels::nf4_linear_int8",
    mutates_args=(),
    schema=f"(Tensor x, {_nf4_args.schema()}, Tensor? bias, Tensor? residual) -> Tensor",
)
def _linear(x: Tensor, *args: Any) -> Tensor:
    weight = _nf4_args.rebuild(args[: _nf4_args.COUNT], x.dtype)
    bias, residual = args[_nf4_args.COUNT :]
    if residual is not None:
        residual = flatten_rows(residual)
    out = run(_OP, "nf4_linear_int8", flatten_rows(x), weight, bias, residual)
    return out.view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    shape = args[_nf4_args.COUNT - 2]
    return x.new_empty((*x.shape[:-1], shape[0]))
