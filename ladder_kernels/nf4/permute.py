"""Decoding NF4 by permutations of bytes, in PTX: a word of eight elements at a time.

A block has 16 values, ``round(centroid * scale)`` in 16 bits each. Their low bytes fill four
registers and their high bytes four more, so that ``prmt``, which picks four of eight bytes by four
nibbles, looks four elements up at once:

    below  = prmt(bytes of values 0 to 7, nibbles without their highest bit)
    above  = prmt(bytes of values 8 to 15, the same)
    byte   = prmt(below, above, lane + 4 * highest bit of the nibble)
    number = prmt(low bytes, high bytes)

With the values computed once for each block that is less than four instructions an element, none of
which goes through shared memory; ``tl.gather`` takes a shuffle for each element. What comes out is
the same to the bit.

Layout: a little-endian word holds elements 1, 0, 3, 2, 5, 4, 7, 6 from its lowest nibble on. For
GPUs of NVIDIA from sm_80 on (``cvt.rn`` of pairs), and results of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ladder_kernels.launch import architecture, host
from ladder_kernels.nf4.codebook import NF4_VALUES

__all__ = ["can_permute", "permuted", "picked", "ptx_block", "selectors", "takes_ptx"]

_FIRST = 80
_WORDS = range(4)


def takes_ptx(device: torch.device) -> bool:
    """Whether kernels for a device may contain NVIDIA's assembly, which no interpreter knows."""
    return host() != "interpreter" and architecture(device).startswith("sm_")


def can_permute(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels can decode to numbers of 16 bits this way.

    Args:
        device: Where they run.
        dtype: Of the decoded numbers.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return half and takes_ptx(device) and int(architecture(device).removeprefix("sm_")) >= _FIRST


def ptx_block(lines: Iterable[str]) -> str:
    """Return lines of PTX as a block, whose registers nobody else sees."""
    return "\n".join(("{", *lines, "}"))


def selectors(word: str) -> Iterator[str]:
    """Write what selects the bytes of the eight nibbles of a word, for :func:`picked`.

    A selector's place among its bits says which byte it selects; the lowest three bits of a nibble
    are one of the first eight's or of the last eight's, and the highest says of which.
    """
    yield ".reg .b32 entry<2>, side<2>, below, above;"
    yield f"and.b32 entry0, {word}, 0x77777777;"
    yield f"shr.b32 side0, {word}, 1;"
    yield "and.b32 side0, side0, 0x44444444;"
    yield "or.b32 side0, side0, 0x32103210;"
    yield "shr.b32 entry1, entry0, 16;"
    yield "shr.b32 side1, side0, 16;"


def picked(out: str, table: Sequence[str], half: int) -> Iterator[str]:
    """Write the look-up of four nibbles, the lowest in the lowest byte of the result.

    Args:
        out: Register of the result.
        table: Four of four bytes each: registers or numbers.
        half: Of the word: 0 is the lower one.
    """
    yield f"prmt.b32 below, {table[0]}, {table[1]}, entry{half};"
    yield f"prmt.b32 above, {table[2]}, {table[3]}, entry{half};"
    yield f"prmt.b32 {out}, below, above, side{half};"


def _values(kind: str) -> Iterator[str]:
    """From a scale ``$8``: low bytes ``$0`` to ``$3``, high bytes ``$4`` to ``$7``."""
    yield ".reg .f32 value<16>;"
    yield ".reg .b32 pair<8>;"
    for i, centroid in enumerate(NF4_VALUES):
        if abs(centroid) == 1:
            yield f"{'mov' if centroid > 0 else 'neg'}.f32 value{i}, $8;"
        else:
            bits = int(np.float32(centroid).view(np.uint32))
            yield f"mul.rn.f32 value{i}, $8, 0f{bits:08X};"
    for i in range(8):
        yield f"cvt.rn.{kind}x2.f32 pair{i}, value{2 * i + 1}, value{2 * i};"
    for i in _WORDS:
        yield f"prmt.b32 ${i}, pair{2 * i}, pair{2 * i + 1}, 0x6420;"
        yield f"prmt.b32 ${i + 4}, pair{2 * i}, pair{2 * i + 1}, 0x7531;"


def _numbers() -> Iterator[str]:
    """From a word ``$8`` and the bytes of its values ``$9`` to ``$16``: eight numbers ``$0`` on."""
    yield ".reg .b32 low, high, pair<4>;"
    yield from selectors("$8")
    for half in range(2):
        for byte, first in (("low", 9), ("high", 13)):
            yield from picked(byte, [f"${first + i}" for i in range(4)], half)
        yield f"prmt.b32 pair{2 * half}, low, high, 0x4051;"
        yield f"prmt.b32 pair{2 * half + 1}, low, high, 0x6273;"
    for i in _WORDS:
        yield f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, pair{i};"


_BF16_VALUES: Any = tl.constexpr(ptx_block(_values("bf16")))
_FP16_VALUES: Any = tl.constexpr(ptx_block(_values("f16")))
_NUMBERS: Any = tl.constexpr(ptx_block(_numbers()))
_VALUES_REGISTERS: Any = tl.constexpr(",".join(["=r"] * 8 + ["f"]))
_NUMBERS_REGISTERS: Any = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 9))
_EIGHT_INTEGERS: Any = tl.constexpr((tl.int32,) * 8)
_EIGHT_BF16: Any = tl.constexpr((tl.bfloat16,) * 8)
_EIGHT_FP16: Any = tl.constexpr((tl.float16,) * 8)


@triton.jit
def permuted(
    word,  # [ROWS, WORDS] int32
    scale,  # [ROWS, BLOCKS] float32: each of as many words as the others
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Return [ROWS, 8 * WORDS] in DTYPE, float16 or bfloat16."""
    ROWS: tl.constexpr = word.shape[0]
    WORDS: tl.constexpr = word.shape[1]
    BLOCKS: tl.constexpr = scale.shape[1]
    # Spread before the values are computed: they are then where their words are.
    scale = tl.broadcast_to(scale[:, :, None], (ROWS, BLOCKS, WORDS // BLOCKS))
    v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
        _BF16_VALUES if tl.bfloat16 == DTYPE else _FP16_VALUES,
        _VALUES_REGISTERS,
        [scale.reshape(ROWS, WORDS)],
        _EIGHT_INTEGERS,
        True,
        1,
    )
    # Said to be impure: the compiler looks through pure operations for the width of what is loaded,
    # and lays the other operand out for it.
    e0, e1, e2, e3, e4, e5, e6, e7 = tl.inline_asm_elementwise(
        _NUMBERS,
        _NUMBERS_REGISTERS,
        [word, v0, v1, v2, v3, v4, v5, v6, v7],
        _EIGHT_BF16 if tl.bfloat16 == DTYPE else _EIGHT_FP16,
        False,
        1,
    )
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.join(even, odd).reshape(ROWS, 8 * WORDS)
