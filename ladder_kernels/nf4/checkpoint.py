"""NF4 weights in safetensors files, under bitsandbytes' keys.

A weight called ``name`` is stored as ``name`` (the packed numbers) and

    name.absmax                              scales
    name.quant_map                           the sixteen values
    name.nested_absmax, name.nested_quant_map    with double quantisation
    name.quant_state.bitsandbytes__nf4       the rest, JSON as a tensor of bytes
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ladder_kernels.errors import CheckpointError, ConfigError
from ladder_kernels.nf4.bitsandbytes import as_bytes, as_storage
from ladder_kernels.nf4.codebook import nf4_code
from ladder_kernels.nf4.quantize import BLOCKSIZES, NESTED_BLOCKSIZE, QUANTIZABLE
from ladder_kernels.nf4.weight import NF4Weight

__all__ = [
    "from_state_dict",
    "is_quantized",
    "is_state",
    "state_keys",
    "tensor_keys",
    "to_state_dict",
]

_STATE = "quant_state.bitsandbytes__"
_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def state_keys(name: str, keys: Iterable[str]) -> list[str]:
    """Those of ``keys`` that belong to the quantised weight ``name``, itself included."""
    own = {name, *(f"{name}.{part}" for part in _TENSORS)}
    return [key for key in keys if key in own or key.startswith(f"{name}.{_STATE}")]


def is_quantized(name: str, keys: Iterable[str]) -> bool:
    """Whether ``keys`` hold a 4-bit state (NF4 or not) for the weight ``name``."""
    return any(key.startswith(f"{name}.{_STATE}") for key in keys)


def tensor_keys(name: str, weight: NF4Weight) -> dict[str, str]:
    """Under which key a file has each tensor of a weight, by field.

    The offset of the scales is in the state, not in a tensor.
    """
    keys = {
        "packed": name,
        "absmax": f"{name}.absmax",
        "nested_absmax": f"{name}.nested_absmax",
        "nested_code": f"{name}.nested_quant_map",
    }
    return {field: key for field, key in keys.items() if field in weight.tensors()}


def is_state(key: str) -> bool:
    """Whether a key's tensor is a state, JSON as bytes, which may end in spaces."""
    return f".{_STATE}" in key


def to_state_dict(
    name: str, weight: NF4Weight, *, quant_storage: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """The tensors that bitsandbytes and transformers expect in a file.

    Args:
        name: of the weight, such as ``"model.layers.0.mlp.up_proj.weight"``.
        weight: the weight.
        quant_storage: dtype in which the packed bytes are stored.

    Returns:
        Key to tensor; the packed bytes and scales share memory with ``weight``.

    Raises:
        ConfigError: the bytes are no multiple of the dtype's.
    """
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        name: as_storage(weight.packed, quant_storage),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": nf4_code(weight.device),
    }
    if (
        weight.nested_absmax is not None
        and weight.nested_code is not None
        and weight.nested_offset is not None
    ):
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        # safetensors refuses two keys that share memory, and weights may share the map.
        tensors[f"{name}.nested_quant_map"] = weight.nested_code.clone()
        state["nested_blocksize"] = NESTED_BLOCKSIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = weight.nested_offset.item()
    text = json.dumps(state).encode()
    tensors[f"{name}.{_STATE}nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def from_state_dict(name: str, tensors: Mapping[str, Tensor]) -> NF4Weight:
    """Read a weight from a file's tensors.

    Args:
        name: of the weight.
        tensors: at least the keys of :func:`state_keys`.

    Returns:
        The weight; its tensors share memory with ``tensors``.

    Raises:
        CheckpointError: a tensor is missing, the state is unreadable or not NF4, or the parts do
            not fit each other.
    """
    state = _state(name, tensors)
    blocksize = state.get("blocksize")
    if blocksize not in BLOCKSIZES:
        raise CheckpointError(
            f"{name}: found blocksize {blocksize!r}, allowed are {', '.join(map(str, BLOCKSIZES))}"
        )
    dtype = getattr(torch, str(state.get("dtype")), None)
    shape = state.get("shape")
    if dtype not in QUANTIZABLE or not _is_shape(shape):
        allowed = ", ".join(str(each).removeprefix("torch.") for each in QUANTIZABLE)
        raise CheckpointError(
            f"{name}: its quantisation state names dtype {state.get('dtype')!r} and shape "
            f"{shape!r}; allowed are {allowed} and a list of sizes"
        )
    nested: dict[str, Tensor] = {}
    if f"{name}.nested_absmax" in tensors or "nested_offset" in state:
        if state.get("nested_blocksize") != NESTED_BLOCKSIZE:
            raise CheckpointError(
                f"{name}: found nested blocksize {state.get('nested_blocksize')!r}, allowed is 256"
            )
        absmax = _tensor(name, "nested_absmax", tensors)
        offset = state.get("nested_offset")
        if not isinstance(offset, float | int):
            raise CheckpointError(f"{name}: found nested offset {offset!r}, it must be a number")
        nested = {
            "nested_absmax": absmax,
            "nested_code": _tensor(name, "nested_quant_map", tensors),
            "nested_offset": torch.tensor(offset, dtype=torch.float32, device=absmax.device),
        }
    code = _tensor(name, "quant_map", tensors)
    if not torch.equal(code, nf4_code(code.device)):
        raise CheckpointError(f"{name}.quant_map does not hold the sixteen values of NF4")
    if name not in tensors:
        raise CheckpointError(f"{name} is missing from the file, though its scales are there")
    try:
        return NF4Weight(
            packed=as_bytes(tensors[name]),
            absmax=_tensor(name, "absmax", tensors),
            shape=tuple(shape),
            blocksize=blocksize,
            dtype=dtype,
            **nested,
        )
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _is_shape(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)


def _tensor(name: str, part: str, tensors: Mapping[str, Tensor]) -> Tensor:
    key = f"{name}.{part}"
    if key not in tensors:
        raise CheckpointError(f"{key} is missing from the file")
    return tensors[key]


def _state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    prefix = f"{name}.{_STATE}"
    kinds = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    if kinds != ["nf4"]:
        found = ", ".join(kinds) or "none"
        raise CheckpointError(f"{name}: found quantisation state '{found}', allowed is 'nf4'")
    raw = tensors[f"{prefix}nf4"]
    try:
        state = json.loads(bytes(raw.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{prefix}nf4 is not readable: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{prefix}nf4 holds no JSON object")
    return state
