"""From instructions to functions of threads.

A builder takes an instruction and a :class:`Lowering` and returns an :data:`Action`, which does the
instruction for all threads of a mask. Whatever can be decided once is decided there, so that an
executed instruction is a few numpy calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.memory import LOCAL_BASE, MODULE_BASE, SHARED_BASE
from ladder_kernels.audit.ptx.operands import (
    Address,
    FloatBits,
    Immediate,
    Operand,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from ladder_kernels.audit.ptx.parser import Instruction, Program
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import SIGNED, TYPES, UNSIGNED, Array, PTXType

__all__ = ["Action", "Builder", "Lowering", "Reader", "Writer", "items", "nothing"]

Reader = Callable[[Threads], Array]
"""Gives an operand's value: one for each thread, or an array of one for all."""
Writer = Callable[[Threads, Array, "Array | None"], None]
"""Writes a destination for the threads of a mask, or all if None."""
Action = Callable[[Threads, "Array | None"], None]
"""Does an instruction for the threads of a mask, or all if None."""

_BASES: Mapping[str, int] = {
    "global": MODULE_BASE,
    "local": LOCAL_BASE,
    "shared": SHARED_BASE,
}


def nothing(threads: Threads, mask: Array | None) -> None:
    """The action of an instruction that changes nothing here, such as a fence."""


class Lowering:
    """Turns the operands of one program's instructions into functions."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def read(self, operand: Operand, kind: PTXType | str) -> Reader:
        """How to read an operand as a type."""
        kind = TYPES[kind] if isinstance(kind, str) else kind
        if isinstance(operand, Register):
            return self._read_register(operand, kind)
        if isinstance(operand, Special):
            return _special(operand.name, kind)
        value = self._constant(operand, kind)
        return lambda threads: value

    def read_all(self, operands: Sequence[Operand], kind: PTXType | str) -> list[Reader]:
        """How to read several operands as a type."""
        return [self.read(operand, kind) for operand in operands]

    def _read_register(self, operand: Register, kind: PTXType) -> Reader:
        index, width = operand.index, self.program.register_bits[operand.index]
        if (kind.name == "pred") != (width == 1):
            raise UnsupportedInstructionError("a predicate where data belongs, or the reverse")
        if width == 1:
            if operand.negated:
                return lambda threads: ~threads.registers[index]
            return lambda threads: threads.registers[index]
        dtype, unsigned = kind.dtype, UNSIGNED[kind.bits]
        if width == kind.bits:
            return lambda threads: threads.registers[index].view(dtype)
        return lambda threads: threads.registers[index].astype(unsigned).view(dtype)

    def _constant(self, operand: Operand, kind: PTXType) -> Array:
        if isinstance(operand, Symbol):
            return np.array([self._symbol(operand.name)], np.uint64).astype(kind.dtype)
        if isinstance(operand, FloatBits):
            value = np.array([operand.value], UNSIGNED[operand.bits])
            if kind.bits == operand.bits:
                return value.view(kind.dtype)
        if isinstance(operand, Immediate):
            if kind.name == "pred":
                return np.array([bool(operand.value)])
            if kind.name in ("f32", "f64"):
                return np.array([operand.value], kind.dtype)
            bits = operand.value & ((1 << kind.bits) - 1)
            return np.array([bits], UNSIGNED[kind.bits]).view(kind.dtype)
        raise UnsupportedInstructionError(f"operand {operand} is not modelled")

    def _symbol(self, name: str) -> int:
        variable = self.program.variables.get(name)
        if variable is None or variable.space not in _BASES:
            raise UnsupportedInstructionError(f"the symbol {name} is not modelled")
        return _BASES[variable.space] + variable.offset

    def write(self, operand: Operand, kind: PTXType | str) -> Writer:
        """How to write a destination as a type."""
        kind = TYPES[kind] if isinstance(kind, str) else kind
        if isinstance(operand, Sink):
            return lambda threads, value, mask: None
        if not isinstance(operand, Register):
            raise UnsupportedInstructionError(f"destination {operand} is not modelled")
        index, width = operand.index, self.program.register_bits[operand.index]
        convert = _widen(kind, width)

        def write(threads: Threads, value: Array, mask: Array | None) -> None:
            target = threads.registers[index]
            if mask is None:
                target[...] = convert(value)
            else:
                np.copyto(target, convert(value), where=mask)

        return write

    def write_all(self, operands: Sequence[Operand], kind: PTXType | str) -> list[Writer]:
        """How to write several destinations as a type."""
        return [self.write(operand, kind) for operand in operands]

    def address(self, operand: Operand) -> Reader:
        """How to compute an address: int64, one for each thread."""
        if not isinstance(operand, Address):
            raise UnsupportedInstructionError(f"the address {operand} is not modelled")
        base, offset = operand.base, operand.offset
        if isinstance(base, Symbol):
            fixed = np.array([self._symbol(base.name) + offset], np.int64)
            return lambda threads: threads.each(fixed)
        index = base.index
        if self.program.register_bits[index] == 64:
            step = np.uint64(offset & 0xFFFF_FFFF_FFFF_FFFF)
            return lambda threads: (threads.registers[index] + step).view(np.int64)
        return lambda threads: threads.registers[index].astype(np.int64) + offset

    def elementwise(
        self,
        instruction: Instruction,
        function: Callable[..., Array],
        kind: PTXType | str,
        *,
        sources: int,
        result: PTXType | str | None = None,
    ) -> Action:
        """The action of an instruction that maps its sources of one type to one destination.

        Args:
            instruction: Destination first, then the sources.
            function: Of as many arrays as there are sources; gives the result's numpy type.
            kind: The sources' type.
            sources: How many there are.
            result: The destination's type, if it is another.
        """
        if len(instruction.operands) < 1 + sources:
            raise UnsupportedInstructionError(f"{instruction.opcode} lacks operands")
        readers = self.read_all(instruction.operands[1 : 1 + sources], kind)
        write = self.write(instruction.operands[0], result or kind)

        def action(threads: Threads, mask: Array | None) -> None:
            write(threads, function(*[read(threads) for read in readers]), mask)

        return action


Builder = Callable[[Instruction, Lowering], Action]
"""Makes an instruction's action."""


def items(operand: Operand) -> tuple[Operand, ...]:
    """The operands in ``{...}``, or the one operand that stands alone."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def _widen(kind: PTXType, width: int) -> Callable[[Array], Array]:
    """From values of a type to the unsigned integers of a register that holds them."""
    if kind.name == "pred":
        if width != 1:
            raise UnsupportedInstructionError("a predicate written to a data register")
        return lambda value: value
    if width == 1:
        raise UnsupportedInstructionError("data written to a predicate")
    unsigned, own = UNSIGNED[width], UNSIGNED[kind.bits]
    if width == kind.bits:
        return lambda value: value.view(unsigned)
    if width > kind.bits and kind.signed:
        return lambda value: value.astype(SIGNED[width]).view(unsigned)
    return lambda value: value.view(own).astype(unsigned)


def _special(name: str, kind: PTXType) -> Reader:
    dtype = kind.dtype
    indices: Mapping[str, Callable[[Threads], Array]] = {
        "%tid.x": lambda threads: threads.ids,
        "%laneid": lambda threads: threads.ids % np.uint32(32),
        "%warpid": lambda threads: threads.ids // np.uint32(32),
        "%ntid.x": lambda threads: np.array([threads.run.block_threads]),
        "%tid.y": lambda threads: np.array([0]),
        "%tid.z": lambda threads: np.array([0]),
        "%ntid.y": lambda threads: np.array([1]),
        "%ntid.z": lambda threads: np.array([1]),
        "%clock": lambda threads: np.array([threads.executed]),
        "%clock64": lambda threads: np.array([threads.executed]),
        "%globaltimer": lambda threads: np.array([threads.executed]),
    }
    if name in indices:
        index = indices[name]
        return lambda threads: index(threads).astype(dtype)
    match = re.match(r"%(ctaid|nctaid)\.([xyz])$", name)
    if match is None:
        raise UnsupportedInstructionError(f"the special register {name} is not modelled")
    axis = "xyz".index(match.group(2))
    if match.group(1) == "nctaid":
        return lambda threads: np.array([threads.run.grid[axis]], dtype)
    return lambda threads: threads.blocks[threads.block, axis].astype(dtype)
