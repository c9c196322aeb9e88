"""Loads, stores and atomics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.counters import GlobalTraffic
from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError
from ladder_kernels.audit.ptx.lowering import Action, Builder, Lowering, Reader, items
from ladder_kernels.audit.ptx.operands import Address, Symbol, Vector
from ladder_kernels.audit.ptx.parser import Instruction
from ladder_kernels.audit.ptx.state import Threads
from ladder_kernels.audit.ptx.types import UNSIGNED, Array, PTXType, on_floats

__all__ = ["BUILDERS", "count", "state_space"]

_WIDTHS: Mapping[str, int] = MappingProxyType({"v2": 2, "v4": 4, "v8": 8})


def state_space(instruction: Instruction) -> str:
    """The state space that an instruction names: global, shared or local."""
    for modifier in instruction.modifiers:
        name = modifier.split("::", 1)[0]
        if name in ("global", "shared", "local"):
            if modifier == "shared::cluster":
                raise UnsupportedInstructionError("clusters are not modelled")
            return name
    raise UnsupportedInstructionError("generic addresses are not modelled")


def count(
    threads: Threads, space: str, addresses: Array, mask: Array | None, nbytes: int, *, load: bool
) -> None:
    """Tell the counters, if there are any, of an access."""
    counters = threads.run.counters
    if counters is None or space == "local":
        return
    active = threads.active(mask)
    if space == "shared":
        counters.shared.record(threads.by_warp(addresses), active, nbytes)
    elif active.any():
        # An instruction reads or writes one argument: that of the first thread that takes part.
        name = threads.run.global_memory.argument_at(int(threads.by_warp(addresses)[active][0]))
        of_arguments = counters.loads_of if load else counters.stores_of
        traffic = of_arguments.setdefault(name, GlobalTraffic())
        traffic.record(threads.by_warp(addresses), active, nbytes)


def _locator(
    instruction: Instruction, address: Reader, nbytes: int, *, load: bool
) -> Callable[[Threads, Array | None], Array]:
    """How to find where an access lies, checked and counted."""
    space = state_space(instruction)
    what = "read" if load else "write"

    def locate(threads: Threads, mask: Array | None) -> Array:
        addresses = address(threads)
        places = threads.memories[space].locate(threads, addresses, mask, nbytes, what)
        count(threads, space, addresses, mask, nbytes, load=load)
        return places

    return locate


def _vector(instruction: Instruction) -> int:
    return next((_WIDTHS[m] for m in instruction.modifiers if m in _WIDTHS), 1)


def _load(instruction: Instruction, lowering: Lowering) -> Action:
    if instruction.has("param"):
        return _load_parameter(instruction, lowering)
    kind, space = instruction.type, state_space(instruction)
    width = _vector(instruction)
    address = lowering.address(instruction.operands[1])
    locate = _locator(instruction, address, kind.nbytes * width, load=True)
    writers = lowering.write_all(items(instruction.operands[0]), kind)
    if len(writers) != width:
        raise UnsupportedInstructionError("the vector's width and its registers differ")

    def action(threads: Threads, mask: Array | None) -> None:
        places = locate(threads, mask) // kind.nbytes
        words = threads.memories[space].words[kind.bits]
        for position, write in enumerate(writers):
            values = words[places + position].view(kind.dtype)
            if mask is not None:
                everyone = np.zeros(threads.count, kind.dtype)
                everyone[mask] = values
                values = everyone
            write(threads, values, mask)

    return action


def _load_parameter(instruction: Instruction, lowering: Lowering) -> Action:
    kind = instruction.type
    source = instruction.operands[1]
    if not isinstance(source, Address) or not isinstance(source.base, Symbol):
        raise UnsupportedInstructionError("indexed parameters are not modelled")
    name = source.base.name
    parameter = next((p for p in lowering.program.parameters if p.name == name), None)
    if parameter is None:
        raise UnsupportedInstructionError(f"the symbol {name} is not a parameter")
    first = parameter.offset + source.offset
    writers = lowering.write_all(items(instruction.operands[0]), kind)

    def action(threads: Threads, mask: Array | None) -> None:
        values = np.frombuffer(threads.run.parameters, kind.dtype, len(writers), first)
        for position, write in enumerate(writers):
            write(threads, values[position : position + 1], mask)

    return action


def _store(instruction: Instruction, lowering: Lowering) -> Action:
    kind, space = instruction.type, state_space(instruction)
    if instruction.has("async"):
        raise UnsupportedInstructionError("st.async is not modelled")
    width = _vector(instruction)
    address = lowering.address(instruction.operands[0])
    locate = _locator(instruction, address, kind.nbytes * width, load=False)
    readers = lowering.read_all(items(instruction.operands[1]), kind)
    if len(readers) != width:
        raise UnsupportedInstructionError("the vector's width and its registers differ")

    def action(threads: Threads, mask: Array | None) -> None:
        places = locate(threads, mask) // kind.nbytes
        words = threads.memories[space].words[kind.bits]
        for position, read in enumerate(readers):
            values = threads.each(read(threads).view(UNSIGNED[kind.bits]))
            words[places + position] = values if mask is None else values[mask]

    return action


_Update = Callable[[Array, Array], Array]

_UPDATES: Mapping[str, _Update] = MappingProxyType(
    {
        "add": np.add,
        "and": np.bitwise_and,
        "dec": lambda old, value: np.where(
            (old == 0) | (old > value), value, old - old.dtype.type(1)
        ),
        "exch": lambda old, value: value,
        "inc": lambda old, value: np.where(old < value, old + old.dtype.type(1), old.dtype.type(0)),
        "max": np.maximum,
        "min": np.minimum,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
)


def _update(instruction: Instruction, kind: PTXType) -> _Update:
    name = instruction.one_of("cas", *_UPDATES)
    if name == "cas":
        return lambda old, value: value
    if not kind.floating:
        return _UPDATES[name]
    functions: dict[str, _Update] = {"add": np.add, "max": np.fmax, "min": np.fmin}
    if name == "exch":
        return _UPDATES[name]
    if name not in functions:
        raise UnsupportedInstructionError(f"atomic {name} of floats is not modelled")
    return on_floats(functions[name], kind)


def _atomic(instruction: Instruction, lowering: Lowering) -> Action:
    """``atom``, which returns the old value, and ``red``, which does not."""
    if instruction.has("async"):
        raise UnsupportedInstructionError("red.async is not modelled")
    returns = instruction.opcode == "atom"
    operands = instruction.operands if returns else (None, *instruction.operands)
    target, place, *sources = operands
    if isinstance(sources[0], Vector):
        return _vector_atomic(instruction, lowering)
    kind, space = instruction.type, state_space(instruction)
    update, compares = _update(instruction, kind), instruction.has("cas")
    address = lowering.address(place) if place is not None else None
    write = lowering.write(target, kind) if target is not None else None
    readers = lowering.read_all(sources[: 2 if compares else 1], kind)
    assert address is not None
    locate = _locator(instruction, address, kind.nbytes, load=False)

    def action(threads: Threads, mask: Array | None) -> None:
        places = locate(threads, mask) // kind.nbytes
        words = threads.memories[space].words[kind.bits].view(kind.dtype)
        values = [threads.each(read(threads)) for read in readers]
        if mask is not None:
            values = [value[mask] for value in values]
        old = _exchange(words, places, update, values)
        if write is not None:
            everyone = np.zeros(threads.count, kind.dtype)
            everyone[slice(None) if mask is None else mask] = old
            write(threads, everyone, mask)

    return action


def _exchange(words: Array, places: Array, update: _Update, values: list[Array]) -> Array:
    """Update words in the threads' order and return what each thread found."""
    if len(np.unique(places)) == len(places):
        return _exchange_distinct(words, places, update, values)
    old = np.zeros(len(places), words.dtype)
    for lane in range(len(places)):
        one = slice(lane, lane + 1)
        old[one] = _exchange_distinct(words, places[one], update, [value[one] for value in values])
    return old


def _exchange_distinct(words: Array, places: Array, update: _Update, values: list[Array]) -> Array:
    old = words[places]
    new = update(old, values[-1])
    # Compare-and-swap has two values: what must be there, and what shall be.
    words[places] = np.where(old == values[0], new, old) if len(values) == 2 else new
    return old


def _vector_atomic(instruction: Instruction, lowering: Lowering) -> Action:
    """An atomic of a vector: one of each element."""
    returns = instruction.opcode == "atom"
    *targets, place, values = instruction.operands[: 3 if returns else 2]
    if not isinstance(place, Address):
        raise UnsupportedInstructionError(f"the address {place} is not modelled")
    nbytes = instruction.type.nbytes
    actions = []
    for position, value in enumerate(items(values)):
        there = Address(place.base, place.offset + position * nbytes)
        found = tuple(items(target)[position] for target in targets)
        actions.append(_atomic(replace(instruction, operands=(*found, there, value)), lowering))

    def action(threads: Threads, mask: Array | None) -> None:
        for one in actions:
            one(threads, mask)

    return action


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {"atom": _atomic, "ld": _load, "ldu": _load, "red": _atomic, "st": _store}
)
"""Builders by opcode."""
