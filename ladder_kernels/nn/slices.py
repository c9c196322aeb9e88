"""How a batch is cut into slices of tokens. Nothing heavy is imported here."""

from __future__ import annotations

import itertools

__all__ = ["SMALLEST_SLICE", "token_slices"]

SMALLEST_SLICE = 128
"""Fewest tokens that a slice may be asked to have."""


def token_slices(batch: int, length: int, slice_tokens: int | None) -> list[slice]:
    """Cut the positions of a batch so that a slice of all its sequences has few tokens.

    Slices are about equally long. The native products of up to 16 rows are summed in another order
    than those of more: the slices of a batch that is cut have more than an eighth of
    ``slice_tokens`` each, so that with :data:`SMALLEST_SLICE` or more a cut changes no bit.

    Args:
        batch: Number of sequences, ``B``.
        length: Tokens a sequence, ``S``.
        slice_tokens: Tokens of a slice, at most, as far as one position of each sequence allows;
            ``None``: all in one.

    Returns:
        Neighbouring slices of ``range(length)``, one at least.
    """
    positions = length if slice_tokens is None else max(1, slice_tokens // max(1, batch))
    count = max(1, -(-length // max(1, positions)))
    ends = [length * index // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]
