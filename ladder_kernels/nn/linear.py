"""Frozen linear layers: with the weight in NF4, and in float where a checkpoint keeps it so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import nf4_linear, nf4_linear_int8

__all__ = ["ACTIVATIONS", "FrozenLinear", "NF4Linear", "move_exactly"]

ACTIVATIONS = ("exact", "int8")
"""How a frozen layer may take its input: as it is, or rounded to 8 bits."""

_TENSOR_FIELDS = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")


def move_exactly(
    module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], names: tuple[str, ...]
) -> None:
    """Apply ``fn`` of ``nn.Module._apply`` to buffers whose values must survive a change of dtype.

    A move to another device is followed, a cast is not: ``model.to(torch.bfloat16)`` would
    otherwise round quantisation scales and rotary frequencies.

    Args:
        module: The owner of the buffers.
        fn: What ``_apply`` was given.
        names: Buffer names; those that are ``None`` are left alone.
    """
    for name in names:
        buffer = module._buffers[name]
        if buffer is None:
            continue
        moved = fn(buffer)
        module._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)


class NF4Linear(nn.Module):
    """``y = x W^T + bias (+ residual)`` with a frozen NF4 ``W`` ``[N, K]``.

    The quantised tensors are non-persistent buffers: they follow ``.to(device)``, are left alone by
    dtype casts, and appear in no ``state_dict``. The bias, a buffer too, follows dtype casts.

    Args:
        weight: The quantised ``[N, K]``.
        bias: ``[N]``, any float dtype, or ``None``.

    Attributes:
        in_features: ``K``.
        out_features: ``N``.
        activations: One of :data:`ACTIVATIONS`; ``"int8"`` has no gradient, and needs rows that are
            whole numbers of blocks.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: NF4Weight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.blocksize = weight.blocksize
        self.weight_dtype = weight.dtype
        self.activations = "exact"
        self._weight: NF4Weight | None = None
        for name in _TENSOR_FIELDS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def from_weight(cls, weight: NF4Weight, bias: torch.Tensor | None = None) -> NF4Linear:
        """Wrap a quantised weight; the same as the constructor."""
        return cls(weight, bias)

    @property
    def weight(self) -> NF4Weight:
        """The quantised weight, sharing memory with this module."""
        known = self._weight
        if known is None or any(
            getattr(known, name) is not self._buffers[name] for name in _TENSOR_FIELDS
        ):
            known = self._weight = self._made()
        return known

    def _made(self) -> NF4Weight:
        return NF4Weight(
            packed=self.packed,
            absmax=self.absmax,
            shape=(self.out_features, self.in_features),
            blocksize=self.blocksize,
            dtype=self.weight_dtype,
            nested_absmax=self.nested_absmax,
            nested_code=self.nested_code,
            nested_offset=self.nested_offset,
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: ``[..., K]``.
            residual: ``[..., N]``, added to the result.

        Returns:
            ``[..., N]`` in the dtype of ``x``; differentiable in ``x`` and ``residual`` unless
            activations are ``"int8"``.
        """
        linear = nf4_linear_int8 if self.activations == "int8" else nf4_linear
        return linear(x, self.weight, self.bias, residual)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NF4Linear:
        self._weight = None
        move_exactly(self, fn, _TENSOR_FIELDS)
        if self.bias is not None:
            self.bias = fn(self.bias)
        return self

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        double = ", double_quant" if self.nested_absmax is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocksize={self.blocksize}{double}"
        )


class FrozenLinear(nn.Module):
    """``y = x W^T + bias (+ residual)`` with a frozen float ``W`` ``[N, K]``.

    For layers that a quantised checkpoint left in float. Weight and bias are non-persistent buffers
    and follow casts.

    Args:
        weight: ``[N, K]``.
        bias: ``[N]`` or ``None``.

    Attributes:
        in_features: ``K``.
        out_features: ``N``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: ``[..., K]``.
            residual: ``[..., N]``, added to the result.

        Returns:
            ``[..., N]``; differentiable in ``x`` and ``residual``.
        """
        out = nn.functional.linear(x, self.weight, self.bias)
        return out if residual is None else out + residual

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
