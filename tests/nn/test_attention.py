"""The layout of a batch, and attention over it, against masks written out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from ladder_kernels.errors import ConfigError
from ladder_kernels.nn.attention import SequenceLayout, attend


def seen(layout: SequenceLayout, window: int | None = None) -> torch.Tensor:
    """The mask as bool [B, S, T], also where the layout leaves it to plain causal attention."""
    mask = layout.mask(window)
    if mask is None:
        rows = torch.arange(layout.past_length, layout.total)[:, None]
        mask = (torch.arange(layout.total) <= rows)[None, None]
    return mask.expand(layout.batch, 1, -1, -1)[:, 0]


def expected(
    length: int,
    past: int,
    padding: list[int] | None = None,
    documents: list[int] | None = None,
    window: int | None = None,
) -> torch.Tensor:
    total = past + length
    out = torch.zeros(length, total, dtype=torch.bool)
    for row in range(length):
        at = row + past
        for column in range(at + 1):
            ok = window is None or at - column < window
            if padding is not None and not (padding[column] and padding[at]):
                ok = False
            if documents is not None and documents[at] != documents[column]:
                ok = False
            out[row, column] = ok or column == at
    return out


def test_plain_causal_needs_no_mask():
    assert SequenceLayout.build(2, 5).mask() is None
    assert SequenceLayout.build(2, 1, past_length=7).mask() is None
    assert SequenceLayout.build(2, 5).mask(window=5) is None
    assert SequenceLayout.build(1, 5, attention_mask=torch.ones(1, 5)).mask() is None
    assert SequenceLayout.build(1, 5, position_ids=torch.arange(5)).mask() is None


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert SequenceLayout.build(2, 4, attention_mask=mask).position_ids.tolist() == [
        [0, 0, 0, 1],
        [0, 1, 2, 2],
    ]
    later = SequenceLayout.build(
        2, 2, past_length=2, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    )
    assert later.position_ids.tolist() == [[1, 2], [2, 3]]
    assert SequenceLayout.build(2, 2, past_length=3).position_ids.tolist() == [[3, 4], [3, 4]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mask_against_loops(data: st.DataObject):
    length = data.draw(st.integers(1, 7))
    past = data.draw(st.integers(0, 5))
    window = data.draw(st.none() | st.integers(1, 12))
    left = data.draw(st.integers(0, past + length - 1))
    padding = data.draw(st.sampled_from([None, [0] * left + [1] * (past + length - left)]))
    layout = SequenceLayout.build(
        1,
        length,
        past_length=past,
        attention_mask=None if padding is None else torch.tensor([padding]),
    )
    wanted = expected(length, past, padding, window=window)
    assert torch.equal(seen(layout, window)[0], wanted)
    assert wanted.any(-1).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.none() | st.integers(1, 5))
def test_packed_documents(lengths: list[int], window: int | None):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = [number for number, n in enumerate(lengths) for _ in range(n)]
    layout = SequenceLayout.build(1, sum(lengths), position_ids=positions)
    assert torch.equal(
        seen(layout, window)[0], expected(sum(lengths), 0, documents=numbers, window=window)
    )
    theirs = find_packed_sequence_indices(positions)
    assert (theirs is None) == (layout.documents is None)
    if theirs is not None and layout.documents is not None:
        assert torch.equal(theirs, layout.documents)


def test_packed_documents_with_padding_at_either_end():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    layout = SequenceLayout.build(2, 7, attention_mask=mask, position_ids=positions)
    for row, numbers in enumerate([[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1]]):
        wanted = expected(7, 0, mask[row].tolist(), numbers)
        real = mask[row].bool()
        assert torch.equal(seen(layout)[row][real], wanted[real])
        assert seen(layout)[row].any(-1).all()


def test_padding_alone_starts_no_document():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    layout = SequenceLayout.build(2, 5, attention_mask=mask, position_ids=positions)
    assert layout.documents is None


def test_masks_are_built_once():
    layout = SequenceLayout.build(1, 9)
    assert layout.mask(3) is layout.mask(3)
    assert layout.mask(3) is not layout.mask(4)


def test_moves_with_the_model():
    mask, positions = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 0]])
    layout = SequenceLayout.build(1, 4, attention_mask=mask, position_ids=positions)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert moved.padding is not None
    assert moved.documents is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \[2, 4\]"),
        ({"attention_mask": torch.ones(2, 5), "past_length": 1}, "need"),
        ({"position_ids": torch.arange(4)}, "position_ids has shape"),
        ({"position_ids": torch.zeros(3, 5)}, "3 rows for a batch of 2"),
        ({"position_ids": torch.zeros(1, 1, 5)}, "position_ids has shape"),
    ],
)
def test_shapes_that_do_not_fit(arguments: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        SequenceLayout.build(2, 5, **arguments)


def test_first_seen():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    layout = SequenceLayout.build(2, 7, attention_mask=mask, position_ids=positions)
    ranged, first = layout.first_seen()
    assert ranged
    assert first is not None
    assert first.tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 2, 2, 4, 4, 4]]
    assert layout.first_seen()[1] is first
    later = SequenceLayout.build(
        2, 2, past_length=3, attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    )
    ranged, first = later.first_seen()
    assert ranged
    assert first is not None
    assert first.tolist() == [[2, 2], [0, 0]]


def test_ranges_cannot_say_everything():
    assert SequenceLayout.build(2, 5).first_seen() == (True, None)
    assert SequenceLayout.build(2, 5).first_seen(window=5) == (True, None)
    hole = torch.tensor([[1, 1, 0, 1]])
    assert SequenceLayout.build(1, 4, attention_mask=hole).first_seen() == (False, None)
    later = SequenceLayout.build(1, 1, past_length=3, attention_mask=hole)
    assert later.first_seen() == (False, None)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_first_seen_says_what_the_mask_says(data: st.DataObject):
    """Documents, padding at both ends, windows, a past: where ranges say it all, they say that."""
    past = data.draw(st.sampled_from([0, 0, 3]))
    length = data.draw(st.integers(1, 8))
    window = data.draw(st.none() | st.integers(1, 9))
    kept = data.draw(st.lists(st.integers(0, 3), min_size=past + length, max_size=past + length))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=length, max_size=length))
    positions = torch.cat([torch.arange(n) for n in lengths])[None, :length]
    layout = SequenceLayout.build(
        1,
        length,
        past_length=past,
        attention_mask=torch.tensor([[int(k > 0) for k in kept]]),
        position_ids=None if past else positions,
    )
    ranged, first = layout.first_seen(window)
    places = torch.arange(layout.total)
    rows = places[past:, None]
    if first is None:
        first = torch.zeros(1, length, dtype=torch.int64)
    by_ranges = (places <= rows) & (places >= first[0][:, None])
    assert not ranged or torch.equal(by_ranges, seen(layout, window)[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attend_with_gradients(data: st.DataObject):
    """Documents one by one against plain softmax under the mask."""
    window = data.draw(st.sampled_from([None, 1, 3]))
    rows = data.draw(st.integers(1, 3))
    length = 9
    positions, padding = [], []
    for _ in range(rows):
        left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        cuts = sorted(data.draw(st.sets(st.integers(left + 1, length - right - 1), max_size=3)))
        edges = [left, *cuts, length - right]
        real = [p for a, b in itertools.pairwise(edges) for p in range(b - a)]
        positions.append([0] * left + real + [0] * right)
        padding.append([0] * left + [1] * len(real) + [0] * right)
    layout = SequenceLayout.build(
        rows,
        length,
        attention_mask=torch.tensor(padding),
        position_ids=torch.tensor(positions),
    )
    q = torch.randn(rows, 4, length, 6, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(rows, 2, length, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    keys, values = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = q @ keys.transpose(-1, -2) / 6**0.5
    scores = scores.masked_fill(~seen(layout, window)[:, None], float("-inf"))
    wanted = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    out = attend(q, k, v, layout, window=window)
    torch.testing.assert_close(out, wanted)
    with torch.no_grad():
        frozen = attend(q.float(), k.float(), v.float(), layout, window=window)
    torch.testing.assert_close(frozen, wanted.float())
    along = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), along, retain_graph=True)
    theirs = torch.autograd.grad(wanted, (q, k, v), along)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("past", [0, 4])
def test_attend_against_plain_softmax(window: int | None, kv_heads: int, past: int):
    length, total = 5, 5 + past
    mask = torch.ones(2, total)
    mask[0, :2] = 0
    layout = SequenceLayout.build(2, length, past_length=past, attention_mask=mask)
    q = torch.randn(2, 4, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, total, 8, dtype=torch.float64)
    out = attend(q, k, v, layout, window=window, scale=0.3)
    keys, values = (t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v))
    scores = 0.3 * q @ keys.transpose(-1, -2)
    scores = scores.masked_fill(~seen(layout, window)[:, None], float("-inf"))
    wanted = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, wanted)


def test_attend_with_fewer_keys_than_the_layout():
    """A sliding cache drops keys that no row sees any more."""
    layout = SequenceLayout.build(1, 2, past_length=6)
    q = torch.randn(1, 2, 2, 8)
    k, v = torch.randn(2, 1, 2, 8, 8)
    whole = attend(q, k, v, layout, window=4)
    torch.testing.assert_close(attend(q, k[:, :, 3:], v[:, :, 3:], layout, window=4), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_as_accurate_as_pytorchs(dtype):
    generator = torch.Generator().manual_seed(3)
    layout = SequenceLayout.build(
        1, 24, position_ids=torch.tensor([[*range(10), *range(14)]]), past_length=0
    )
    q, k, v, grad = (
        torch.randn(1, heads, 24, 8, generator=generator).to(dtype) for heads in (4, 2, 2, 4)
    )

    def gradients(to, attention):
        leaves = [t.to(to).requires_grad_() for t in (q, k, v)]
        out = attention(*leaves)
        flat = grad.to(to).transpose(1, 2).flatten(2)
        return [out.detach(), *torch.autograd.grad(out, leaves, flat)]

    def plain(q, k, v):
        mask = layout.mask()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    found = gradients(dtype, lambda q, k, v: attend(q, k, v, layout))
    same, exact = gradients(dtype, plain), gradients(torch.float64, plain)
    for ours, theirs, true in zip(found, same, exact, strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (theirs.double() - true).abs().max() + 1e-5 * true.abs().max()
        assert (ours.double() - true).abs().max() <= allowed


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_attend_for_some_of_the_queries(data: st.DataObject):
    """As for all of them at once, by bits, over the keys up to the last one."""
    length, past = data.draw(st.integers(2, 300)), data.draw(st.sampled_from([0, 3, 130]))
    start = data.draw(st.integers(0, length - 1))
    rows = slice(start, data.draw(st.integers(start + 1, length)))
    window = data.draw(st.sampled_from([None, 5, 140]))
    padding = torch.ones(2, past + length)
    kind = data.draw(st.sampled_from(["plain", "left", "interrupted", "packed"]))
    if kind in ("left", "interrupted"):
        padding[1, (0 if kind == "left" else 1) : 1 + past + length // 3] = 0
    positions = None
    if kind == "packed" and past == 0:
        positions = torch.arange(length) % (length // 2 + 1)
    layout = SequenceLayout.build(
        2, length, past_length=past, attention_mask=padding, position_ids=positions
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    q = torch.randn(2, 4, length, 8).to(dtype)
    k, v = torch.randn(2, 2, 2, past + length, 8).to(dtype)
    whole = attend(q, k, v, layout, window=window)[:, rows]
    seen_keys = slice(0, past + rows.stop)
    some = attend(
        q[:, :, rows], k[:, :, seen_keys], v[:, :, seen_keys], layout, window=window, rows=rows
    )
    if layout.first_seen(window)[0]:
        assert torch.equal(some, whole)
    else:  # PyTorch's kernel, under a mask; it rounds weights of blocks that depend on the rows
        bound = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(some, whole, rtol=bound, atol=bound)
