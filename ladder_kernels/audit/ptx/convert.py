"""``cvt``: conversions between types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import (
    Array,
    PTXType,
    float_to_bf16,
    float_to_tf32,
    pack,
    unpack,
)

__all__ = ["BUILDERS"]

_TO_INTEGRAL: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
)
_UNMODELLED = ("rm", "rp", "rs", "satfinite", "scaled")
_FP8 = ("e4m3x2", "e5m2x2")


def _convert(instruction: Instruction, lowering: Lowering) -> Action:
    target, source = instruction.types[:2]
    if target.lanes == 2:
        return _to_packed(instruction, lowering, target, source)
    if source.floating and target.floating:
        return _apply(instruction, lowering, source, target, _between_floats(instruction))
    if source.floating:
        return _apply(instruction, lowering, source, target, _to_integer(instruction, target))
    if target.floating:
        return _apply(
            instruction, lowering, source, target, lambda values: _from_integer(values, target)
        )
    if instruction.has("sat"):
        limits = np.iinfo(target.dtype)
        low = max(limits.min, np.iinfo(source.dtype).min)
        high = min(limits.max, np.iinfo(source.dtype).max)
        return _apply(
            instruction,
            lowering,
            source,
            target,
            lambda values: np.clip(values, low, high).astype(target.dtype),
        )
    return _apply(instruction, lowering, source, target, lambda values: values.astype(target.dtype))


def _apply(
    instruction: Instruction,
    lowering: Lowering,
    source: PTXType,
    target: PTXType,
    function: Callable[[Array], Array],
) -> Action:
    return lowering.elementwise(instruction, function, source, sources=1, result=target)


def _from_integer(values: Array, target: PTXType) -> Array:
    if target.name != "bf16":
        return values.astype(target.dtype)
    wide = values.astype(np.float64)
    return float_to_bf16(wide)


def _to_integer(instruction: Instruction, target: PTXType) -> Callable[[Array], Array]:
    """Rounded as asked; what does not fit becomes the nearest that does, NaN becomes zero."""
    rounding = _TO_INTEGRAL[instruction.one_of(*_TO_INTEGRAL)]
    limits = np.iinfo(target.dtype)
    source = instruction.types[1]

    def function(values: Array) -> Array:
        rounded = rounding(unpack(values, source)[0].astype(np.float64))
        low, high = rounded <= float(limits.min), rounded >= float(limits.max)
        inside = np.where(low | high | np.isnan(rounded), 0, rounded).astype(target.dtype)
        clipped = np.where(low, target.dtype.type(limits.min), inside)
        return np.where(high, target.dtype.type(limits.max), clipped)

    return function


def _between_floats(instruction: Instruction) -> Callable[[Array], Array]:
    target, source = instruction.types[:2]
    if instruction.has(*_UNMODELLED):
        raise UnsupportedInstructionError("this rounding is not modelled")
    integral = next((_TO_INTEGRAL[m] for m in instruction.modifiers if m in _TO_INTEGRAL), None)
    relu, saturate = instruction.has("relu"), instruction.has("sat")
    encode = _encoder(instruction, target)

    def function(values: Array) -> Array:
        floats = unpack(values, source)[0]
        if integral is not None:
            floats = integral(floats)
        if relu:
            floats = np.fmax(floats, floats.dtype.type(0))
        if saturate:
            floats = np.fmin(np.fmax(floats, floats.dtype.type(0)), floats.dtype.type(1))
        return encode(floats)

    return function


def _encoder(instruction: Instruction, target: PTXType) -> Callable[[Array], Array]:
    """From floats to a type of one element, with the instruction's rounding."""
    if target.name == "tf32":
        if not instruction.has("rna"):
            raise UnsupportedInstructionError("tf32 is modelled with rounding rna alone")
        return float_to_tf32
    toward_zero = instruction.has("rz")
    return lambda floats: pack([floats], target, toward_zero=toward_zero)


def _to_packed(
    instruction: Instruction, lowering: Lowering, target: PTXType, source: PTXType
) -> Action:
    """Two elements: from one packed value, or from two floats of which the first is the higher."""
    if instruction.has("rm", "rp", "rs", "scaled"):
        raise UnsupportedInstructionError("this rounding is not modelled")
    if target.name not in _FP8 and instruction.has("satfinite"):
        raise UnsupportedInstructionError("satfinite is modelled for fp8 alone")
    relu, toward_zero = instruction.has("relu"), instruction.has("rz")
    sources = instruction.operands[1:]
    if len(sources) != (1 if source.lanes == 2 else 2):
        raise UnsupportedInstructionError("cvt lacks operands")
    readers = lowering.read_all(sources, source)
    write = lowering.write(instruction.operands[0], target)

    def action(threads: Threads, mask: Array | None) -> None:
        values = [read(threads) for read in readers]
        low_first = unpack(values[0], source) if source.lanes == 2 else values[::-1]
        if relu:
            low_first = [np.fmax(part, part.dtype.type(0)) for part in low_first]
        write(threads, pack(low_first, target, toward_zero=toward_zero), mask)

    return action


BUILDERS: Mapping[str, Builder] = MappingProxyType({"cvt": _convert})
"""Builders by opcode."""
