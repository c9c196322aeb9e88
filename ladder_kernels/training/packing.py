"""Rows of equal length from documents of any, and batches of rows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ladder_kernels.errors import ConfigError, DataError
from ladder_kernels.training.formats import IGNORE

if TYPE_CHECKING:
    import datasets
    import torch

__all__ = ["LadderCollator", "pack_rows"]

_DOCUMENTS_AT_ONCE = 10_000


def pack_rows(encoded: datasets.Dataset, context: int, *, pad_token_id: int) -> datasets.Dataset:
    """Fill rows of exactly ``context`` tokens with whole documents.

    Documents are put where they fit best, the longest first; those longer than a row are cut into
    pieces of ``context`` tokens and what is left over. No document sees another: positions start
    anew at each, which is how the model knows. The same documents give the same rows.

    Args:
        encoded: ``input_ids`` and ``labels``, as :func:`~.formats.encode_rows` makes them.
        context: Tokens a row.
        pad_token_id: Fills what no document fits into.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` and ``attention_mask``, each of ``context``
        whole numbers a row, memory-mapped if ``encoded`` is. Padding has mask 0, label
        :data:`~.formats.IGNORE` and positions of its own from 0. Labels at the start of a piece are
        ignored: nothing predicts them. Pieces with nothing to learn are left out.

    Raises:
        ConfigError: If ``context`` is below 2.
        DataError: If a column is missing or no piece has anything to learn.
    """
    import datasets

    if context < 2:
        raise ConfigError(f"context: found {context}; it must be 2 or more")
    _check_columns(encoded)
    integers, bits = (datasets.Sequence(datasets.Value(kind)) for kind in ("int32", "int8"))
    packed = encoded.map(
        _pack_batch,
        batched=True,
        batch_size=_DOCUMENTS_AT_ONCE,
        remove_columns=encoded.column_names,
        features=datasets.Features(
            {
                "input_ids": integers,
                "labels": integers,
                "position_ids": integers,
                "attention_mask": bits,
            }
        ),
        fn_kwargs={"context": context, "pad_token_id": pad_token_id},
        desc="Packing",
    )
    if len(packed) == 0:
        raise DataError(f"data: found nothing to learn in {len(encoded)} documents")
    return packed


def _check_columns(encoded: datasets.Dataset) -> None:
    missing = [name for name in ("input_ids", "labels") if name not in encoded.column_names]
    if missing:
        raise DataError(
            f"data: found no column {', '.join(map(repr, missing))}; there are "
            f"{', '.join(map(repr, encoded.column_names))}"
        )


def _pack_batch(
    batch: dict[str, list[list[int]]], *, context: int, pad_token_id: int
) -> dict[str, list[list[int]]]:
    pieces = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        for start in range(0, len(ids), context):
            part = slice(start, start + context)
            learned = [IGNORE, *labels[part][1:]]
            if any(label != IGNORE for label in learned):
                pieces.append((ids[part], learned))

    out: dict[str, list[list[int]]] = {
        "input_ids": [], "labels": [], "position_ids": [], "attention_mask": [],
    }  # fmt: skip
    for row in best_fit([len(ids) for ids, _ in pieces], context):
        chosen = [pieces[index] for index in row]
        padding = context - sum(len(ids) for ids, _ in chosen)
        chosen.append(([pad_token_id] * padding, [IGNORE] * padding))
        out["input_ids"].append([token for ids, _ in chosen for token in ids])
        out["labels"].append([label for _, labels in chosen for label in labels])
        out["position_ids"].append([place for ids, _ in chosen for place in range(len(ids))])
        out["attention_mask"].append([1] * (context - padding) + [0] * padding)
    return out


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item goes where it leaves the least room, the largest items first.

    Args:
        lengths: Size of each item, none above ``capacity``.
        capacity: Of a bin.

    Returns:
        The items of each bin by index, ascending; bins in the order of their first items, so that
        the order of the items is kept as far as it can be.
    """
    room: list[tuple[int, int]] = []  # (room left, bin) of the bins with room, ascending
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, chosen = room.pop(place)
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if left > length:
            bisect.insort(room, (left - length, chosen))
    return sorted(sorted(items) for items in bins)


class LadderCollator:
    """Stacks rows to tensors, padding shorter ones on the right.

    Args:
        pad_token_id: Id of padding; only needed where rows differ in length.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            rows: ``input_ids``, ``labels`` and, if packed, ``position_ids`` and ``attention_mask``.

        Returns:
            The same columns, int64 ``[B, S]``, and always ``attention_mask``. Packed rows keep
            their positions; the positions of others follow from the mask.
        """
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE, "attention_mask": 0}
        names = [name for name in (*fill, "position_ids") if name in rows[0]]
        if "attention_mask" not in names:
            names.append("attention_mask")
        for name in names:
            values = [row.get(name, [1] * len(row["input_ids"])) for row in rows]
            if name == "position_ids":
                padded = [[*v, *range(longest - len(v))] for v in values]
            else:
                padded = [[*v, *[fill[name]] * (longest - len(v))] for v in values]
            batch[name] = torch.tensor(padded, dtype=torch.int64)
        return batch
