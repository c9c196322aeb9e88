"""Logic, shifts, bit fields and byte permutations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering
from ladder_kernels.audit.ptx.operands import Immediate
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import UNSIGNED, Array

__all__ = ["BUILDERS"]


def _logic(function: Callable[..., Array], sources: int) -> Builder:
    def build(instruction: Instruction, lowering: Lowering) -> Action:
        return lowering.elementwise(instruction, function, instruction.type, sources=sources)

    return build


def _lookup(instruction: Instruction, lowering: Lowering) -> Action:
    """``lop3``: any function of three bits, given as its table."""
    table = instruction.operands[4]
    if not isinstance(table, Immediate) or instruction.has("or", "and", "BoolOp"):
        raise UnsupportedInstructionError("lop3 with a predicate is not modelled")
    rows = [row for row in range(8) if table.value >> row & 1]

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros(1, np.uint32)
        for row in rows:
            result = result | (
                (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            )
        return result

    return lowering.elementwise(instruction, function, instruction.type, sources=3)


def _with_amounts(
    instruction: Instruction, lowering: Lowering, values: int, function: Callable[..., Array]
) -> Action:
    """The action of ``function(values..., amounts...)``, where amounts are always 32 bits wide."""
    sources = instruction.operands[1:]
    readers = lowering.read_all(sources[:values], instruction.type)
    readers += lowering.read_all(sources[values:], "u32")
    write = lowering.write(instruction.operands[0], instruction.type)

    def action(threads: Threads, mask: Array | None) -> None:
        write(threads, function(*[read(threads) for read in readers]), mask)

    return action


def _shift(instruction: Instruction, lowering: Lowering) -> Action:
    """``shl`` and ``shr``: amounts beyond the width shift everything out."""
    kind = instruction.type
    bits, dtype = kind.bits, kind.dtype
    left = instruction.opcode == "shl"
    shift = np.left_shift if left else np.right_shift

    def function(a: Array, amount: Array) -> Array:
        shifted = shift(a, np.minimum(amount, np.uint32(bits - 1)).astype(dtype))
        if kind.signed and not left:
            return shifted
        return np.where(amount >= bits, dtype.type(0), shifted)

    return _with_amounts(instruction, lowering, 1, function)


def _funnel_shift(instruction: Instruction, lowering: Lowering) -> Action:
    """``shf``: a shift of two registers as one of 64 bits."""
    left = instruction.has("l")
    wrap = instruction.one_of("wrap", "clamp") == "wrap"

    def function(low: Array, high: Array, amount: Array) -> Array:
        value = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        amount = amount % np.uint32(32) if wrap else np.minimum(amount, np.uint32(32))
        wide = amount.astype(np.uint64)
        shifted = (value << wide) >> np.uint64(32) if left else value >> wide
        return shifted.astype(np.uint32)

    return _with_amounts(instruction, lowering, 2, function)


def _field(position: Array, length: Array) -> tuple[Array, Array]:
    """Position and length of a bit field as the hardware reads them: their low 8 bits, as int64."""
    return (position & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)


def _ones(length: Array) -> Array:
    """uint64 with this many low bits set."""
    ones = (np.uint64(1) << np.minimum(length, 63).astype(np.uint64)) - np.uint64(1)
    return np.where(length > 63, np.uint64(0xFFFF_FFFF_FFFF_FFFF), ones)


def _extract(instruction: Instruction, lowering: Lowering) -> Action:
    """``bfe``: a bit field, sign-extended from its highest bit for signed types."""
    kind = instruction.type
    bits = kind.bits

    def function(a: Array, position: Array, length: Array) -> Array:
        position, length = _field(position, length)
        value = a.view(UNSIGNED[bits]).astype(np.uint64)
        shifted = np.where(
            position > 63, np.uint64(0), value >> np.minimum(position, 63).astype(np.uint64)
        )
        result = shifted & _ones(length)
        if kind.signed:
            # A field that reaches beyond the value has the value's own sign.
            top = np.minimum(position + length - 1, bits - 1)
            sign = (value >> np.maximum(top, 0).astype(np.uint64)) & np.uint64(1)
            fill = np.where((length > 0) & (sign == 1), ~np.uint64(0), np.uint64(0))
            within = np.minimum(length, np.maximum(bits - position, 0))
            result = (result & _ones(within)) | (fill & ~_ones(within))
        return result.astype(UNSIGNED[bits]).view(kind.dtype)

    return _with_amounts(instruction, lowering, 1, function)


def _insert(instruction: Instruction, lowering: Lowering) -> Action:
    """``bfi``: the low bits of the first operand in place of a bit field of the second."""
    kind = instruction.type

    def function(a: Array, b: Array, position: Array, length: Array) -> Array:
        position, length = _field(position, length)
        step = np.minimum(position, 63).astype(np.uint64)
        mask = np.where(position > 63, np.uint64(0), _ones(length) << step)
        inserted = (a.astype(np.uint64) << step) & mask
        return ((b.astype(np.uint64) & ~mask) | inserted).astype(kind.dtype)

    return _with_amounts(instruction, lowering, 2, function)


def _permute(instruction: Instruction, lowering: Lowering) -> Action:
    """``prmt``: each byte of the result is one of eight, or its sign."""
    if instruction.has("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        raise UnsupportedInstructionError("prmt's special modes are not modelled")

    def function(a: Array, b: Array, selectors: Array) -> Array:
        value = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        wide = selectors.astype(np.uint64)
        result = np.zeros(1, np.uint64)
        for position in range(4):
            selector = (wide >> np.uint64(4 * position)) & np.uint64(15)
            chosen = (value >> ((selector & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = (chosen >> np.uint64(7)) * np.uint64(255)
            chosen = np.where(selector & np.uint64(8), sign, chosen)
            result = result | (chosen << np.uint64(8 * position))
        return result.astype(np.uint32)

    return lowering.elementwise(instruction, function, "b32", sources=3)


def _bits(values: Array) -> Array:
    """``[n, width]``: the bits of unsigned integers, highest first."""
    raw = np.ascontiguousarray(values).astype(values.dtype.newbyteorder(">")).view(np.uint8)
    return np.unpackbits(raw.reshape(len(values), -1), axis=1)


def _population(values: Array) -> Array:
    return _bits(values).sum(axis=1).astype(np.uint32)


def _leading_zeros(values: Array) -> Array:
    bits = _bits(values)
    first = bits.argmax(axis=1)
    return np.where(values == 0, bits.shape[1], first).astype(np.uint32)


def _highest(values: Array) -> Array:
    """``bfind``: the highest bit set, or all ones."""
    width = 8 * values.dtype.itemsize
    return np.where(
        values == 0, np.uint32(0xFFFF_FFFF), np.uint32(width - 1) - _leading_zeros(values)
    )


def _reverse(values: Array) -> Array:
    packed = np.packbits(_bits(values)[:, ::-1], axis=1)
    return packed.view(values.dtype.newbyteorder(">")).astype(values.dtype).ravel()


def _count(function: Callable[[Array], Array]) -> Builder:
    def build(instruction: Instruction, lowering: Lowering) -> Action:
        if instruction.type.signed or instruction.has("shiftamt"):
            raise UnsupportedInstructionError("bfind of signed values is not modelled")
        unsigned = f"u{instruction.type.bits}"
        return lowering.elementwise(instruction, function, unsigned, sources=1, result="u32")

    return build


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "and": _logic(np.bitwise_and, 2),
        "bfe": _extract,
        "bfi": _insert,
        "bfind": _count(_highest),
        "brev": _logic(_reverse, 1),
        "clz": _count(_leading_zeros),
        "lop3": _lookup,
        "not": _logic(np.invert, 1),
        "or": _logic(np.bitwise_or, 2),
        "popc": _count(_population),
        "prmt": _permute,
        "shf": _funnel_shift,
        "shl": _shift,
        "shr": _shift,
        "xor": _logic(np.bitwise_xor, 2),
    }
)
"""Builders by opcode."""
