"""Taps that wait in the host's memory while a GPU has none to spare."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ladder_kernels.accounts import count_as
from ladder_kernels.memory.taps import MemoryRecord, TapPlan, TapRecord, TapStore
from ladder_kernels.nn.attention import SequenceLayout

__all__ = ["HostTaps"]

# States that wait on the device to be copied away: one is copied while the next is encoded.
_WAITING = 2


class HostTaps(TapStore):
    """Taps wait in host memory; on a CPU that is where the model is.

    On a GPU they wait in page-locked buffers, used again from step to step, and are copied both
    ways on a stream of their own, which the stream of the computation waits for and the host never.
    The next tap is fetched while one is used; at most two states, besides those that the reader
    holds, are on the device at a time.
    """

    name = "host"

    def __init__(self) -> None:
        self._copies: dict[torch.device, _Copies] = {}

    def open(
        self, plan: TapPlan, tokens: Tensor, layout: SequenceLayout, read: Tensor | None = None
    ) -> TapRecord:
        """See :class:`TapStore`."""
        if plan.device.type == "cpu":
            return MemoryRecord(plan)
        if plan.device not in self._copies:
            self._copies[plan.device] = _Copies(plan.device)
        return _HostRecord(plan, self._copies[plan.device])

    def __deepcopy__(self, memo: object) -> HostTaps:
        """A store of its own: buffers and streams are nobody's state."""
        return type(self)()


class _HostRecord(TapRecord):
    """Taps of one micro-batch in buffers of the host, which go back when it is dropped."""

    def __init__(self, plan: TapPlan, copies: _Copies) -> None:
        super().__init__(plan)
        self._copies = copies
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._ahead: dict[int, _Arrival] = {}
        self._buffers: list[Tensor] = []
        dropped = weakref.finalize(self, _give_back, copies, self._buffers, self._ahead)
        dropped.atexit = False

    def _write(self, slot: int, state: Tensor) -> None:
        parts = self.plan.encoding_of(slot).copy(state)
        self._kept[slot] = self._copies.send(parts, self._buffers)

    def finish(self) -> None:
        """Let go of what waits on the device, once it is copied."""
        self._copies.settle(0)

    def discard(self) -> None:
        """As :meth:`finish`: a record is dropped by whoever holds it."""
        self._copies.settle(0)

    def _read(self, slot: int, ahead: int | None) -> Tensor:
        arrival = self._ahead.pop(slot, None) or self._copies.fetch(self._kept[slot])
        self._forget()
        parts = self._copies.receive(arrival)
        state = self.plan.encoding_of(slot).decode(parts, self.plan.dtype)
        if ahead is not None:
            self._ahead[ahead] = self._copies.fetch(self._kept[ahead])
        return state

    def _forget(self) -> None:
        """Drop a tap that was fetched and not asked for."""
        while self._ahead:
            self._copies.receive(self._ahead.popitem()[1])


class _Arrival:
    """Tensors on the device that a copy is still filling."""

    def __init__(self, parts: tuple[Tensor, ...], event: torch.Event | None) -> None:
        self.parts = parts
        self.event = event


class _Copies:
    """The copies of one device, in one order, both ways.

    Tensors on the device belong to the stream of the computation, which waits for a copy before it
    uses, or uses again, what the copy touches; so the allocator needs no help, and how much there
    is does not depend on how far the host runs ahead. Buffers on the host are touched by these
    copies alone, one after the other.

    Without a GPU, or with fake tensors, everything happens at once, with the same tensors alive.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        with unset_fake_temporarily() as fake:
            if fake is None and device.type == "cuda":
                self._stream = torch.cuda.Stream(device)
        self._free: list[Tensor] = []
        self._sent: deque[_Arrival] = deque()

    def _aside(self) -> AbstractContextManager[object]:
        """Within it, work goes to the copies' stream, after all that was asked for until now."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _event(self) -> torch.Event | None:
        return None if self._stream is None else self._stream.record_event()

    def send(self, parts: tuple[Tensor, ...], taken: list[Tensor]) -> tuple[Tensor, ...]:
        """Copy tensors of the device, which are nobody else's, to the host.

        Args:
            parts: The tensors.
            taken: The buffers that hold them are added here, for :meth:`give_back`.

        Returns:
            The same tensors on the host.
        """
        views = []
        for part in parts:
            buffer = self._buffer(part.nbytes)
            taken.append(buffer)
            views.append(buffer[: part.nbytes].view(part.dtype).view(part.shape))
        with self._aside():
            for view, part in zip(views, parts, strict=True):
                view.copy_(part, non_blocking=self._stream is not None)
        self._sent.append(_Arrival(parts, self._event()))
        self.settle(_WAITING - 1)
        return tuple(views)

    def settle(self, left: int) -> None:
        """Let the computation go on only when at most ``left`` of those sent are still copied."""
        while len(self._sent) > left:
            self.receive(self._sent.popleft())

    def fetch(self, buffers: Sequence[Tensor]) -> _Arrival:
        """Begin to copy buffers of the host to the device."""
        parts = tuple(
            count_as("taps", torch.empty_like(buffer, device=self._device)) for buffer in buffers
        )
        with self._aside():
            for buffer, part in zip(buffers, parts, strict=True):
                part.copy_(buffer, non_blocking=self._stream is not None)
        return _Arrival(parts, self._event())

    def receive(self, arrival: _Arrival) -> tuple[Tensor, ...]:
        """Let the computation wait for a copy."""
        if arrival.event is not None:
            torch.cuda.current_stream(self._device).wait_event(arrival.event)
        return arrival.parts

    def _buffer(self, size: int) -> Tensor:
        """So many bytes of the host: the least free buffer that has them, else a new one.

        A new one takes the place of a free one, so that batches of any lengths do not add up.
        """
        self._free.sort(key=Tensor.numel)
        fits = next((i for i, buffer in enumerate(self._free) if buffer.numel() >= size), None)
        if fits is not None:
            buffer = self._free.pop(fits)
        else:
            if self._free:
                self._free.pop()
            pinned = self._stream is not None
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            count_as("taps", buffer)
        return buffer

    def give_back(self, buffers: Sequence[Tensor]) -> None:
        """Buffers that nobody will read again; the next copy into them waits its turn."""
        self._free.extend(buffers)


def _give_back(copies: _Copies, buffers: list[Tensor], ahead: dict[int, _Arrival]) -> None:
    """Called at any time, inside of inference mode too: no tensor is made here."""
    for arrival in ahead.values():
        copies.receive(arrival)
    ahead.clear()
    copies.give_back(buffers)
    buffers.clear()
