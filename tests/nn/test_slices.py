"""Slices of tokens: whole, small enough, and not too small."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ladder_kernels.nn.slices import SMALLEST_SLICE, token_slices


@given(
    st.integers(0, 300),
    st.integers(0, 5000),
    st.one_of(st.none(), st.integers(SMALLEST_SLICE, 4096)),
)
def test_slices_of_tokens(batch: int, length: int, slice_tokens: int | None):
    slices = token_slices(batch, length, slice_tokens)
    assert [i for part in slices for i in range(length)[part]] == list(range(length))
    if slice_tokens is None:
        assert len(slices) == 1
        return
    for part in slices:
        positions = part.stop - part.start
        assert batch * positions <= slice_tokens or positions == 1
        # Products of more than 16 rows keep to one order of sums.
        assert len(slices) == 1 or batch == 0 or batch * positions > max(16, slice_tokens / 8)
