"""How the Triton products with NF4 weights run on which GPU: one table of data.

A row says for which architectures, product, kinds of number, rows of x and size of the weight it
holds; the first row that fits is taken. ``evidence`` says what a row rests on: "modelled", from
registers, instructions and the device's published rates, or "measured", on the device.

The model: decoding a tile costs instructions beside those of its tensor-core products. It is hidden
where tensor cores are slow (GeForce) and shows where they are fast (A100, H100). Unpacking writes
the weight and reads it again, ``4.5 N K`` bytes, a share of the product's time that falls as M
grows. Below the crossover the fused way is taken, which needs no workspace either.

Measured rows follow ``python -m bench.nf4_configurations`` on an H100, where the crossover came
sooner than modelled: products of bfloat16 run there on tensor-core instructions that read both
operands from shared memory, and what is decoded must be put there first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ladder_kernels.launch import architecture
from ladder_kernels.nf4 import NF4Weight

__all__ = [
    "PIECE_TILE",
    "TABLE",
    "WORKSPACE_BYTES",
    "Configuration",
    "Product",
    "choose",
    "look_up",
    "piece",
    "using",
]

Way = Literal["fused", "rows", "unpacked"]
Product = Literal["forward", "transposed", "gated", "int8", "gated_int8"]
"""``x @ W^T``, ``grad @ W``, the two products of a SwiGLU at once, and two of these in int8."""

_WAYS: Mapping[Product, tuple[Way, ...]] = {
    "forward": ("fused", "rows", "unpacked"),
    "transposed": ("fused", "unpacked"),
    "gated": ("fused", "unpacked"),
    "int8": ("fused",),
    "gated_int8": ("fused",),
}

WORKSPACE_BYTES = 64 << 20
"""What a dequantised piece of a weight may take, unless its least piece alone takes more."""

PIECE_TILE = 256
"""Pieces of unpacked weights have whole tiles of so many rows, so that they also begin where whole
vectors can be read: cuBLAS is several times slower where they do not."""


@dataclass(frozen=True)
class Configuration:
    """How one product runs.

    Attributes:
        way: As ``gpu.py`` says.
        block_m: Rows of x a program takes; fused only.
        block_n: Rows of the weight; with the transposed product, at a time.
        block_k: Columns of the weight, at a time; with the transposed product, all of a program's.
            A power of two, 32 or more.
        parts: How many such pieces of columns share their scales, if they lie in one block; not for
            the transposed product and those in int8.
        splits: How many programs at most share one sum; not for the gated products.
        num_warps: Of a program.
        num_stages: Tiles that are being loaded at once.
        workspace_bytes: Unpacked only.
    """

    way: Way
    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    parts: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3
    workspace_bytes: int = WORKSPACE_BYTES

    def options(self) -> dict[str, int]:
        """Return Triton's own launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Row(NamedTuple):
    """One row of the table; ``None`` stands for any."""

    architectures: tuple[str, ...]
    products: tuple[Product, ...]
    half: bool | None
    most_rows: int | None
    most_numbers: int | None
    configuration: Configuration
    evidence: Literal["modelled", "measured"]


def _fused(
    m: int, n: int, k: int, warps: int, stages: int, parts: int = 1, splits: int = 1
) -> Configuration:
    return Configuration("fused", m, n, k, parts, splits, warps, stages)


def _rows(n: int) -> Configuration:
    return Configuration("rows", block_n=n, block_k=512, num_warps=4, num_stages=2)


_OLD = ("sm_75",)
_AMPERE = ("sm_80",)
_GEFORCE = ("sm_86", "sm_89", "sm_120")
_HOPPER = ("sm_90",)
_BLACKWELL = ("sm_100",)
_DATACENTER = (*_HOPPER, *_BLACKWELL)
_CDNA = ("gfx90a", "gfx942")
_RDNA = ("gfx1100", "gfx1201")
_AMD = (*_CDNA, *_RDNA)
_MMA = (*_AMPERE, *_GEFORCE)
_FUSING = (*_MMA, *_DATACENTER, *_AMD)
# On sm_100 tiles of 64 rows spill; sm_90 has its own rows.
_SOME = (*_MMA, *_AMD)
_NOT_RDNA = (*_MMA, *_DATACENTER, *_CDNA)
_EVERY = (*_OLD, *_FUSING)

_FORWARD: tuple[Product, ...] = ("forward",)
_BACK: tuple[Product, ...] = ("transposed",)
_GATED: tuple[Product, ...] = ("gated",)
_ALL: tuple[Product, ...] = ("forward", "transposed", "gated")
_INT8: tuple[Product, ...] = ("int8",)
_GATED_INT8: tuple[Product, ...] = ("gated_int8",)

# A weight of fewer numbers has too few tiles for all multiprocessors; sums are split more.
_SMALL = 1 << 23
# On an H100, a weight of fewer numbers takes more splits in the transposed product, too.
_MIDDLE = 15 << 20
_UNPACKED = Configuration("unpacked")
# A fast GPU waits for the host where pieces are many, and has the memory: most weights are one.
_UNPACKED_WHOLE = Configuration("unpacked", workspace_bytes=160 << 20)

TABLE: tuple[Row, ...] = (
    # One or two rows: the weight's bytes are read once, and that is what takes the time.
    Row(_EVERY, _FORWARD, None, 2, None, _rows(4), "modelled"),
    # Without Triton's tensor cores.
    Row(_OLD, _FORWARD, None, 8, None, _rows(4), "modelled"),
    Row(_OLD, _ALL, None, None, None, _UNPACKED, "modelled"),
    # Float32 has no tensor cores without TF32.
    Row(_EVERY, _ALL, False, 16, None, _fused(16, 32, 32, 4, 2, splits=4), "modelled"),
    Row(_EVERY, _ALL, False, None, None, _UNPACKED, "modelled"),
    # An H100: more rows than these are unpacked, but for the gated product.
    Row(_HOPPER, _FORWARD, True, 16, None, _fused(16, 64, 64, 4, 3, splits=8), "measured"),
    Row(_HOPPER, _FORWARD, True, 64, None, _fused(64, 128, 64, 8, 3, splits=4), "measured"),
    Row(_HOPPER, _FORWARD, True, 128, None, _fused(128, 64, 64, 8, 3, splits=4), "measured"),
    Row(_HOPPER, _BACK, True, 16, None, _fused(16, 64, 64, 4, 3, splits=2), "measured"),
    Row(_HOPPER, _BACK, True, 64, _MIDDLE, _fused(32, 64, 64, 4, 4, splits=4), "measured"),
    Row(_HOPPER, _BACK, True, 64, None, _fused(64, 64, 64, 4, 4), "measured"),
    Row(_HOPPER, _BACK, True, 128, _MIDDLE, _fused(64, 64, 64, 4, 4, splits=4), "measured"),
    Row(_HOPPER, _BACK, True, 128, None, _fused(128, 64, 64, 8, 3, splits=2), "measured"),
    Row(_HOPPER, _GATED, True, 16, None, _fused(16, 32, 64, 4, 3), "measured"),
    Row(_HOPPER, _GATED, True, 64, None, _fused(64, 64, 64, 4, 3), "measured"),
    Row(_HOPPER, _GATED, True, 512, None, _fused(128, 64, 64, 8, 3), "measured"),
    Row(_HOPPER, _ALL, True, None, None, _UNPACKED_WHOLE, "measured"),
    # A few rows.
    Row(_FUSING, _FORWARD, True, 16, _SMALL, _fused(16, 64, 64, 4, 3, splits=8), "modelled"),
    Row(_FUSING, _FORWARD, True, 16, None, _fused(16, 64, 64, 4, 3, splits=2), "modelled"),
    Row(_FUSING, _BACK, True, 16, _SMALL, _fused(16, 64, 64, 4, 3, splits=8), "modelled"),
    Row(_FUSING, _BACK, True, 16, None, _fused(16, 64, 64, 4, 3, splits=2), "modelled"),
    Row(_FUSING, _GATED, True, 16, None, _fused(16, 32, 64, 4, 3), "modelled"),
    Row(_SOME, _FORWARD, True, 64, None, _fused(64, 64, 32, 4, 3, splits=2), "modelled"),
    Row(_SOME, _BACK, True, 64, None, _fused(64, 32, 64, 4, 3, splits=2), "modelled"),
    Row(_FUSING, _GATED, True, 64, None, _fused(64, 32, 32, 4, 3, 2), "modelled"),
    # Many rows.
    # With three stages ptxas keeps registers for one more program there, and spills.
    Row(_AMPERE, _FORWARD, True, 128, None, _fused(128, 64, 32, 4, 4, 2), "modelled"),
    Row(_MMA, _FORWARD, True, 128, None, _fused(128, 64, 32, 4, 3, 2), "modelled"),
    Row(_MMA, _BACK, True, 128, None, _fused(128, 32, 128, 8, 3), "modelled"),
    Row(_MMA, _GATED, True, 128, None, _fused(128, 32, 32, 4, 3, 2), "modelled"),
    Row(_AMPERE, _FORWARD, True, 1024, None, _fused(256, 128, 32, 8, 3), "modelled"),
    Row(_GEFORCE, _FORWARD, True, 2048, None, _fused(256, 64, 32, 8, 3, 2), "modelled"),
    Row(_AMPERE, _BACK, True, 1024, None, _fused(256, 32, 128, 8, 3), "modelled"),
    Row(_GEFORCE, _BACK, True, 2048, None, _fused(256, 32, 128, 8, 3), "modelled"),
    Row(_AMPERE, _GATED, True, 1024, None, _fused(256, 32, 32, 8, 3, 2), "modelled"),
    Row(_GEFORCE, _GATED, True, 2048, None, _fused(256, 32, 32, 8, 3, 2), "modelled"),
    Row(_BLACKWELL, _FORWARD, True, 512, None, _fused(128, 128, 64, 8, 3), "modelled"),
    Row(_BLACKWELL, _BACK, True, 512, None, _fused(128, 64, 128, 8, 3), "modelled"),
    Row(_BLACKWELL, _GATED, True, 512, None, _fused(128, 64, 64, 8, 3), "modelled"),
    Row(_RDNA, _FORWARD, True, 256, None, _fused(64, 64, 32, 4, 2, 2), "modelled"),
    Row(_RDNA, _GATED, True, 256, None, _fused(64, 32, 32, 4, 2, 2), "modelled"),
    Row(_AMD, _FORWARD, True, 256, None, _fused(128, 64, 32, 4, 2, 2), "modelled"),
    Row(_AMD, _BACK, True, 256, None, _fused(128, 32, 64, 4, 2), "modelled"),
    Row(_AMD, _GATED, True, 256, None, _fused(128, 32, 32, 4, 2, 2), "modelled"),
    Row(_BLACKWELL, _ALL, None, None, None, _UNPACKED_WHOLE, "modelled"),
    Row(_EVERY, _ALL, None, None, None, _UNPACKED, "modelled"),
    # In int8, whatever the dtype of x: never unpacked, and never on GPUs without Triton's tensor
    # cores. On RDNA tall tiles need more warps, or they spill.
    Row(_FUSING, _INT8, None, 16, _SMALL, _fused(16, 64, 64, 4, 3, splits=8), "modelled"),
    Row(_FUSING, _INT8, None, 16, None, _fused(16, 128, 64, 4, 3, splits=4), "modelled"),
    Row(_HOPPER, _INT8, None, 64, None, _fused(64, 128, 64, 8, 3, splits=4), "measured"),
    Row(_HOPPER, _INT8, None, 128, None, _fused(128, 64, 64, 4, 3, splits=4), "measured"),
    Row(_HOPPER, _INT8, None, 256, None, _fused(128, 64, 64, 4, 3, splits=2), "measured"),
    Row(_HOPPER, _INT8, None, None, None, _fused(128, 64, 64, 4, 3), "measured"),
    Row(_FUSING, _INT8, None, 64, None, _fused(64, 128, 64, 8, 3, splits=2), "modelled"),
    Row(_NOT_RDNA, _INT8, None, 128, None, _fused(128, 64, 64, 4, 3, splits=2), "modelled"),
    Row(_NOT_RDNA, _INT8, None, None, None, _fused(128, 64, 64, 4, 3), "modelled"),
    Row(_RDNA, _INT8, None, None, None, _fused(128, 64, 64, 8, 2), "modelled"),
    Row(_FUSING, _GATED_INT8, None, 16, None, _fused(16, 64, 64, 4, 3), "modelled"),
    Row(_FUSING, _GATED_INT8, None, 64, None, _fused(64, 64, 64, 8, 3), "modelled"),
    Row(_NOT_RDNA, _GATED_INT8, None, None, None, _fused(128, 32, 64, 4, 3), "modelled"),
    Row(_RDNA, _GATED_INT8, None, None, None, _fused(128, 32, 64, 8, 2), "modelled"),
)
"""All rows, in the order in which they are tried; the last of a product's fits everything."""

# Finding the byte and the scale of each element takes registers and shared memory that the tiles
# above do not leave.
_ANYWHERE_MOST_ROWS = 16
_ANYWHERE = _fused(16, 32, 32, 4, 1)

_forced: ContextVar[Configuration | None] = ContextVar("ladder_kernels_nf4", default=None)


@contextmanager
def using(configuration: Configuration) -> Iterator[None]:
    """Within it, products run so, whatever the table says: for tests, audits, benchmarks.

    But for those that the way does not know: *rows* is for "forward" only, and the products in int8
    are *fused* only.
    """
    token = _forced.set(configuration)
    try:
        yield
    finally:
        _forced.reset(token)


def piece(length: int, most: int) -> int:
    """Return how long pieces of a weight are to be: as even as whole tiles of them allow.

    Args:
        length: Of the whole.
        most: Of a piece, at least 1; fewer than a tile's are taken as they are.
    """
    if most >= length or most < PIECE_TILE:
        return min(length, most)
    pieces = -(-length // (most // PIECE_TILE * PIECE_TILE))
    even = -(-length // pieces)
    return -(-even // PIECE_TILE) * PIECE_TILE


def choose(product: Product, x: Tensor, weight: NF4Weight) -> Configuration:
    """Return how a product of ``x`` ``[M, ...]`` with ``weight`` runs.

    A weight whose rows do not begin with a block is not looked up: few rows of x take a small fused
    tile, many the unpacked way.
    """
    forced = _forced.get()
    if forced is not None and forced.way in _WAYS[product]:
        return forced
    if weight.shape[1] % weight.blocksize:
        return _ANYWHERE if x.shape[0] <= _ANYWHERE_MOST_ROWS else _UNPACKED
    name = architecture(x.device)
    return look_up(name, product, x.dtype, x.shape[0], weight.numel).configuration


@functools.cache
def look_up(name: str, product: Product, dtype: torch.dtype, rows: int, numbers: int) -> Row:
    """Return the first row of the table that fits.

    Args:
        name: Of an architecture; one that the table does not know takes the nearest older one's
            rows.
        product: Which.
        dtype: Of x.
        rows: Of x.
        numbers: Of the weight.
    """
    known = _nearest(name)
    half = dtype != torch.float32
    for row in TABLE:
        if (
            known in row.architectures
            and product in row.products
            and row.half in (None, half)
            and (row.most_rows is None or rows <= row.most_rows)
            and (row.most_numbers is None or numbers <= row.most_numbers)
        ):
            return row
    raise AssertionError(f"the table has no row for {product} on {known}")


def _nearest(name: str) -> str:
    if name in _EVERY:
        return name
    if not name.startswith("sm_"):
        return "gfx1100" if name.startswith("gfx1") else "gfx942"
    number = int(name.removeprefix("sm_"))
    older = [each for each in _EVERY if each.startswith("sm_") and int(each[3:]) <= number]
    return max(older, key=lambda each: int(each[3:]), default="sm_75")
