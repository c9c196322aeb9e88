"""Integer arithmetic with a carry from one instruction to the next (``add.cc``, ``addc``)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import Array

__all__ = ["BUILDERS"]


def _carrying(instruction: Instruction, lowering: Lowering) -> Action:
    """``add``, ``sub`` and ``mad`` of 32 bits, with a carry in (``addc``), out (``.cc``) or both.

    A subtraction's carry is its borrow.
    """
    kind = instruction.type
    if kind.bits != 32 or instruction.has("wide"):
        raise UnsupportedInstructionError("carries are modelled for 32 bits alone")
    carries_in = instruction.opcode.endswith("c")
    carries_out = instruction.has("cc")
    subtracts = instruction.opcode.startswith("sub")
    multiplies = instruction.opcode.startswith("mad")
    # Sign matters to the high half of a product alone.
    readers = lowering.read_all(instruction.operands[1:], kind if multiplies else "u32")
    write = lowering.write(instruction.operands[0], "b32")
    high = instruction.has("hi")

    def terms(threads: Threads) -> tuple[Array, Array]:
        values = [read(threads).astype(np.int64) for read in readers]
        if not multiplies:
            return values[0], values[1]
        a, b, c = values
        product = (a.astype(np.uint64) * b.astype(np.uint64)).view(np.uint64)
        if high:
            product = (a * b >> 32).view(np.uint64) if kind.signed else product >> np.uint64(32)
        return (product & np.uint64(0xFFFF_FFFF)).view(np.int64), c & 0xFFFF_FFFF

    def action(threads: Threads, mask: Array | None) -> None:
        first, second = terms(threads)
        extra = threads.carry.astype(np.int64) if carries_in else np.int64(0)
        total = first - second - extra if subtracts else first + second + extra
        write(threads, (total & 0xFFFF_FFFF).astype(np.uint32), mask)
        if carries_out:
            out = (total < 0) | (total > 0xFFFF_FFFF)
            np.copyto(threads.carry, out, where=True if mask is None else mask)

    return action


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "add.cc": _carrying,
        "addc": _carrying,
        "addc.cc": _carrying,
        "mad.cc": _carrying,
        "madc": _carrying,
        "madc.cc": _carrying,
        "sub.cc": _carrying,
        "subc": _carrying,
        "subc.cc": _carrying,
    }
)
"""Builders by opcode, with ``.cc`` where the instruction has it."""
