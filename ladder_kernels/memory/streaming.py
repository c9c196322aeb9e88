"""Quantised layers that wait outside the device and are brought in one after another.

A frozen pass takes up each layer once, in order. So two *slots* of one layer each are all that the
device needs: while one layer computes, the next is brought into the other slot, from a file by a
thread that reads ahead, or from pinned host memory. The weights of all layers are views of the two
slots, even layers of one and odd layers of the other; :meth:`LayerStream.fetch` makes those of one
layer real.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladder_kernels.errors import CheckpointError, ConfigError, MissingFileError
from ladder_kernels.models.fingerprint import digest_nf4
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.quantize import has_values

__all__ = ["Extent", "LayerFiles", "LayerLayout", "LayerStream", "PackedWeight"]

# Where tensors begin within a slot: what a GPU loads at once, and a CPU's cache line, divide it.
_ALIGNED = 256
# Bytes that one thread reads at a time.
_PIECE = 1 << 23
# Threads that read a layer for a GPU, which waits for one of them; a CPU has none to spare.
_READERS_FOR_GPU = 4
# The mean of the scales: one number, which files keep as text and every device has at hand.
_RESIDENT = "nested_offset"


@dataclass(frozen=True)
class Extent:
    """Bytes in a file.

    Attributes:
        path: Of the file.
        offset: Of the first byte.
    """

    path: Path
    offset: int


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight before it is anywhere.

    Attributes:
        name: In a transformers checkpoint.
        template: A weight with its shape, blocksize and sizes; of its values, only the offset of
            the scales counts.
        extents: Where a file has its other tensors, by field; empty if no file has them.
        digest: Its digest, if the file says it.
    """

    name: str
    template: NF4Weight
    extents: Mapping[str, Extent]
    digest: bytes | None = None


class LayerLayout:
    """How the quantised weights of one layer lie in a slot.

    Args:
        weights: Of the layer.

    Attributes:
        weights: By name.
        nbytes: Of them all.
    """

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.starts: dict[str, dict[str, int]] = {}
        self.nbytes = 0
        for weight in weights:
            starts = self.starts[weight.name] = {}
            for field, tensor in weight.template.tensors().items():
                if field != _RESIDENT:
                    starts[field] = self.nbytes
                    self.nbytes += -(-tensor.nbytes // _ALIGNED) * _ALIGNED

    def weight(self, name: str, memory: Tensor, like: NF4Weight | None = None) -> NF4Weight:
        """A weight whose tensors are views of a slot.

        Args:
            name: Of the weight.
            memory: The slot, uint8 ``[nbytes]`` or longer, on any device.
            like: Where its dtype and the offset of its scales come from; default the template.
        """
        template = self.weights[name].template
        like = template if like is None else like
        fields: dict[str, Any] = {"dtype": like.dtype}
        for field, tensor in template.tensors().items():
            if field == _RESIDENT:
                fields[field] = like.tensors()[field].to(memory.device)
            else:
                start = self.starts[name][field]
                part = memory[start : start + tensor.nbytes]
                fields[field] = part.view(tensor.dtype).view(tensor.shape)
        return replace(template, **fields)


class _Reader:
    """Reads pieces of files, one after another: its files have a position of their own."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[Path, FileIO] = {}
        for path in paths:
            try:
                self._files[path] = FileIO(path)
            except FileNotFoundError:
                self.close()
                raise MissingFileError(f"'{path}' does not exist") from None

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, pieces: Iterable[tuple[Path, int, memoryview, str]]) -> None:
        """Fill memory from files: path, offset, memory, and the name of the weight for messages."""
        for path, offset, into, name in pieces:
            self._read(path, offset, into, name)

    def _read(self, path: Path, offset: int, into: memoryview, name: str) -> None:
        file, done = self._files[path], 0
        try:
            file.seek(offset)
            # Straight into the slot, and without the interpreter's lock.
            while done < len(into):
                got = file.readinto(into[done:])
                if not got:
                    raise CheckpointError(
                        f"'{path}' ends at byte {offset + done}, within '{name}': it was cut short "
                        "after it was opened"
                    )
                done += got
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read at '{name}': {error}") from error


class LayerFiles:
    """Layers in files, read a layer at a time into memory that is there.

    The first time that a layer is read, its weights are compared with their digests.

    Args:
        layouts: Of the layers; their weights have extents.
        readers: How many threads read a layer together; one is the caller's own.

    Raises:
        MissingFileError: If a file does not exist.
    """

    def __init__(self, layouts: Sequence[LayerLayout], readers: int = 1) -> None:
        self.layouts = layouts
        self._digests = [
            {name: weight.digest for name, weight in layout.weights.items()} for layout in layouts
        ]
        self._verified: set[int] = set()
        paths = {
            extent.path
            for layout in layouts
            for weight in layout.weights.values()
            for extent in weight.extents.values()
        }
        self._readers: list[_Reader] = []
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="ladder_kernels.reader")
        try:
            for _ in range(readers):
                self._readers.append(_Reader(sorted(paths)))
        except MissingFileError:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def read(self, layer: int, memory: Tensor) -> None:
        """Read a layer.

        Args:
            layer: Its index.
            memory: Filled as its layout says: uint8 ``[nbytes]`` or longer, on the CPU.

        Raises:
            CheckpointError: If a file has become shorter, cannot be read, or holds a weight that
                is not the one that its digest was taken of.
        """
        pieces = self._pieces(self.layouts[layer], memory.numpy().data)
        first, *others = self._readers
        count = len(self._readers)
        started = [
            self._pool.submit(reader.read, pieces[index::count])
            for index, reader in enumerate(others, start=1)
        ]
        try:
            first.read(pieces[::count])
        finally:
            # Nobody writes to the memory any more, come what may.
            wait(started)
        for each in started:
            each.result()
        if layer not in self._verified:
            self._verify(layer, memory)

    @staticmethod
    def _pieces(layout: LayerLayout, view: memoryview) -> list[tuple[Path, int, memoryview, str]]:
        """A layer's bytes in files and where they go, in the files' order, none of them long."""
        pieces = []
        for name, weight in layout.weights.items():
            tensors = weight.template.tensors()
            for field, extent in weight.extents.items():
                start, nbytes = layout.starts[name][field], tensors[field].nbytes
                for at in range(0, nbytes, _PIECE):
                    into = view[start + at : start + min(at + _PIECE, nbytes)]
                    pieces.append((extent.path, extent.offset + at, into, name))
        return sorted(pieces, key=lambda piece: piece[:2])

    def _verify(self, layer: int, memory: Tensor) -> None:
        layout, known = self.layouts[layer], self._digests[layer]
        for name in layout.weights:
            found = digest_nf4(layout.weight(name, memory))
            wanted = known[name]
            if wanted is not None and found != wanted:
                path = layout.weights[name].extents["packed"].path
                raise CheckpointError(
                    f"'{name}' in '{path}' is damaged: its sha256 begins with "
                    f"{found.hex()[:12]}, where the file was written with {wanted.hex()[:12]}"
                )
            known[name] = found
        self._verified.add(layer)

    def digests(self, layer: int, memory: Tensor) -> dict[str, bytes]:
        """The digest of each weight of a layer, by name; read if the file does not say them.

        Args:
            layer: Its index.
            memory: Where to read it to.

        Raises:
            CheckpointError: As :meth:`read`.
        """
        if any(digest is None for digest in self._digests[layer].values()):
            self.read(layer, memory)
        return {name: digest for name, digest in self._digests[layer].items() if digest is not None}


class _Slot:
    """Room for one layer on the device.

    Attributes:
        memory: uint8, on the device.
        staging: The same in pinned memory, if a GPU is filled from a file.
        layer: What it holds, or will hold when ``arrival`` is there.
        arrival: The event after which a GPU's kernels may read it, or ``None`` on a CPU.
        copied: The event after which ``staging`` may be filled anew.
    """

    def __init__(self, nbytes: int, device: torch.device, staged: bool) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.staging: Tensor | None = None
        if staged:
            self.staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.layer: int | None = None
        self.arrival: Future[Any] | None = None
        self.copied: Any = None


class LayerStream:
    """Brings layers into two slots, one of which is in use while the other is filled.

    Args:
        layouts: Of the layers, bottom first.
        device: Where the slots are.
        from_files: Whether the layers are in files; else they wait in host memory, where
            :meth:`store` puts them.

    Attributes:
        layouts: As above.
        device: As above.
        from_files: As above.

    Raises:
        MissingFileError: If a file does not exist.
    """

    def __init__(
        self, layouts: Sequence[LayerLayout], device: torch.device, *, from_files: bool
    ) -> None:
        self.layouts = layouts
        self.from_files = from_files
        self._layer_of = {
            name: layer for layer, layout in enumerate(layouts) for name in layout.weights
        }
        sizes = [max(each.nbytes for each in layouts[side::2]) for side in range(len(layouts[:2]))]
        # Slots of a traced model have no bytes that could be filled.
        self._real = has_values(torch.empty(0, device=device))
        on_gpu = self._real and device.type == "cuda"
        self._slots = [_Slot(size, device, on_gpu and from_files) for size in sizes]
        # With its number: another thread may have another current GPU.
        self.device = self._slots[0].memory.device
        readers = min(_READERS_FOR_GPU, os.cpu_count() or 1) if on_gpu else 1
        self._files = LayerFiles(layouts, readers) if from_files else None
        self._waiting: list[Tensor] = []
        self._side: Any = None
        if on_gpu:
            self._side = torch.cuda.Stream(device)
            for slot in self._slots:
                slot.memory.record_stream(self._side)
            if not from_files:
                self._waiting = [
                    torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=True)
                    for layout in layouts
                ]
        # It starts its thread when there is something to read, and ends it when it is dropped.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ladder_kernels.weights")
        self._closed = weakref.finalize(self, _close, self._worker, self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._layer_of

    def close(self) -> None:
        """End the thread and close the files; nothing can be fetched afterwards."""
        for slot in self._slots:
            if slot.arrival is not None and not slot.arrival.cancel():
                slot.arrival.exception()
        if self._side is not None:
            self._side.synchronize()
        self._worker.shutdown(wait=True)
        self._closed()

    def weight(self, name: str) -> NF4Weight:
        """A weight as views of its slot, whose values are there while its layer is fetched."""
        layer = self._layer_of[name]
        return self.layouts[layer].weight(name, self._slots[layer % 2].memory)

    def store(self, name: str, weight: NF4Weight) -> NF4Weight:
        """Put a weight where it waits for its layer to be fetched.

        Args:
            name: One of the layouts', which do not come from files.
            weight: On the CPU, or without values.

        Returns:
            As :meth:`weight`.
        """
        layer = self._layer_of[name]
        layout = self.layouts[layer]
        if self._waiting:
            kept = layout.weight(name, self._waiting[layer], weight).tensors()
            for field, tensor in weight.tensors().items():
                kept[field].copy_(tensor)
        return layout.weight(name, self._slots[layer % 2].memory, weight)

    def digest(self, name: str) -> bytes:
        """The digest of a weight in a file; the file is read for it if it does not say it.

        Raises:
            CheckpointError: If it cannot be read.
        """
        if self._files is None:
            raise ConfigError(f"'{name}' is in no file that would say its digest")
        layer = self._layer_of[name]
        # Read to where it would go, which holds nothing yet.
        slot = self._slots[layer % 2]
        memory = slot.memory if slot.staging is None else slot.staging
        return self._files.digests(layer, memory)[name]

    def fetch(self, layer: int, then: int | None = None) -> None:
        """Make the weights of a layer real; whatever another layer was needed for is over.

        On a GPU, "over" means enqueued on the current stream, and so does the use of ``layer``.

        Args:
            layer: Its index.
            then: The layer that will be fetched next, brought in meanwhile: of the other parity.

        Raises:
            CheckpointError: If the layer cannot be read, or is not what its file was written with.
            ConfigError: If the stream was closed.
        """
        if not self._real:
            return
        if not self._closed.alive:
            raise ConfigError("the backbone was closed: its streamed weights can be read no more")
        slot = self._begin(layer)
        arrival = slot.arrival
        if then is not None and (then - layer) % 2:
            self._begin(then)
        try:
            ready = None if arrival is None else arrival.result()
        except BaseException:
            slot.layer = slot.arrival = None
            raise
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)

    def _begin(self, layer: int) -> _Slot:
        slot = self._slots[layer % 2]
        if slot.layer != layer:
            free = None
            if self._side is not None:
                free = torch.cuda.current_stream(self.device).record_event()
            slot.layer = layer
            slot.arrival = self._worker.submit(self._fill, layer, slot, free)
        return slot

    def _fill(self, layer: int, slot: _Slot, free: Any) -> Any:
        """Bring a layer into a slot; runs on the thread.

        Args:
            layer: Its index.
            slot: Where to.
            free: The event after which a GPU has read what is there.

        Returns:
            The event after which the layer is there; ``None`` if it is.
        """
        if self._side is None:
            if self._files is not None:
                self._files.read(layer, slot.memory)
            return None
        size = self.layouts[layer].nbytes
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            if self._files is None or slot.staging is None:
                source = self._waiting[layer]
            else:
                source = slot.staging
                if slot.copied is not None:
                    slot.copied.synchronize()
                self._files.read(layer, source)
            self._side.wait_event(free)
            slot.memory[:size].copy_(source[:size], non_blocking=True)
            slot.copied = self._side.record_event()
            return slot.copied


def _close(worker: ThreadPoolExecutor, files: LayerFiles | None) -> None:
    # Not waited for: the last reference to a stream may go on its own thread.
    worker.shutdown(wait=False, cancel_futures=True)
    if files is not None:
        files.close()
