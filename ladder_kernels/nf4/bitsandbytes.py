"""Interchange with bitsandbytes in memory; nothing is copied.

The bits are the same on both sides, whatever the shape. What bitsandbytes 0.50 computes with them
on a CPU is not always: where a row is even but no whole number of blocks (seen with AVX-512), its
kernel reads the wrong scales; and to bfloat16 (seen with AVX512-BF16) it makes subnormal values
zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4.codebook import nf4_code
from ladder_kernels.nf4.quantize import NESTED_BLOCKSIZE, QUANTIZABLE
from ladder_kernels.nf4.weight import NF4Weight

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["as_bytes", "as_storage", "from_bitsandbytes", "to_bitsandbytes"]


def as_bytes(packed: Tensor) -> Tensor:
    """Return bytes that were stored in any dtype as uint8 ``[n]``, sharing memory if contiguous."""
    # Params4bit and other subclasses keep Python state that a plain view must not carry along.
    plain = packed.detach().as_subclass(Tensor)
    return plain.reshape(-1).view(torch.uint8)


def as_storage(packed: Tensor, quant_storage: torch.dtype) -> Tensor:
    """Return uint8 ``[n]`` as bitsandbytes holds it: ``[m, 1]`` of ``quant_storage``.

    Raises:
        ConfigError: ``n`` bytes are not a whole number of ``quant_storage``. (bitsandbytes fails
            on these, too: it does not pad.)
    """
    if packed.numel() % quant_storage.itemsize:
        raise ConfigError(
            f"{packed.numel()} packed bytes cannot be stored as {quant_storage}: not a multiple of "
            f"{quant_storage.itemsize}; use quant_storage=torch.uint8"
        )
    return packed.view(quant_storage).view(-1, 1)


def from_bitsandbytes(packed: Tensor, quant_state: QuantState) -> NF4Weight:
    """Build an :class:`NF4Weight` from what ``bitsandbytes.functional.quantize_4bit`` returned.

    Args:
        packed: The bytes, in any dtype and orientation.
        quant_state: Its state.

    Raises:
        ConfigError: The state is not NF4, has been repacked, or does not fit the bytes.
    """
    if quant_state.quant_type != "nf4":
        raise ConfigError(f"quant_type is {quant_state.quant_type!r}; only 'nf4' can be used")
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ConfigError(
            "bitsandbytes has repacked this weight for AVX512-BF16 (it does so in the first "
            "forward of an evaluation on such a CPU) and rounded its scales to bfloat16; take the "
            "weight before that, or load it anew"
        )
    if quant_state.shape is None or quant_state.blocksize is None or quant_state.dtype is None:
        raise ConfigError("the QuantState lacks shape, blocksize or dtype; it must have all three")
    nested: tuple[Tensor | None, ...] = (None, None, None)
    second, offset = quant_state.state2, quant_state.offset
    if second is not None and offset is not None:
        if second.blocksize != NESTED_BLOCKSIZE:
            raise ConfigError(
                f"the nested blocksize is {second.blocksize}; it must be {NESTED_BLOCKSIZE}"
            )
        nested = (_flat(second.absmax), _flat(second.code), offset.detach().reshape(()))
    return NF4Weight(
        as_bytes(packed),
        _flat(quant_state.absmax),
        tuple(quant_state.shape),
        quant_state.blocksize,
        quant_state.dtype,
        *nested,
    )


def to_bitsandbytes(weight: NF4Weight, quant_storage: torch.dtype) -> tuple[Tensor, QuantState]:
    """Build the bytes and the state that bitsandbytes' functions take from an :class:`NF4Weight`.

    Args:
        weight: Any.
        quant_storage: Dtype that the bytes are viewed as.

    Raises:
        ConfigError: bitsandbytes cannot hold the weight in that storage, or has no such dtype.
    """
    from bitsandbytes.functional import QuantState

    if weight.dtype not in QUANTIZABLE:
        allowed = ", ".join(str(each).removeprefix("torch.") for each in QUANTIZABLE)
        raise ConfigError(f"bitsandbytes has no weights of {weight.dtype}; only {allowed}")
    second = None
    if weight.double_quant:
        second = QuantState(
            absmax=weight.nested_absmax,
            code=weight.nested_code,
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=nf4_code(weight.device),
        blocksize=weight.blocksize,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=weight.nested_offset,
        state2=second,
    )
    return as_storage(weight.packed, quant_storage), state


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)
