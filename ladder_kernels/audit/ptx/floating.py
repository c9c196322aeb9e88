"""Floating-point arithmetic, packed types included.

Results are rounded once, to nearest even. What the hardware approximates (``ex2.approx``,
``rcp.approx``, ``div.full``) is exact to a rounding here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import Array, PTXType, on_floats, unpack

__all__ = ["BUILDERS"]

_LEAST_NORMAL = np.finfo(np.float32).tiny


def _flush(values: Array) -> Array:
    """Subnormals to zero of the same sign."""
    return np.where(
        np.abs(values) < _LEAST_NORMAL, np.copysign(values.dtype.type(0), values), values
    )


def _operation(instruction: Instruction, function: Callable[..., Array]) -> Callable[..., Array]:
    """The function with what the instruction's modifiers ask for."""
    if instruction.has("rz", "rm", "rp"):
        raise UnsupportedInstructionError("only rounding to nearest is modelled")
    kind = instruction.types[0]
    relu, saturate, flush = instruction.has("relu"), instruction.has("sat"), instruction.has("ftz")

    def operation(*values: Array) -> Array:
        if flush:
            values = tuple(_flush(value) for value in values)
        result = function(*values)
        if relu:
            result = np.fmax(result, result.dtype.type(0))
        if saturate:
            # NaN becomes zero.
            result = np.fmin(np.fmax(result, result.dtype.type(0)), result.dtype.type(1))
        if not flush:
            return result
        return _flush(result.astype(np.float32))

    # Of the types with 16 bits, only f16 has subnormals that .ftz speaks of.
    if flush and kind.element != "f32":
        raise UnsupportedInstructionError("ftz is modelled for f32 alone")
    return on_floats(operation, kind)


def _elementwise(function: Callable[..., Array], sources: int) -> Builder:
    def build(instruction: Instruction, lowering: Lowering) -> Action:
        operation = _operation(instruction, function)
        if len(instruction.types) > 1:
            return _mixed(instruction, lowering, operation, sources)
        return lowering.elementwise(instruction, operation, instruction.type, sources=sources)

    return build


def _mixed(
    instruction: Instruction, lowering: Lowering, operation: Callable[..., Array], sources: int
) -> Action:
    """``add.f32.bf16`` and its kin: all sources but the last are of the narrower type."""
    wide, narrow = instruction.types
    if wide.name != "f32" or narrow.name not in ("f16", "bf16") or sources < 2:
        raise UnsupportedInstructionError("arithmetic of these types together is not modelled")
    *narrow_operands, last = instruction.operands[1 : 1 + sources]
    readers = lowering.read_all(narrow_operands, narrow)
    read_last = lowering.read(last, wide)
    write = lowering.write(instruction.operands[0], wide)

    def action(threads: Threads, mask: Array | None) -> None:
        values = [unpack(read(threads), narrow)[0] for read in readers]
        write(threads, operation(*values, read_last(threads)), mask)

    return action


def _fused(a: Array, b: Array, c: Array) -> Array:
    # The product of two float32 is exact in float64, and that of two float64 nearly so here.
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    exact = a.astype(wide) * b.astype(wide) + c.astype(wide)
    return exact if wide is np.float64 else exact.astype(np.float64)


def _extremum(kept: np.ufunc, other: np.ufunc) -> Builder:
    """``min`` and ``max``, of two values or three, that pass over NaN or hand it on (``.NaN``)."""

    def build(instruction: Instruction, lowering: Lowering) -> Action:
        pick = other if instruction.has("NaN") else kept
        if instruction.has("xorsign"):
            pick = _of_magnitudes(pick)
        sources = len(instruction.operands) - 1
        operation = _operation(
            instruction, (lambda a, b, c: pick(pick(a, b), c)) if sources == 3 else pick
        )
        return lowering.elementwise(instruction, operation, instruction.type, sources=sources)

    return build


def _of_magnitudes(pick: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """``.xorsign.abs``: picks among magnitudes; the sign is that of the product."""

    def function(a: Array, b: Array) -> Array:
        negative = np.signbit(a) ^ np.signbit(b)
        magnitude = pick(np.abs(a), np.abs(b))
        return np.where(negative, -magnitude, magnitude)

    return function


def _transcendental(function: Callable[[Array], Array]) -> Builder:
    """Computed in float64, whatever the type."""
    return _elementwise(lambda a: function(a.astype(np.float64)), 1)


def _copysign(instruction: Instruction, lowering: Lowering) -> Action:
    """``copysign``: the magnitude of the second operand with the sign of the first."""
    operation = on_floats(lambda a, b: np.copysign(b, a), instruction.type)
    return lowering.elementwise(instruction, operation, instruction.type, sources=2)


_PROPERTIES: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda a: ~np.isnan(a),
    }
)


def _test(instruction: Instruction, lowering: Lowering) -> Action:
    """``testp``."""
    function = _PROPERTIES[instruction.one_of(*_PROPERTIES)]
    return lowering.elementwise(instruction, function, instruction.type, sources=1, result="pred")


def _sign_bits(function: Callable[[Array, Array], Array]) -> Builder:
    """``neg`` and ``abs``, which touch the sign alone, so that NaN and subnormals pass."""

    def build(instruction: Instruction, lowering: Lowering) -> Action:
        kind = instruction.type
        if instruction.has("ftz"):
            operation = _operation(
                instruction, np.negative if instruction.opcode == "neg" else np.abs
            )
            return lowering.elementwise(instruction, operation, kind, sources=1)
        read = lowering.read(instruction.operands[1], f"b{kind.bits}")
        write = lowering.write(instruction.operands[0], f"b{kind.bits}")
        signs = _signs(kind)

        def action(threads: Threads, mask: Array | None) -> None:
            write(threads, function(read(threads), signs), mask)

        return action

    return build


def _signs(kind: PTXType) -> Array:
    width = kind.bits // kind.lanes
    bits = sum(1 << (width * (lane + 1) - 1) for lane in range(kind.lanes))
    return np.array([bits], np.uint64).astype(f"u{kind.nbytes}")


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "abs": _sign_bits(lambda value, signs: value & ~signs),
        "add": _elementwise(np.add, 2),
        "copysign": _copysign,
        "cos": _transcendental(np.cos),
        "div": _elementwise(np.divide, 2),
        "ex2": _transcendental(np.exp2),
        "fma": _elementwise(_fused, 3),
        "lg2": _transcendental(np.log2),
        "mad": _elementwise(_fused, 3),
        "max": _extremum(np.fmax, np.maximum),
        "min": _extremum(np.fmin, np.minimum),
        "mul": _elementwise(np.multiply, 2),
        "neg": _sign_bits(lambda value, signs: value ^ signs),
        "rcp": _transcendental(np.reciprocal),
        "rsqrt": _transcendental(lambda a: 1 / np.sqrt(a)),
        "sin": _transcendental(np.sin),
        "sqrt": _transcendental(np.sqrt),
        "sub": _elementwise(np.subtract, 2),
        "tanh": _transcendental(np.tanh),
        "testp": _test,
    }
)
"""Builders by opcode."""
