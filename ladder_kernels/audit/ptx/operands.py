"""An instruction's operands as written, before a :class:`Lowering` turns them into functions."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Address",
    "FloatBits",
    "Immediate",
    "Operand",
    "Pair",
    "Register",
    "Sink",
    "Special",
    "Symbol",
    "Vector",
]


@dataclass(frozen=True)
class Register:
    """A register by its number; ``negated`` only for predicates (``!%p1``)."""

    index: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """An integer constant."""

    value: int


@dataclass(frozen=True)
class FloatBits:
    """A floating-point constant by its bits (``0f3F800000``)."""

    value: int
    bits: int


@dataclass(frozen=True)
class Special:
    """A special register, such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A label, a variable or a parameter."""

    name: str


@dataclass(frozen=True)
class Sink:
    """``_``: a destination that is not wanted."""


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, c, d}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``: two destinations."""

    first: Operand
    second: Operand


Operand = Register | Immediate | FloatBits | Special | Symbol | Sink | Address | Vector | Pair
"""Whatever may stand between two commas."""
