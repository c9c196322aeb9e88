"""To and from bitsandbytes' own objects (>= 0.50), sharing memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladder_kernels.errors import CheckpointError, ConfigError
from ladder_kernels.nf4.codebook import NESTED_BLOCKSIZE, nf4_code
from ladder_kernels.nf4.weight import NF4Weight

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["as_bytes", "as_storage", "check_parts", "from_bitsandbytes", "to_bitsandbytes"]


def as_bytes(packed: Tensor) -> Tensor:
    """Packed numbers in any storage dtype as uint8 ``[bytes]``, sharing memory."""
    flat = packed.detach().reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def as_storage(packed: Tensor, quant_storage: torch.dtype) -> Tensor:
    """uint8 ``[bytes]`` as ``[bytes / itemsize, 1]`` in ``quant_storage``, sharing memory.

    Raises:
        ConfigError: the bytes are no multiple of the dtype's.
    """
    if packed.numel() % quant_storage.itemsize:
        raise ConfigError(
            f"quant_storage: {packed.numel()} packed bytes cannot be presented as {quant_storage}; "
            "allowed are dtypes whose size divides that, such as torch.uint8"
        )
    return packed.view(quant_storage).unsqueeze(1)


def check_parts(weight: NF4Weight, called: str) -> NF4Weight:
    """Return ``weight`` if its parts fit each other.

    Raises:
        CheckpointError: a part has the wrong size or dtype.
    """
    blocks = -(-weight.numel // weight.blocksize)
    groups = -(-blocks // NESTED_BLOCKSIZE)
    expected = [("packed numbers", weight.packed, (weight.numel + 1) // 2, torch.uint8)]
    if weight.nested_absmax is None or weight.nested_code is None:
        expected.append(("absmax", weight.absmax, blocks, torch.float32))
    else:
        expected.append(("absmax", weight.absmax, blocks, torch.uint8))
        expected.append(("nested absmax", weight.nested_absmax, groups, torch.float32))
        expected.append(("nested map", weight.nested_code, 256, torch.float32))
    for part, tensor, size, dtype in expected:
        if tensor.numel() != size or tensor.dtype != dtype:
            raise CheckpointError(
                f"{called}: its {part} is {tensor.numel()} x {tensor.dtype}, but shape "
                f"{list(weight.shape)} with blocksize {weight.blocksize} needs {size} x {dtype}"
            )
    return weight


def from_bitsandbytes(packed: Tensor, quant_state: QuantState) -> NF4Weight:
    """See :meth:`NF4Weight.from_bitsandbytes`."""
    if quant_state.quant_type != "nf4":
        raise CheckpointError(
            f"quant_state: found quant_type {quant_state.quant_type!r}, allowed is 'nf4'"
        )
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise CheckpointError(
            "quant_state: bitsandbytes has repacked this weight for its CPU inference, which "
            "rounds its scales; take it before the first forward in evaluation mode"
        )
    nested = {}
    if quant_state.nested:
        state = quant_state.state2
        if state.blocksize != NESTED_BLOCKSIZE:
            raise CheckpointError(
                f"quant_state: found nested blocksize {state.blocksize}, allowed is 256"
            )
        nested = {
            "nested_absmax": state.absmax,
            "nested_code": state.code,
            "nested_offset": quant_state.offset,
        }
    weight = NF4Weight(
        packed=as_bytes(packed),
        absmax=quant_state.absmax,
        shape=tuple(quant_state.shape),
        blocksize=quant_state.blocksize,
        dtype=quant_state.dtype,
        **nested,
    )
    return check_parts(weight, "quant_state")


def to_bitsandbytes(weight: NF4Weight, quant_storage: torch.dtype) -> tuple[Tensor, QuantState]:
    """See :meth:`NF4Weight.to_bitsandbytes`."""
    try:
        from bitsandbytes.functional import QuantState
    except ImportError as error:
        raise ConfigError(
            "to_bitsandbytes needs bitsandbytes, which is not installed (pip install bitsandbytes)"
        ) from error
    state2 = None
    if weight.double_quant:
        state2 = QuantState(
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
        state2=state2,
    )
    return as_storage(weight.packed, quant_storage), state
