"""PTX's types, and the conversions of those that numpy has not got.

A register is an array of unsigned integers, one for each thread. A :class:`PTXType` says how an
instruction looks at it. bf16, tf32, fp8 and the packed types stay integers there, and
:func:`unpack` and :func:`pack` go between them and float arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ladder_kernels.audit.ptx.errors import UnsupportedInstructionError

__all__ = [
    "FP8_VALUES",
    "SIGNED",
    "TYPES",
    "UNSIGNED",
    "Array",
    "PTXType",
    "bf16_to_float",
    "float_to_bf16",
    "float_to_fp8",
    "float_to_tf32",
    "on_floats",
    "pack",
    "unpack",
]

Array = np.ndarray

UNSIGNED: Mapping[int, np.dtype] = MappingProxyType(
    {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
)
"""Unsigned integers by width."""

SIGNED: Mapping[int, np.dtype] = MappingProxyType(
    {bits: np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
)
"""Signed integers by width."""


@dataclass(frozen=True)
class PTXType:
    """A type as instructions name it.

    Attributes:
        name: As in ``add.f32``.
        bits: Its width.
        dtype: What numpy holds a value in.
        floating: Whether it is a floating-point type, packed ones included.
        signed: Whether it is a signed integer.
        element: The name of what a packed type packs; its own name otherwise.
        lanes: How many elements it packs.
    """

    name: str
    bits: int
    dtype: np.dtype
    floating: bool = False
    signed: bool = False
    element: str = ""
    lanes: int = 1

    @property
    def nbytes(self) -> int:
        """Its width in bytes."""
        return self.bits // 8


def _integers() -> dict[str, PTXType]:
    types = {}
    for bits in UNSIGNED:
        for letter in "bu":
            name = f"{letter}{bits}"
            types[name] = PTXType(name, bits, UNSIGNED[bits], element=name)
        name = f"s{bits}"
        types[name] = PTXType(name, bits, SIGNED[bits], signed=True, element=name)
    return types


def _floats() -> dict[str, PTXType]:
    types = {}
    for bits in (16, 32, 64):
        name = f"f{bits}"
        types[name] = PTXType(name, bits, np.dtype(f"f{bits // 8}"), floating=True, element=name)
    for name, bits in (("bf16", 16), ("tf32", 32), ("e4m3", 8), ("e5m2", 8)):
        types[name] = PTXType(name, bits, UNSIGNED[bits], floating=True, element=name)
    for element in ("f16", "bf16", "f32", "e4m3", "e5m2"):
        bits = 2 * types[element].bits
        name = f"{element}x2"
        types[name] = PTXType(name, bits, UNSIGNED[bits], floating=True, element=element, lanes=2)
    return types


TYPES: Mapping[str, PTXType] = MappingProxyType(
    {
        "pred": PTXType("pred", 1, np.dtype(bool), element="pred"),
        "b128": PTXType("b128", 128, np.dtype("u8"), element="b128"),
        **_integers(),
        **_floats(),
    }
)
"""Every type by name. 128 bits exist only as what two 64-bit registers are loaded from."""


def bf16_to_float(bits: Array) -> Array:
    """uint16 bits of bf16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Array, *, toward_zero: bool = False) -> Array:
    """float32 or float64 as uint16 bits of bf16, rounded once, to nearest even by default."""
    single = _rounded_to_odd(values) if values.dtype == np.float64 else values.astype(np.float32)
    bits = np.ascontiguousarray(single).view(np.uint32)
    half = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    # NaN would round up into infinity or zero.
    rounded = ((bits.astype(np.uint64) + half) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _rounded_to_odd(values: Array) -> Array:
    """float64 as float32 such that a second rounding to 22 bits or fewer is as good as one."""
    nearest = values.astype(np.float32)
    bits = np.ascontiguousarray(nearest).view(np.uint32)
    away = np.abs(nearest) > np.abs(values)
    inexact = (nearest != values) & ~np.isnan(values)
    odd = np.where(away, bits - np.uint32(1), bits) | inexact.astype(np.uint32)
    return odd.view(np.float32)


def float_to_tf32(values: Array) -> Array:
    """float32 as the uint32 bits of tf32, rounded to nearest, ties away (``cvt.rna``)."""
    bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits)


def _fp8_values(exponent_bits: int, mantissa_bits: int, bias: int, *, infinities: bool) -> Array:
    codes = np.arange(256)
    exponents = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissas = codes & ((1 << mantissa_bits) - 1)
    fractions = mantissas / (1 << mantissa_bits)
    values = np.where(
        exponents == 0,
        fractions * 2.0 ** (1 - bias),
        (1 + fractions) * 2.0 ** (exponents - bias),
    )
    if infinities:
        top = exponents == (1 << exponent_bits) - 1
        values = np.where(top, np.where(mantissas == 0, np.inf, np.nan), values)
    else:
        values = np.where((codes & 127) == 127, np.nan, values)
    signed = np.where(codes & 128, -values, values).astype(np.float32)
    signed.flags.writeable = False
    return signed


FP8_VALUES: Mapping[str, Array] = MappingProxyType(
    {
        "e4m3": _fp8_values(4, 3, 7, infinities=False),
        "e5m2": _fp8_values(5, 2, 15, infinities=True),
    }
)
"""The 256 values of each fp8 type."""


def float_to_fp8(values: Array, name: str) -> Array:
    """Floats as uint8 codes, to nearest even; what is too large becomes the largest finite.

    That is ``cvt.rn.satfinite``, the only way PTX converts to fp8.
    """
    positive = FP8_VALUES[name][:128]
    grid = positive[np.isfinite(positive)].astype(np.float64)
    magnitude = np.abs(values).astype(np.float64)
    below = np.clip(np.searchsorted(grid, magnitude, side="right") - 1, 0, len(grid) - 1)
    above = np.minimum(below + 1, len(grid) - 1)
    middle = (grid[below] + grid[above]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    codes = np.where(up, above, below) | np.where(np.signbit(values), 128, 0)
    return np.where(np.isnan(values), 0x7F, codes).astype(np.uint8)


def _decode(raw: Array, element: str) -> Array:
    """Unsigned integers of one element's width as floats."""
    if element == "f16":
        return raw.astype(np.uint16).view(np.float16).astype(np.float32)
    if element == "bf16":
        return bf16_to_float(raw)
    if element == "f32":
        return raw.astype(np.uint32).view(np.float32)
    if element in FP8_VALUES:
        return FP8_VALUES[element][raw]
    raise UnsupportedInstructionError(f"arithmetic on {element} is not modelled")


def _encode(values: Array, element: str, toward_zero: bool) -> Array:
    """Floats as unsigned integers of one element's width, rounded once."""
    if element == "bf16":
        return float_to_bf16(values, toward_zero=toward_zero)
    if element in ("f16", "f32") and toward_zero:
        return _toward_zero(values, TYPES[element].dtype)
    if element == "f16":
        return values.astype(np.float16).view(np.uint16)
    if element == "f32":
        return np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    if element in FP8_VALUES:
        return float_to_fp8(values, element)
    raise UnsupportedInstructionError(f"arithmetic on {element} is not modelled")


def _toward_zero(values: Array, dtype: np.dtype) -> Array:
    nearest = values.astype(dtype)
    bits = nearest.view(UNSIGNED[8 * dtype.itemsize])
    away = np.abs(nearest.astype(values.dtype)) > np.abs(values)
    return np.where(away, bits - bits.dtype.type(1), bits)


def unpack(values: Array, kind: PTXType) -> list[Array]:
    """The floats in values of a type, lowest bits first: float32, or float64 for f64."""
    if kind.name in ("f32", "f64"):
        return [values]
    raw = values.view(UNSIGNED[kind.bits])
    if kind.lanes == 1:
        return [_decode(raw, kind.element)]
    width = kind.bits // kind.lanes
    mask = raw.dtype.type((1 << width) - 1)
    return [
        _decode(
            ((raw >> raw.dtype.type(width * lane)) & mask).astype(UNSIGNED[width]), kind.element
        )
        for lane in range(kind.lanes)
    ]


def pack(parts: Sequence[Array], kind: PTXType, *, toward_zero: bool = False) -> Array:
    """What :func:`unpack` undoes: each element rounded once, to nearest even by default."""
    if kind.name in ("f32", "f64") and not toward_zero:
        return parts[0].astype(kind.dtype, copy=False)
    if kind.lanes == 1:
        return _encode(parts[0], kind.element, toward_zero).view(kind.dtype)
    width = kind.bits // kind.lanes
    packed = kind.dtype.type(0)
    for lane, part in enumerate(parts):
        raw = _encode(part, kind.element, toward_zero).astype(kind.dtype)
        packed = packed | (raw << kind.dtype.type(width * lane))
    return np.asarray(packed)


def on_floats(function: Callable[..., Array], kind: PTXType) -> Callable[..., Array]:
    """A function of float arrays as one of values of a type, element by element."""
    if kind.name in ("f32", "f64"):
        return lambda *values: function(*values).astype(kind.dtype, copy=False)

    def apply(*values: Array) -> Array:
        lanes = zip(*(unpack(value, kind) for value in values), strict=True)
        return pack([function(*lane) for lane in lanes], kind)

    return apply
