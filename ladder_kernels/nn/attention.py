"""Who may look at whom: the layout of a batch, and attention over it.

A :class:`SequenceLayout` is built once a forward and shared by every layer of the backbone and of
the ladder, so that padding, packed documents, caches and sliding windows mean the same thing in
both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ladder_kernels.errors import ConfigError
from ladder_kernels.ops import ranged_attention
from ladder_kernels.ops.ranged_attention.reference import (
    attend_under_mask,
    differentiable_attention,
)

__all__ = ["SequenceLayout", "attend"]


class SequenceLayout:
    """The positions, padding and documents of one batch of token sequences.

    Build it with :meth:`build`. Rows are the ``length`` new tokens, columns the ``total`` =
    ``past_length + length`` tokens that a cache plus this forward hold.

    Attributes:
        batch: Number of sequences, ``B``.
        length: New tokens a sequence, ``S``.
        past_length: Tokens a sequence that a cache holds already.
        total: ``past_length + length``.
        position_ids: int64 ``[B, S]``, the position of each new token for rotary or learned
            positions.
        padding: bool ``[B, total]``, true at real tokens; ``None`` when every token is real.
        documents: int64 ``[B, S]``, equal numbers mark tokens of one document; ``None`` when every
            sequence is a single document.
    """

    def __init__(
        self,
        *,
        position_ids: torch.Tensor,
        past_length: int,
        padding: torch.Tensor | None,
        documents: torch.Tensor | None,
    ) -> None:
        """Use :meth:`build`, which derives and checks these from what a caller has at hand."""
        self.batch, self.length = position_ids.shape
        self.past_length = past_length
        self.total = past_length + self.length
        self.position_ids = position_ids
        self.padding = padding
        self.documents = documents
        self._masks: dict[int | None, torch.Tensor | None] = {}
        self._ranges: dict[int | None, tuple[bool, torch.Tensor | None]] = {}

    @classmethod
    def build(
        cls,
        batch: int,
        length: int,
        *,
        past_length: int = 0,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> SequenceLayout:
        """Derive the layout of a forward.

        Args:
            batch: Number of sequences, ``B``.
            length: New tokens a sequence, ``S``.
            past_length: Tokens a sequence already in the cache.
            attention_mask: ``[B, past_length + S]``, nonzero at real tokens. ``None``: all are
                real.
            position_ids: ``[B, S]``, ``[1, S]`` or ``[S]``. ``None``: real tokens are counted from
                0. Without a past, a real token whose position is not one more than that of the real
                token before it starts a new document, and documents do not see each other (the
                convention of transformers and of packing collators).
            device: Where the tensors shall be; default that of ``position_ids`` or
                ``attention_mask``.

        Returns:
            The layout.

        Raises:
            ConfigError: If a shape does not fit.
        """
        if device is None:
            given = position_ids if position_ids is not None else attention_mask
            device = given.device if given is not None else torch.device("cpu")
        total = past_length + length
        padding = None
        if attention_mask is not None:
            if tuple(attention_mask.shape) != (batch, total):
                raise ConfigError(
                    f"attention_mask has shape {list(attention_mask.shape)}, but {batch} sequences "
                    f"of {past_length} cached and {length} new tokens need [{batch}, {total}]"
                )
            padding = attention_mask.to(device=device) != 0
            if bool(padding.all()):
                padding = None

        documents = None
        if position_ids is None:
            if padding is None:
                positions = torch.arange(past_length, total, device=device).expand(batch, length)
            else:
                positions = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, past_length:]
        else:
            if position_ids.dim() not in (1, 2) or position_ids.shape[-1] != length:
                raise ConfigError(
                    f"position_ids has shape {list(position_ids.shape)}, allowed are "
                    f"[{batch}, {length}], [1, {length}] and [{length}]"
                )
            positions = position_ids.to(device=device, dtype=torch.long).reshape(-1, length)
            if positions.shape[0] not in (1, batch):
                raise ConfigError(
                    f"position_ids has {positions.shape[0]} rows for a batch of {batch} sequences"
                )
            positions = positions.expand(batch, length)
            if past_length == 0:
                documents = _find_documents(positions, padding)
        return cls(
            position_ids=positions, past_length=past_length, padding=padding, documents=documents
        )

    @property
    def device(self) -> torch.device:
        """The device of the layout's tensors."""
        return self.position_ids.device

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on ``device`` (itself when they are there already)."""
        if torch.device(device) == self.device:
            return self
        return SequenceLayout(
            position_ids=self.position_ids.to(device),
            past_length=self.past_length,
            padding=None if self.padding is None else self.padding.to(device),
            documents=None if self.documents is None else self.documents.to(device),
        )

    def select(self, rows: Sequence[int]) -> SequenceLayout:
        """The layout of these sequences of the batch alone."""
        index = torch.tensor(rows, device=self.device)
        padding = None if self.padding is None else self.padding[index]
        documents = None if self.documents is None else self.documents[index]
        return SequenceLayout(
            position_ids=self.position_ids[index],
            past_length=self.past_length,
            padding=None if padding is None or bool(padding.all()) else padding,
            documents=documents if documents is not None and bool(documents.any()) else None,
        )

    def first_seen(self, window: int | None = None) -> tuple[bool, torch.Tensor | None]:
        """Who may look at whom, as the first token that each sees; the last is itself.

        Args:
            window: As for :meth:`mask`.

        Returns:
            Whether that says it all, and int64 ``[B, S]``, ``None`` for plain causal attention.
            Where padding interrupts what a token sees, only :meth:`mask` can say it.
        """
        if window is not None and window >= self.total:
            window = None
        if window not in self._ranges:
            # Kept for gradients too, which a tensor of inference mode cannot be.
            with torch.inference_mode(False):
                self._ranges[window] = self._find_first_seen(window)
        return self._ranges[window]

    def _find_first_seen(self, window: int | None) -> tuple[bool, torch.Tensor | None]:
        if self.padding is None and self.documents is None and window is None:
            return True, None
        places = torch.arange(self.total, device=self.device).expand(self.batch, self.total)
        real = torch.ones_like(places, dtype=torch.bool) if self.padding is None else self.padding
        numbers = torch.zeros_like(places) if self.documents is None else self.documents
        # A document, or what is left of it after padding, begins; padding sees itself alone.
        begins = torch.ones_like(real)
        begins[:, 1:] = ~real[:, :-1] | (numbers[:, 1:] != numbers[:, :-1])
        if self.padding is not None:
            for starts, row, kept in zip(begins & real, numbers, real, strict=True):
                if int(starts.sum()) > row[kept].unique().numel():
                    return False, None  # padding interrupts a document
        first = torch.where(begins | ~real, places, 0).cummax(-1).values[:, self.past_length :]
        if window is not None:
            first = first.maximum(places[:, self.past_length :] - (window - 1))
        return True, first.contiguous()

    def mask(self, window: int | None = None) -> torch.Tensor | None:
        """Who may look at whom.

        Args:
            window: A token sees itself and the ``window - 1`` tokens before it; ``None``: all
                before.

        Returns:
            bool ``[B or 1, 1, S, total]``, true where the row's token sees the column's. Every row
            has at least one true: a padded token sees itself alone, which keeps NaN out of what
            nobody reads. ``None`` when plain causal attention says the same (all ``S`` tokens new,
            or a single one).
        """
        if window is not None and window >= self.total:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> torch.Tensor | None:
        plain = self.padding is None and self.documents is None and window is None
        if plain and (self.past_length == 0 or self.length == 1):
            return None
        columns = torch.arange(self.total, device=self.device)
        rows = columns[self.past_length :, None]
        seen = columns <= rows
        if window is not None:
            seen = seen & (columns > rows - window)
        seen = seen[None, None]
        if self.documents is not None:
            seen = seen & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        if self.padding is not None:
            real = self.padding[:, None, None, :]
            seen = (seen & real & real[..., self.past_length :].transpose(2, 3)) | (columns == rows)
        return seen


def _find_documents(positions: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor | None:
    """Number the documents of ``positions`` ``[B, S]``; ``None`` when each row holds just one."""
    batch, length = positions.shape
    indices = torch.arange(length, device=positions.device).expand(batch, length)
    if padding is None:
        offsets = positions - indices
    else:
        # Counted over real tokens only: a padded stretch neither starts nor ends a document.
        last_real = torch.where(padding, indices, -1).cummax(-1).values
        first_real = padding.long().argmax(-1, keepdim=True)
        last_real = torch.where(last_real < 0, first_real, last_real)
        offsets = (positions - padding.long().cumsum(-1)).gather(1, last_real)
    starts = torch.zeros_like(offsets)
    starts[:, 1:] = offsets[:, 1:] != offsets[:, :-1]
    return starts.cumsum(-1) if bool(starts.any()) else None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    *,
    window: int | None = None,
    scale: float | None = None,
    rows: slice | None = None,
) -> torch.Tensor:
    """Causal attention with grouped heads over a layout.

    Args:
        q: ``[B, H, S, hd]``.
        k: ``[B, Hkv, T, hd]``, ``H`` a multiple of ``Hkv``. ``T`` is the layout's ``total``, or
            fewer when a sliding cache has dropped columns that no row sees any more.
        v: As ``k``.
        layout: Of the same ``S``.
        window: See :meth:`SequenceLayout.mask`.
        scale: Factor on the scores; default ``hd ** -0.5``.
        rows: The layout's new tokens that ``q`` holds, where it does not hold all; ``k`` and ``v``
            end with the last of them then.

    Returns:
        ``[B, S, H * hd]``, in the dtype of ``q``.
    """
    ranged, first = layout.first_seen(window)
    rows = slice(0, layout.length) if rows is None else rows
    total = layout.past_length + rows.stop
    dropped = total - k.shape[2]
    if not ranged:
        mask = layout.mask(window)
        if mask is not None:
            mask = mask[..., rows, dropped:total]
        return attend_under_mask(q, k, v, mask, scale).transpose(1, 2).flatten(2)
    first = None if first is None else first[:, rows]
    if dropped:
        first = None if first is None else (first - dropped).clamp_(min=0)
    if q.device.type != "cpu" or layout.length == 1:
        return differentiable_attention(q, k, v, first, scale)
    return ranged_attention(q, k, v, first, scale)
