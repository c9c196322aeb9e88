"""Every opcode and what makes its action.

To add an instruction, add a builder to the table of the module where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from ladder_kernels.audit.ptx import (
    access,
    asynchronous,
    bitwise,
    carries,
    convert,
    floating,
    integer,
    matrix,
    moves,
    warps,
)
from ladder_kernels.audit.ptx.counters import Category
from ladder_kernels.audit.ptx.errors import PTXError, UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering, nothing
from ladder_kernels.audit.ptx.operands import Immediate, Symbol
from ladder_kernels.audit.ptx.parser import Instruction, Program
from ladder_kernels.audit.ptx.state import EXITED, Threads
from ladder_kernels.audit.ptx.types import Array

__all__ = ["Control", "Step", "lower"]


class Control(Enum):
    """What an instruction does to the flow."""

    NEXT = "goes on"
    JUMP = "branches or returns"
    BARRIER = "waits for the block"


@dataclass(frozen=True)
class Step:
    """An instruction ready to run.

    Attributes:
        instruction: The instruction.
        control: What it does to the flow.
        action: What it does to everything else.
        target: Where a jump leads.
        category: What it is counted as.
    """

    instruction: Instruction
    control: Control
    action: Action
    target: int
    category: Category


_BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        **access.BUILDERS,
        **asynchronous.BUILDERS,
        **bitwise.BUILDERS,
        **carries.BUILDERS,
        **convert.BUILDERS,
        **matrix.BUILDERS,
        **moves.BUILDERS,
        **warps.BUILDERS,
    }
)
# Hints to caches, schedulers and other launches, and fences between threads that run in turn.
_WITHOUT_EFFECT = frozenset(
    {
        "applypriority",
        "discard",
        "fence",
        "griddepcontrol",
        "membar",
        "nanosleep",
        "pmevent",
        "prefetch",
        "prefetchu",
        "setmaxnreg",
    }
)
_JUMPS = frozenset({"bra", "exit", "ret"})
_BARRIERS = frozenset({"bar", "barrier"})
_TENSOR = frozenset({"mma", "wgmma", "tcgen05", "wmma"})


def lower(program: Program) -> list[Step]:
    """Make every instruction of a program ready to run.

    An instruction that is not modelled raises when it is reached, not before: kernels hold code
    for cases that never happen.
    """
    lowering = Lowering(program)
    return [_step(instruction, lowering) for instruction in program.instructions]


def _step(instruction: Instruction, lowering: Lowering) -> Step:
    control, target, action = Control.NEXT, 0, nothing
    try:
        if instruction.opcode in _JUMPS:
            control, target = Control.JUMP, _target(instruction, lowering.program)
        elif instruction.opcode in _BARRIERS and not instruction.has("warp"):
            control = Control.BARRIER
            _check_barrier(instruction, lowering.program)
        else:
            action = _builder(instruction)(instruction, lowering)
    except UnsupportedInstructionError as error:
        control, action = Control.NEXT, _refuse(error.message)
    return Step(instruction, control, action, target, _category(instruction))


def _refuse(message: str) -> Action:
    def action(threads: Threads, mask: Array | None) -> None:
        raise UnsupportedInstructionError(message)

    return action


def _target(instruction: Instruction, program: Program) -> int:
    if instruction.opcode != "bra":
        return EXITED
    label = instruction.operands[0]
    if not isinstance(label, Symbol) or label.name not in program.labels:
        raise UnsupportedInstructionError("a branch to a place that is no label")
    return program.labels[label.name]


def _check_barrier(instruction: Instruction, program: Program) -> None:
    if instruction.has("arrive", "red", "cluster"):
        raise UnsupportedInstructionError("of barriers, only waiting for the block is modelled")
    operands = instruction.operands
    whole = Immediate(program.block_threads or 0)
    if operands[:1] != (Immediate(0),) or (len(operands) > 1 and operands[1] != whole):
        raise UnsupportedInstructionError("named barriers of part of a block are not modelled")


def _builder(instruction: Instruction) -> Builder:
    opcode = instruction.opcode
    if opcode in _WITHOUT_EFFECT or opcode in _BARRIERS:
        return lambda instruction, lowering: nothing
    if opcode == "trap":
        return lambda instruction, lowering: _trap
    builder = carries.BUILDERS[f"{opcode}.cc"] if instruction.has("cc") else _BUILDERS.get(opcode)
    if builder is None:
        floats = bool(instruction.types) and instruction.type.floating
        builder = (floating if floats else integer).BUILDERS.get(opcode)
    if builder is None:
        raise UnsupportedInstructionError(f"{opcode} is not modelled")
    return builder


def _trap(threads: Threads, mask: Array | None) -> None:
    raise PTXError("the kernel trapped")


def _category(instruction: Instruction) -> Category:
    opcode = instruction.opcode
    if opcode in _TENSOR:
        return "tensor"
    if opcode in _JUMPS or opcode in _BARRIERS or opcode == "trap":
        return "control"
    if opcode in ("ldmatrix", "stmatrix"):
        return "shared"
    if opcode == "cp":
        waits = instruction.has("commit_group", "wait_group", "wait_all")
        return "control" if waits else "global"
    if opcode in access.BUILDERS:
        if instruction.has("param", "local"):
            return "other"
        shared = any(modifier.startswith("shared") for modifier in instruction.modifiers)
        return "shared" if shared else "global"
    if opcode == "cvt":
        return "convert"
    return _arithmetic_category(instruction)


def _arithmetic_category(instruction: Instruction) -> Category:
    opcode = instruction.opcode
    if opcode in ("mov", "cvta") or not instruction.types:
        return "other"
    if instruction.type.floating and (opcode in floating.BUILDERS or opcode in ("set", "setp")):
        return "float"
    if (
        opcode in integer.BUILDERS
        or opcode in carries.BUILDERS
        or opcode in bitwise.BUILDERS
        or opcode in ("set", "setp", "selp")
    ):
        return "integer"
    return "other"
