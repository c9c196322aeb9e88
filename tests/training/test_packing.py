"""Packed rows: every document whole, once, alone, and the model sees them so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ladder_kernels.errors import ConfigError, DataError
from ladder_kernels.training.packing import LadderCollator, best_fit, pack_rows


def documents_of(lengths: list[int]) -> datasets.Dataset:
    """Documents whose tokens are all different, so that they can be told apart."""
    start, rows = 1, []
    for length in lengths:
        ids = list(range(start, start + length))
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
        start += length
    return datasets.Dataset.from_list(rows)


def pieces_of(row: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """The documents of a packed row, found by where positions start anew."""
    real = sum(row["attention_mask"])
    starts = [i for i, position in enumerate(row["position_ids"][:real]) if position == 0]
    spans = zip(starts, [*starts[1:], real], strict=True)
    return [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in spans]


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), context=st.sampled_from([8, 16])
)
def test_every_token_is_there_once(lengths: list[int], context: int):
    rows = documents_of(lengths)
    packed = pack_rows(rows, context, pad_token_id=0)
    expected = []
    for row in rows:
        for start in range(0, len(row["input_ids"]), context):
            piece = row["input_ids"][start : start + context]
            if len(piece) > 1:  # a single token has nothing to learn
                expected.append((piece, [-100, *piece[1:]]))
    found = []
    for row in packed:
        assert all(len(row[name]) == context for name in packed.column_names)
        real = sum(row["attention_mask"])
        assert row["attention_mask"] == [1] * real + [0] * (context - real)
        assert row["input_ids"][real:] == [0] * (context - real)
        assert row["labels"][real:] == [-100] * (context - real)
        assert row["position_ids"][real:] == list(range(context - real))
        for ids, labels in pieces_of(row):
            found.append((ids, labels))
    assert sorted(found) == sorted(expected)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_bins_are_well_filled(lengths: list[int]):
    bins = best_fit(lengths, 20)
    assert sorted(index for items in bins for index in items) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in items) for items in bins]
    assert all(size <= 20 for size in sizes)
    # Two bins half empty would have been one.
    assert sum(size <= 10 for size in sizes) <= 1


def test_the_same_documents_give_the_same_rows():
    rows = documents_of([5, 9, 3, 9, 12, 4, 4])
    one, two = (pack_rows(rows, 16, pad_token_id=0).to_list() for _ in range(2))
    assert one == two
    assert len(one) == 3


def test_packed_rows_stay_in_arrow(tmp_path: Any):
    documents_of([5, 9, 3]).save_to_disk(tmp_path)
    packed = pack_rows(datasets.load_from_disk(tmp_path), 16, pad_token_id=0)
    assert packed.cache_files
    kinds = [packed.features[name].feature.dtype for name in packed.column_names]
    assert kinds == ["int32", "int32", "int32", "int8"]


def test_no_document_sees_another(make_model: Callable[..., Any]):
    """Logits and losses of a packed row are those of its documents alone."""
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 4, 12]
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in (torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths)
    ]
    packed = pack_rows(datasets.Dataset.from_list(rows), 32, pad_token_id=0)
    assert len(packed) == 1
    model = make_model()
    model.tap_dtype = torch.float32  # bfloat16 turns differences of rounding into larger ones
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        batch = LadderCollator()(packed.to_list())
        out = model(**batch, num_items_in_batch=1, return_logits=True)
        alone = [LadderCollator()([row]) for row in rows]
        outs = [model(**one, num_items_in_batch=1, return_logits=True) for one in alone]
    logits = torch.cat([one.logits for one in outs], dim=1)
    found = {
        tuple(ids): out.logits[0, start : start + len(ids)] for ids, start in _places(packed[0])
    }
    together = torch.cat([found[tuple(row["input_ids"])] for row in rows])
    assert (together - logits[0]).abs().max() <= 1e-5 * logits.abs().max()
    assert out.loss.item() == pytest.approx(sum(one.loss.item() for one in outs), rel=1e-5)


def _places(row: dict[str, list[int]]) -> list[tuple[list[int], int]]:
    starts, place = [], 0
    for ids, _ in pieces_of(row):
        starts.append((ids, place))
        place += len(ids)
    return starts


def test_the_collator_pads_on_the_right():
    batch = LadderCollator(7)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_bad_arguments():
    with pytest.raises(ConfigError, match="context: found 1"):
        pack_rows(documents_of([4]), 1, pad_token_id=0)
    with pytest.raises(DataError, match="no column 'labels'; there are 'input_ids'"):
        pack_rows(documents_of([4]).remove_columns("labels"), 8, pad_token_id=0)
    with pytest.raises(DataError, match="nothing to learn in 1 documents"):
        pack_rows(documents_of([1]), 8, pad_token_id=0)
