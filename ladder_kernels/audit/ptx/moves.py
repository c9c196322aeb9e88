"""Moves, selections, comparisons and address conversions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering
from ladder_kernels.audit.ptx.operands import Pair, Vector
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import TYPES, UNSIGNED, Array, PTXType, pack, unpack

__all__ = ["BUILDERS"]

_COMPARISONS: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "lo": np.less,
        "ls": np.less_equal,
        "hi": np.greater,
        "hs": np.greater_equal,
    }
)
_FLOAT_ONLY = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
_COMBINATIONS: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
)


def _move(instruction: Instruction, lowering: Lowering) -> Action:
    """``mov``, which also packs and unpacks vectors."""
    target, source = instruction.operands
    if isinstance(target, Vector):
        return _unpack_vector(instruction, lowering, target, source)
    if isinstance(source, Vector):
        return _pack_vector(instruction, lowering, target, source)
    return lowering.elementwise(instruction, lambda value: value, instruction.type, sources=1)


def _unpack_vector(
    instruction: Instruction, lowering: Lowering, target: Vector, source: object
) -> Action:
    bits = instruction.type.bits
    part = bits // len(target.items)
    read = lowering.read(instruction.operands[1], f"b{bits}")
    writers = lowering.write_all(target.items, f"b{part}")
    wide, narrow = UNSIGNED[bits], UNSIGNED[part]

    def action(threads: Threads, mask: Array | None) -> None:
        value = read(threads)
        for position, write in enumerate(writers):
            write(threads, (value >> wide.type(part * position)).astype(narrow), mask)

    return action


def _pack_vector(
    instruction: Instruction, lowering: Lowering, target: object, source: Vector
) -> Action:
    bits = instruction.type.bits
    part = bits // len(source.items)
    readers = lowering.read_all(source.items, f"b{part}")
    write = lowering.write(instruction.operands[0], f"b{bits}")
    wide = UNSIGNED[bits]

    def action(threads: Threads, mask: Array | None) -> None:
        value = np.zeros(1, wide)
        for position, read in enumerate(readers):
            value = value | (read(threads).astype(wide) << wide.type(part * position))
        write(threads, value, mask)

    return action


def _select(instruction: Instruction, lowering: Lowering) -> Action:
    first, second = lowering.read_all(instruction.operands[1:3], instruction.type)
    chooser = lowering.read(instruction.operands[3], "pred")
    write = lowering.write(instruction.operands[0], instruction.type)

    def action(threads: Threads, mask: Array | None) -> None:
        write(threads, np.where(chooser(threads), first(threads), second(threads)), mask)

    return action


def _comparison(name: str, kind: PTXType) -> Callable[[Array, Array], Array]:
    if not kind.floating:
        if kind.name[0] == "b" and name not in ("eq", "ne"):
            raise UnsupportedInstructionError(f"setp.{name} of untyped bits")
        return _COMPARISONS[name]
    if name in ("num", "nan"):
        wanted = name == "nan"
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == wanted
    if name in _FLOAT_ONLY:
        compare = _COMPARISONS[name[:-1]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        # Ordered, unlike numpy's.
        return lambda a, b: (a < b) | (a > b)
    return _COMPARISONS[name]


def _set_predicate(instruction: Instruction, lowering: Lowering) -> Action:
    """``setp``, with a second destination and a third source or without."""
    kind = instruction.type
    if kind.lanes > 1:
        raise UnsupportedInstructionError("setp of packed types is not modelled")
    compare = _comparison(instruction.one_of(*_COMPARISONS, *_FLOAT_ONLY), kind)
    first, second = lowering.read_all(instruction.operands[1:3], kind)
    target = instruction.operands[0]
    targets = (target.first, target.second) if isinstance(target, Pair) else (target,)
    writers = lowering.write_all(targets, "pred")
    # The comparison's own name comes first: "xor" and the like can only follow it.
    combination = next((m for m in instruction.modifiers if m in _COMBINATIONS), None)
    combine = _COMBINATIONS[combination] if combination else None
    third = lowering.read(instruction.operands[3], "pred") if combine else None

    def values(threads: Threads) -> tuple[Array, Array]:
        a, b = first(threads), second(threads)
        return (unpack(a, kind)[0], unpack(b, kind)[0]) if kind.floating else (a, b)

    def action(threads: Threads, mask: Array | None) -> None:
        result = compare(*values(threads))
        results = [result, ~result][: len(writers)]
        if combine is not None and third is not None:
            other = third(threads)
            results = [combine(value, other) for value in results]
        for write, value in zip(writers, results, strict=True):
            write(threads, value, mask)

    return action


def _set(instruction: Instruction, lowering: Lowering) -> Action:
    """``set``: 1 for true as a float, all ones as an integer."""
    target, source = instruction.types[:2]
    compare = _comparison(instruction.one_of(*_COMPARISONS, *_FLOAT_ONLY), source)
    if instruction.has(*_COMBINATIONS) or target.lanes != source.lanes:
        raise UnsupportedInstructionError("this form of set is not modelled")
    first, second = lowering.read_all(instruction.operands[1:3], source)
    write = lowering.write(instruction.operands[0], target)

    def action(threads: Threads, mask: Array | None) -> None:
        a, b = first(threads), second(threads)
        pairs = zip(*(unpack(v, source) if source.floating else [v] for v in (a, b)), strict=True)
        results = [compare(x, y) for x, y in pairs]
        if target.floating:
            write(threads, pack([result.astype(np.float32) for result in results], target), mask)
        else:
            write(threads, -results[0].astype(f"i{target.nbytes}").view(target.dtype), mask)

    return action


def _convert_address(instruction: Instruction, lowering: Lowering) -> Action:
    """``cvta`` of global addresses, which are generic addresses as they are."""
    if not instruction.has("global"):
        raise UnsupportedInstructionError("generic addresses are modelled for global memory alone")
    return lowering.elementwise(instruction, lambda value: value, instruction.type, sources=1)


def _create_policy(instruction: Instruction, lowering: Lowering) -> Action:
    """``createpolicy``: caches are not modelled, so any value does."""
    write = lowering.write(instruction.operands[0], TYPES["b64"])
    zero = np.zeros(1, np.uint64)

    def action(threads: Threads, mask: Array | None) -> None:
        write(threads, zero, mask)

    return action


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "createpolicy": _create_policy,
        "cvta": _convert_address,
        "mov": _move,
        "selp": _select,
        "set": _set,
        "setp": _set_predicate,
    }
)
"""Builders by opcode."""
