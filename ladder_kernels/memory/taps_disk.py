"""Taps that wait in files, and are kept there: from the second epoch on nothing computes them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ladder_kernels.errors import BaseMismatchError, CheckpointError, ConfigError
from ladder_kernels.memory.tap_entry import Entry, EntryLayout, NewEntry, remove_abandoned
from ladder_kernels.memory.taps import TapPlan, TapRecord, TapStore, TapWarning
from ladder_kernels.nn.attention import SequenceLayout

__all__ = ["BASE_FILE", "DiskTaps"]

BASE_FILE = "base.json"
"""File of a folder of taps that says which base they are of."""

_FORMAT = "ladder_kernels taps"
# No room: training goes on without.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskTaps(TapStore):
    """Taps wait in memory-mapped files, one a sequence, which are kept from epoch to epoch.

    A sequence is known by its tokens, their positions and documents, and by all that its states
    depend on besides; padding that nobody reads does not count, so batches may be made up and
    padded otherwise the next time. What is there already is not run again.

    Files are written beside their place and renamed, so a process that is killed leaves none that
    is not whole, and files that are not whole are as good as none. When the disk is full, or
    ``limit`` is reached, no more are kept; that is said once (:class:`~.taps.TapWarning`), and
    training goes on: then the taps of a step wait in a file without a name, or in memory.

    Args:
        folder: Made where it is missing. It is of one base model; several processes may share it.
        limit: Most bytes of all its files; ``None`` for no limit. The taps of a step that are not
            kept do not count.

    Raises:
        ConfigError: If ``limit`` is below 1.
    """

    name = "disk"
    leaves_padding = True

    def __init__(self, folder: str | os.PathLike[str], *, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ConfigError(f"tap_cache_bytes: found {limit}; it must be 1 or more")
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self._fingerprint: str | None = None
        self._writes = True
        self._keeps = True

    def open(
        self, plan: TapPlan, tokens: Tensor, layout: SequenceLayout, read: Tensor | None = None
    ) -> TapRecord:
        """See :class:`~.taps.TapStore`.

        Raises:
            BaseMismatchError: If the folder holds the taps of another base.
            CheckpointError: If it is no folder of taps, or cannot be made or read.
        """
        if plan.fingerprint != self._fingerprint:
            self._enter(plan)
        kept = None
        if read is not None and layout.padding is not None:
            kept = (layout.padding | read.to(layout.device)).cpu()
        return _DiskRecord(plan, self, tokens.detach().cpu(), layout.to("cpu"), kept)

    def check(self, fingerprint: str, base: str) -> None:
        """See :class:`~.taps.TapStore`.

        Raises:
            BaseMismatchError: If the folder holds the taps of another base.
            CheckpointError: If it is no folder of taps, or cannot be read.
            ConfigError: If the base has no fingerprint, so that its taps would be anybody's.
        """
        if not fingerprint:
            raise ConfigError(
                f"taps: found 'disk', but {base or 'the base'} has no fingerprint to know its taps "
                "by; allowed are 'device', 'host'"
            )
        try:
            found = self._read_base()
        except OSError as error:
            raise self._unusable(error) from error
        if found is not None and found.get("fingerprint") != fingerprint:
            raise BaseMismatchError(
                f"{self.folder}: found the taps of {found.get('base') or 'another base'} "
                f"(fingerprint {str(found.get('fingerprint'))[:12]}), not of "
                f"{base or 'this base'} (fingerprint {fingerprint[:12]}); give each base a folder "
                "of its own"
            )

    def _enter(self, plan: TapPlan) -> None:
        """See whose folder it is, or make it."""
        self.check(plan.fingerprint, plan.base)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.folder)
            if self._read_base() is None:
                self._write_base(plan)
        except OSError as error:
            if error.errno not in _FULL:
                raise self._unusable(error) from error
            self.failed(error)
        self._fingerprint = plan.fingerprint

    def _unusable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: no folder that taps can be kept in ({error.strerror})"
        )

    def _read_base(self) -> Mapping[str, object] | None:
        file = self.folder / BASE_FILE
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(f"{file}: not a readable JSON file ({error})") from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise CheckpointError(f"{file}: found something else than the base of a tap cache")
        return found

    def _write_base(self, plan: TapPlan) -> None:
        values = {"format": _FORMAT, "base": plan.base, "fingerprint": plan.fingerprint}
        part = self.folder / f"{BASE_FILE}.{os.getpid()}"
        part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        part.replace(self.folder / BASE_FILE)

    def create(self, layout: EntryLayout) -> NewEntry | None:
        """A file for a sequence; ``None`` if its taps have to wait in memory."""
        if not self._writes:
            return None
        kept = self._keeps and self._has_room(layout.size)
        try:
            return NewEntry(layout, self.folder, kept=kept)
        except OSError as error:
            self.failed(error)
            return None

    def _has_room(self, size: int) -> bool:
        if self.limit is None:
            return True
        # Counted anew each time: other processes fill the folder, too.
        with os.scandir(self.folder) as files:
            used = sum(_size_of(file) for file in files)
        if used + size <= self.limit:
            return True
        self._keeps = False
        warnings.warn(
            f"{self.folder}: the tap cache holds {used:,} of {self.limit:,} bytes, and the next "
            f"sequence needs {size:,}; training goes on, and sequences that are not in it yet are "
            "not kept",
            TapWarning,
            stacklevel=2,
        )
        return False

    def failed(self, error: OSError) -> None:
        """Write no more."""
        if self._writes:
            self._writes = False
            warnings.warn(
                f"{self.folder}: taps cannot be written ({error.strerror}); training goes on, and "
                "taps that are not in the cache yet wait in memory",
                TapWarning,
                stacklevel=2,
            )


def _size_of(file: os.DirEntry[str]) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # renamed meanwhile, by another process
        return 0


class _Sequence:
    """Where the states of one sequence are: a file, or memory where that failed.

    Attributes:
        entry: The file, if there is one.
        span: The tokens' places in their row.
    """

    def __init__(self, entry: Entry | None, span: _Span) -> None:
        self.entry = entry
        self.span = span
        self._memory: dict[int, tuple[Tensor, ...]] = {}

    def write(self, slot: int, parts: tuple[Tensor, ...], store: DiskTaps) -> None:
        parts = tuple(part.cpu() for part in parts)
        if isinstance(self.entry, NewEntry) and not self._memory:
            try:
                self.entry.write(slot, parts)
                return
            except OSError as error:
                self.entry.discard()
                store.failed(error)
        self._memory[slot] = tuple(part.clone() for part in parts)

    def finish(self, store: DiskTaps) -> None:
        if isinstance(self.entry, NewEntry) and not self._memory:
            try:
                self.entry.finish()
            except OSError as error:
                self.entry.discard()
                store.failed(error)

    def read(self, slot: int) -> tuple[Tensor, ...]:
        if slot in self._memory or self.entry is None:
            return self._memory[slot]
        return self.entry.read(slot)

    def expect(self, slot: int) -> None:
        if self.entry is not None and slot not in self._memory:
            self.entry.expect(slot)


@dataclass(frozen=True)
class _Span:
    """The tokens of a row that are kept.

    Attributes:
        places: A slice where they follow each other, else int64 ``[tokens]``.
        tokens: How many.
        whole: Whether those are all of the row.
    """

    places: slice | Tensor
    tokens: int
    whole: bool


class _DiskRecord(TapRecord):
    """Taps of the sequences of one micro-batch; ``rows`` are those that no file was found of."""

    def __init__(
        self,
        plan: TapPlan,
        store: DiskTaps,
        tokens: Tensor,
        layout: SequenceLayout,
        kept: Tensor | None,
    ) -> None:
        super().__init__(plan)
        self._store = store
        self._shape = layout.batch, layout.length
        self._row_keys: list[tuple[str, _Span]] = []
        self._sequences: dict[str, _Sequence] = {}
        self.rows = []
        for row in range(layout.batch):
            span, key = _identify(plan, tokens[row], layout, row, kept)
            self._row_keys.append((key, span))
            if key in self._sequences:
                continue
            entry_layout = EntryLayout(key, plan, span.tokens)
            entry = Entry.find(store.folder, entry_layout)
            if entry is None:
                self.rows.append(row)
                entry = store.create(entry_layout)
            self._sequences[key] = _Sequence(entry, span)

    def _missing(self) -> list[_Sequence]:
        return [self._sequences[self._row_keys[row][0]] for row in self.rows or []]

    def _write(self, slot: int, state: Tensor) -> None:
        encoding = self.plan.encoding_of(slot)
        for sequence, own in zip(self._missing(), state, strict=True):
            sequence.write(slot, encoding.encode(own[sequence.span.places]), self._store)

    def finish(self) -> None:
        """Give the files of new sequences their names."""
        for sequence in self._missing():
            sequence.finish(self._store)

    def discard(self) -> None:
        """Leave no file behind."""
        for sequence in self._missing():
            if isinstance(sequence.entry, NewEntry):
                sequence.entry.discard()

    def _read(self, slot: int, ahead: int | None) -> Tensor:
        if ahead is not None:
            for sequence in self._sequences.values():
                sequence.expect(ahead)
        parts = self._gather(slot)
        return self.plan.encoding_of(slot).decode(parts, self.plan.dtype)

    def _gather(self, slot: int) -> list[Tensor]:
        """The tensors of a slot for the batch; zeros for padding, which nobody reads."""
        device, (batch, length) = self.plan.device, self._shape
        rows = [(self._sequences[key].read(slot), span) for key, span in self._row_keys]
        if batch == 1 and rows[0][1].whole:
            # On a CPU this is the file itself, and nothing is copied.
            return [part.to(device)[None] for part in rows[0][0]]
        gathered = []
        for index, (dtype, width) in enumerate(self.plan.encoding_of(slot).parts(self.plan.width)):
            whole = torch.zeros((batch, length, width), dtype=dtype, device=device)
            for row, (parts, span) in zip(whole, rows, strict=True):
                row[span.places] = parts[index].to(device)
            gathered.append(whole)
        return gathered


def _identify(
    plan: TapPlan, tokens: Tensor, layout: SequenceLayout, row: int, kept: Tensor | None
) -> tuple[_Span, str]:
    """The tokens of a row that are kept, and the name of all that their states depend on."""
    places = torch.arange(layout.length) if kept is None else kept[row].nonzero()[:, 0]
    count = places.numel()
    first = int(places[0]) if count else 0
    real, documents = torch.ones_like(places), torch.zeros_like(places)
    if layout.padding is not None:
        real = layout.padding[row, places]
    if layout.documents is not None:
        # Their numbers may count padding, too; what matters is where each begins.
        documents = layout.documents[row, places].unique_consecutive(return_inverse=True)[1]
    about = {
        "format": 1,
        "fingerprint": plan.fingerprint,
        "dtype": str(plan.dtype),
        "activations": plan.activations,
        "layers": plan.layers,
        "stop": plan.stop,
        "encoding": plan.encoding.name,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    # Windows see so many places back, padding among them or not: the distances count.
    numbers = torch.stack(
        [layout.position_ids[row, places], places - first, documents, real.to(places.dtype)]
    )
    for value in (tokens[places].contiguous(), numbers):
        digest.update(repr((str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    contiguous = count and int(places[-1]) - first + 1 == count
    found = slice(first, first + count) if contiguous else places
    return _Span(found, count, count == layout.length), digest.hexdigest()
