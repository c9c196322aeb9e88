"""Integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import TYPES, Array, PTXType

__all__ = ["BUILDERS"]


def _elementwise(function: Callable[..., Array], sources: int) -> Builder:
    def build(instruction: Instruction, lowering: Lowering) -> Action:
        if instruction.has("sat"):
            raise UnsupportedInstructionError("integer saturation is not modelled")
        return lowering.elementwise(instruction, function, instruction.type, sources=sources)

    return build


def _divide(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient towards zero and remainder; the hardware's answer where ``b`` is zero."""
    a, b = np.broadcast_arrays(a, b)
    divisor = np.where(b == 0, b.dtype.type(1), b)
    remainder = np.fmod(a, divisor)
    quotient = (a - remainder) // divisor
    ones = np.array(-1).astype(a.dtype)
    return np.where(b == 0, ones, quotient), np.where(b == 0, a, remainder)


def _high_half(a: Array, b: Array) -> Array:
    """The high 64 bits of a product of 64-bit integers, through Python's integers."""
    a, b = np.broadcast_arrays(a, b)
    high = [
        ((x * y) >> 64) & 0xFFFF_FFFF_FFFF_FFFF for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    return np.array(high, np.uint64).view(a.dtype)


def _multiply(instruction: Instruction, lowering: Lowering) -> Action:
    """``mul`` and ``mad`` with ``.lo``, ``.hi`` or ``.wide``."""
    kind = instruction.type
    fused = instruction.opcode == "mad"
    part = instruction.one_of("lo", "hi", "wide")
    if instruction.has("sat"):
        raise UnsupportedInstructionError("integer saturation is not modelled")
    result = kind if part != "wide" else TYPES[f"{kind.name[0]}{2 * kind.bits}"]
    first, second = lowering.read_all(instruction.operands[1:3], kind)
    added = lowering.read(instruction.operands[3], result) if fused else None
    write = lowering.write(instruction.operands[0], result)
    product = _product(kind, part)

    def action(threads: Threads, mask: Array | None) -> None:
        value = product(first(threads), second(threads))
        if added is not None:
            value = value + added(threads)
        write(threads, value, mask)

    return action


def _product(kind: PTXType, part: str) -> Callable[[Array, Array], Array]:
    if part == "lo":
        return np.multiply
    if kind.bits == 64:
        return _high_half
    double = TYPES[f"{kind.name[0]}{2 * kind.bits}"].dtype
    if part == "wide":
        return lambda a, b: a.astype(double) * b.astype(double)
    return lambda a, b: ((a.astype(double) * b.astype(double)) >> kind.bits).astype(kind.dtype)


def _multiply_24(instruction: Instruction, lowering: Lowering) -> Action:
    """``mul24.lo`` and ``mad24.lo``: of the low 24 bits."""
    if not instruction.has("lo"):
        raise UnsupportedInstructionError("only the .lo form is modelled")
    cut = instruction.type.dtype.type(8)

    def low(a: Array) -> Array:
        return (a << cut) >> cut

    if instruction.opcode == "mul24":
        return lowering.elementwise(
            instruction, lambda a, b: low(a) * low(b), instruction.type, sources=2
        )
    return lowering.elementwise(
        instruction, lambda a, b, c: low(a) * low(b) + c, instruction.type, sources=3
    )


def _dot_product(instruction: Instruction, lowering: Lowering) -> Action:
    """``dp4a``: the dot product of four bytes, added to a third operand."""
    first, second = instruction.types
    bytes_of = {True: np.dtype("i1"), False: np.dtype("u1")}

    def function(a: Array, b: Array, c: Array) -> Array:
        x = np.ascontiguousarray(a).view(bytes_of[first.signed]).reshape(-1, 4)
        y = np.ascontiguousarray(b).view(bytes_of[second.signed]).reshape(-1, 4)
        total = (x.astype(np.int64) * y.astype(np.int64)).sum(axis=1)
        return (total.astype(np.uint32) + c).astype(np.uint32)

    return lowering.elementwise(instruction, function, "b32", sources=3)


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "abs": _elementwise(np.abs, 1),
        "add": _elementwise(np.add, 2),
        "div": _elementwise(lambda a, b: _divide(a, b)[0], 2),
        "dp4a": _dot_product,
        "mad": _multiply,
        "mad24": _multiply_24,
        "max": _elementwise(np.maximum, 2),
        "min": _elementwise(np.minimum, 2),
        "mul": _multiply,
        "mul24": _multiply_24,
        "neg": _elementwise(np.negative, 1),
        "rem": _elementwise(lambda a, b: _divide(a, b)[1], 2),
        "sub": _elementwise(np.subtract, 2),
    }
)
"""Builders by opcode."""
