"""Where taps wait between the frozen pass and the side pass.

A :class:`TapStore` opens one :class:`TapRecord` a micro-batch. The frozen pass writes each state
into it as soon as its layer ends; the side pass reads it as a mapping that gives one tap at a time,
on the model's device, upwards in its forward pass and downwards where it runs its inside again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ladder_kernels.accounts import count_as
from ladder_kernels.nn.attention import SequenceLayout

__all__ = [
    "HIDDEN",
    "DeviceTaps",
    "MemoryRecord",
    "TapEncoding",
    "TapPlan",
    "TapRecord",
    "TapStore",
    "TapWarning",
]

HIDDEN = -1
"""The slot of the last state, beside those of the tapped layers."""

_LARGEST = 127
_NUMBERS_AT_ONCE = 1 << 22


class TapWarning(UserWarning):
    """Taps cannot be kept as they were asked to be; training goes on all the same."""


@dataclass(frozen=True)
class TapEncoding:
    """What a state is kept as.

    As int8 a token's numbers share one float32 scale, the largest magnitude over 127; they are
    rounded to the nearest whole number, ties to even. A token with NaN or infinity becomes NaN.

    Attributes:
        dtype: A float dtype, or int8.
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def parts(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        """What :meth:`encode` makes of ``[..., width]``: dtype and last size of each tensor."""
        if self.dtype.is_floating_point:
            return ((self.dtype, width),)
        return ((torch.int8, width), (torch.float32, 1))

    def bytes_per_token(self, width: int) -> int:
        """Bytes of one token's state of ``width`` numbers."""
        return sum(dtype.itemsize * size for dtype, size in self.parts(width))

    def copy(self, state: Tensor) -> tuple[Tensor, ...]:
        """Encode to tensors of their own, whose memory counts as that of taps."""
        parts = self.encode(state)
        return tuple(count_as("taps", part.clone() if part is state else part) for part in parts)

    def encode(self, state: Tensor) -> tuple[Tensor, ...]:
        """Encode.

        Args:
            state: ``[..., D]``, floating.

        Returns:
            Tensors as in :meth:`parts`; ``state`` itself where nothing changes.
        """
        if self.dtype.is_floating_point:
            return (state.to(self.dtype),)
        codes = torch.empty(state.shape, dtype=torch.int8, device=state.device)
        scales = torch.empty((*state.shape[:-1], 1), dtype=torch.float32, device=state.device)
        for rows, q, scale in _slices(state, codes, scales):
            wide = rows.float()
            most = wide.abs().amax(-1, keepdim=True)
            by = torch.full_like(most, _LARGEST) / most  # infinite for zeros, which stay zero
            q.copy_(torch.where(by.isfinite() & most.isfinite(), (wide * by).round_(), 0))
            scale.copy_(torch.where(most.isfinite(), most / _LARGEST, torch.nan))
        return codes, scales

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Decode.

        Args:
            parts: From :meth:`encode`.
            dtype: Of the result, for int8; float states are given back in the dtype that they are
                kept in.

        Returns:
            ``[..., D]``; the same tensor for a float encoding.
        """
        if self.dtype.is_floating_point:
            return parts[0]
        codes, scales = parts
        state = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for q, scale, out in _slices(codes, scales, state):
            out.copy_(q.float().mul_(scale))
        return state


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all of them together, few enough for their float32 copies to be small."""
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    rows = max(1, _NUMBERS_AT_ONCE // max(1, *(tensor.shape[-1] for tensor in flat)))
    for start in range(0, flat[0].shape[0], rows):
        yield tuple(tensor[start : start + rows] for tensor in flat)


@dataclass(frozen=True, kw_only=True)
class TapPlan:
    """What is kept of a frozen pass, and what its values depend on besides the tokens.

    Attributes:
        layers: Tapped layers, ascending.
        stop: The layer whose state is the last one.
        width: Of the residual stream, ``D``.
        encoding: Of the taps; the last state is kept in the compute dtype.
        dtype: The compute dtype.
        device: Where states come from and taps are read.
        activations: How quantised layers take their inputs.
        fingerprint: Of the backbone.
        base: The backbone's name, for messages.
    """

    layers: tuple[int, ...]
    stop: int
    width: int
    encoding: TapEncoding
    dtype: torch.dtype
    device: torch.device
    activations: str = "exact"
    fingerprint: str = ""
    base: str = ""

    @property
    def hidden_slot(self) -> int:
        """Where the last state is: a slot of its own, unless a tap is the same by bits."""
        same = self.stop in self.layers and self.encoding.dtype == self.dtype
        return self.stop if same else HIDDEN

    @property
    def slots(self) -> tuple[int, ...]:
        """Everything that is kept, in the order in which it is written."""
        return self.layers if self.hidden_slot == self.stop else (*self.layers, HIDDEN)

    def slots_of(self, layer: int) -> list[int]:
        """The slots that the state after ``layer`` goes to; none if nobody reads it."""
        own = [layer] if layer in self.layers else []
        return [*own, HIDDEN] if layer == self.stop and HIDDEN in self.slots else own

    def encoding_of(self, slot: int) -> TapEncoding:
        """How a slot is encoded."""
        return TapEncoding(self.dtype) if slot == HIDDEN else self.encoding


class TapRecord(Mapping[int, Tensor], ABC):
    """What is kept of one micro-batch: a mapping from tapped layers to taps ``[B, S, D]``.

    A tap is decoded, on the plan's device, and an ordinary tensor, which autograd may save. Each
    look-up may be a copy of its own: take a tap when it is needed, and let it go.

    Args:
        plan: What is kept.

    Attributes:
        plan: As above.
        rows: The sequences of the batch that the frozen pass has to run; ``None`` for all of them.
    """

    def __init__(self, plan: TapPlan) -> None:
        self.plan = plan
        self.rows: list[int] | None = None
        self._last: int | None = None

    @abstractmethod
    def _write(self, slot: int, state: Tensor) -> None:
        """Keep a copy of ``state``, which may be overwritten afterwards."""

    @abstractmethod
    def _read(self, slot: int, ahead: int | None) -> Tensor:
        """What was kept; ``ahead`` is the slot that will be asked for next, if there is one."""

    def write(self, layer: int, state: Tensor) -> None:
        """Take the state after ``layer``, ``[rows, S, D]``; those that nobody reads are left.

        It copies what it needs, so ``state`` may be overwritten afterwards.
        """
        slots = self.plan.slots_of(layer)
        if slots:
            # Autograd refuses to save what was made under inference mode.
            with torch.inference_mode(False), torch.no_grad():
                for slot in slots:
                    self._write(slot, state)

    def finish(self) -> None:
        """Everything is written."""

    def discard(self) -> None:
        """The frozen pass failed: what was written is of no use."""

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self.plan.layers:
            raise KeyError(layer)
        index = self.plan.layers.index(layer)
        before = None if self._last is None else self.plan.layers.index(self._last)
        # Upwards first; the second reading begins with the last tap again, and goes downwards.
        down = before is not None and (index < before or index == before > 0)
        following = index - 1 if down else index + 1
        within = 0 <= following < len(self.plan.layers)
        self._last = layer
        with torch.no_grad():
            return self._read(layer, self.plan.layers[following] if within else None)

    def __iter__(self) -> Iterator[int]:
        return iter(self.plan.layers)

    def __len__(self) -> int:
        return len(self.plan.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.plan.layers

    @property
    def hidden(self) -> Tensor:
        """``h[stop]``, ``[B, S, D]`` in the compute dtype."""
        with torch.no_grad():
            return self._read(self.plan.hidden_slot, None)


class TapStore(ABC):
    """Where taps wait between the two passes.

    Attributes:
        name: As options call it.
        leaves_padding: Whether it keeps no states of padding that nobody reads.
    """

    name: ClassVar[str]
    leaves_padding: ClassVar[bool] = False

    def check(self, fingerprint: str, base: str) -> None:  # noqa: B027
        """Refuse a base that it cannot serve, without writing anything; most serve any.

        Args:
            fingerprint: Of the backbone.
            base: Its name, for messages.
        """

    @abstractmethod
    def open(
        self, plan: TapPlan, tokens: Tensor, layout: SequenceLayout, read: Tensor | None = None
    ) -> TapRecord:
        """Make room for a micro-batch, or find what is there of it already.

        Args:
            plan: What is to be kept.
            tokens: Ids ``[B, S]`` or embeddings ``[B, S, D]``.
            layout: Of the batch.
            read: bool ``[B, S]``: where the ladder's output is read, such as where there is a
                label; ``None`` for everywhere. Of padding elsewhere, states may be lost.

        Returns:
            The record, whose ``rows`` say what has to be run.
        """


class MemoryRecord(TapRecord):
    """Taps as tensors, encoded, where the states are."""

    def __init__(self, plan: TapPlan) -> None:
        super().__init__(plan)
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def _write(self, slot: int, state: Tensor) -> None:
        self._kept[slot] = self.plan.encoding_of(slot).copy(state)

    def _read(self, slot: int, ahead: int | None) -> Tensor:
        return self.plan.encoding_of(slot).decode(self._kept[slot], self.plan.dtype)


class DeviceTaps(TapStore):
    """Taps wait on the model's device."""

    name = "device"

    def open(
        self, plan: TapPlan, tokens: Tensor, layout: SequenceLayout, read: Tensor | None = None
    ) -> TapRecord:
        """See :class:`TapStore`."""
        return MemoryRecord(plan)
