"""An :class:`NF4Weight` as arguments of a ``torch.library`` operator, whose schema knows tensors.

The order is fixed: packed, absmax, nested_absmax, nested_code, nested_offset, shape, blocksize.
Also here: the checks of arguments that products with such weights share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _checks

__all__ = [
    "COUNT",
    "checked_addends",
    "checked_gated_input",
    "checked_input",
    "flatten",
    "rebuild",
    "schema",
]

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


def checked_input(op: str, name: str, value: Tensor, weight: NF4Weight, dimension: int) -> Tensor:
    """Return an input of a product with ``weight``, cast as autocast wants it.

    Args:
        op: Of the error messages.
        name: Of the input.
        value: ``[..., weight.shape[dimension]]``, floating.
        weight: The other factor.
        dimension: Along which the product sums.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    _checks.check_floating(op, name, value)
    _checks.check_nf4(op, "weight", weight)
    _checks.check_same_device(op, "weight", weight.packed, name, value)
    width = weight.shape[dimension]
    if value.dim() == 0 or value.shape[-1] != width:
        raise _checks.refuse(
            op,
            name,
            f"has shape {list(value.shape)}",
            f"it must be ['...', {width}] for a weight of shape {list(weight.shape)}",
        )
    return _checks.autocast(value)


def checked_addends(
    op: str, x: Tensor, weight: NF4Weight, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return bias and residual of ``x @ weight^T``, cast as autocast wants them.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    if bias is not None:
        bias = _checked_addend(op, "bias", bias, x)
        _checks.check_shape(op, "bias", bias, shape[-1:], "the rows of weight")
    if residual is not None:
        residual = _checked_addend(op, "residual", residual, x)
        _checks.check_shape(op, "residual", residual, shape, "the shape of the result")
    return bias, residual


def _checked_addend(op: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    _checks.check_floating(op, name, value)
    value = _checks.autocast(value)
    _checks.check_same_dtype(op, name, value, "x", x)
    _checks.check_same_device(op, name, value, "x", x)
    return value


def checked_gated_input(op: str, x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return the input of the gated half of a SwiGLU, cast as autocast wants it.

    Raises:
        ConfigError: A shape, dtype or device does not fit.
    """
    _checks.check_floating(op, "x", x)
    _checks.check_nf4(op, "w_gate", w_gate)
    _checks.check_nf4(op, "w_up", w_up)
    _checks.check_same_device(op, "w_gate", w_gate.packed, "x", x)
    _checks.check_same_device(op, "w_up", w_up.packed, "x", x)
    if tuple(w_up.shape) != tuple(w_gate.shape):
        raise _checks.refuse(
            op,
            "w_up",
            f"has shape {list(w_up.shape)}",
            f"it must be {list(w_gate.shape)}, as w_gate",
        )
    if x.dim() == 0 or x.shape[-1] != w_gate.shape[1]:
        raise _checks.refuse(
            op,
            "x",
            f"has shape {list(x.shape)}",
            f"it must be ['...', {w_gate.shape[1]}] for weights of shape {list(w_gate.shape)}",
        )
    return _checks.autocast(x)
