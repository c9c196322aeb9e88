"""Files of taps: whole or absent, of one base, bounded; training goes on when the disk is full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ladder_kernels
from ladder_kernels.errors import BaseMismatchError, CheckpointError, ConfigError
from ladder_kernels.memory.ledger import is_file_mapped
from ladder_kernels.memory.tap_entry import Entry, EntryLayout, NewEntry
from ladder_kernels.memory.taps import TapEncoding, TapPlan, TapRecord, TapWarning
from ladder_kernels.memory.taps_disk import DiskTaps
from ladder_kernels.nn.attention import SequenceLayout

LENGTH, WIDTH = 12, 8
LAYERS = 5


def make_plan(**options: Any) -> TapPlan:
    values = {
        "layers": (0, 2, 3), "stop": 4, "width": WIDTH, "encoding": TapEncoding(torch.float32),
        "dtype": torch.float32, "device": torch.device("cpu"), "fingerprint": "f" * 64,
        "base": "some/base",
    }  # fmt: skip
    return TapPlan(**{**values, **options})


PLAN = make_plan()


def states_of(tokens: torch.Tensor) -> list[torch.Tensor]:
    """What a model would give: any numbers, but the same for the same tokens."""
    hidden = torch.stack([torch.sin(tokens * (k + 1.0)) for k in range(WIDTH)], -1)
    return [hidden * (layer + 1) for layer in range(LAYERS)]


def open_record(store: DiskTaps, tokens: torch.Tensor, plan: TapPlan = PLAN) -> TapRecord:
    return store.open(plan, tokens, SequenceLayout.build(*tokens.shape))


def fill(record: TapRecord, tokens: torch.Tensor) -> None:
    rows = record.rows
    assert rows is not None
    for layer, state in enumerate(states_of(tokens[rows])):
        record.write(layer, state)
    record.finish()


def finish(record: TapRecord, tokens: torch.Tensor, start: int) -> None:
    """Write the states from layer ``start`` on."""
    for layer, state in enumerate(states_of(tokens)):
        if layer >= start:
            record.write(layer, state)
    record.finish()


def assert_holds(record: TapRecord, tokens: torch.Tensor) -> None:
    states = states_of(tokens)
    for layer in PLAN.layers:
        assert torch.equal(record[layer], states[layer])
    assert torch.equal(record.hidden, states[4])


def sequence(seed: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (batch, LENGTH), generator=generator)


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


@pytest.fixture(autouse=True)
def _no_warnings_but_those_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Files ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 300),
    layers=st.sets(st.integers(0, 6), max_size=4),
    encoding=st.sampled_from([torch.int8, torch.bfloat16, torch.float16, torch.float32]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_what_is_written_is_read(tokens, width, layers, encoding, dtype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entry")
    plan = make_plan(
        layers=tuple(sorted(layers)), stop=6, width=width, encoding=TapEncoding(encoding),
        dtype=dtype,
    )  # fmt: skip
    layout = EntryLayout("ab" * 32, plan, tokens)
    assert Entry.find(folder, layout) is None
    new = NewEntry(layout, folder, kept=True)
    parts = {}
    for slot in plan.slots:
        parts[slot] = plan.encoding_of(slot).encode(torch.randn(tokens, width).to(dtype))
        new.write(slot, parts[slot])
        assert all(map(torch.equal, new.read(slot), parts[slot]))
    assert Entry.find(folder, layout) is None
    new.finish()
    found = Entry.find(folder, layout)
    assert found is not None
    for entry in (new, found):
        for slot in plan.slots:
            entry.expect(slot)
            for one, two in zip(entry.read(slot), parts[slot], strict=True):
                assert torch.equal(one, two)
                assert one.data_ptr() % 64 == 0
    assert [path.stat().st_size for path in folder.iterdir()] == [layout.size]


def written(folder: Path) -> tuple[EntryLayout, Path]:
    layout = EntryLayout("ab" * 32, PLAN, LENGTH)
    new = NewEntry(layout, folder, kept=True)
    for slot in PLAN.slots:
        new.write(slot, (torch.randn(LENGTH, WIDTH),))
    new.finish()
    return layout, next(folder.glob("*.taps"))


def test_a_truncated_file_is_never_read(tmp_path):
    layout, path = written(tmp_path)
    whole = path.read_bytes()
    for size in (0, 7, 8, len(layout.header) - 1, len(layout.header), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert Entry.find(tmp_path, layout) is None
    path.write_bytes(whole + b"\0")
    assert Entry.find(tmp_path, layout) is None
    path.write_bytes(whole)
    assert Entry.find(tmp_path, layout) is not None


def test_a_file_whose_header_is_not_its_own_is_never_read(tmp_path):
    layout, path = written(tmp_path)
    whole = path.read_bytes()
    end = len(layout.header.rstrip(b"\0"))
    for place in (0, 7, 8, 16, 47, 48, end // 2, end - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert Entry.find(tmp_path, layout) is None
    path.write_bytes(b"\0" * len(layout.header) + whole[len(layout.header) :])
    assert Entry.find(tmp_path, layout) is None
    # Another entry under its name, such as one of another base.
    other = EntryLayout("cd" * 32, PLAN, LENGTH)
    path.write_bytes(other.header + whole[len(layout.header) :])
    assert Entry.find(tmp_path, layout) is None


def test_a_file_that_is_not_kept_has_no_name(tmp_path):
    new = NewEntry(EntryLayout("ab" * 32, PLAN, LENGTH), tmp_path, kept=False)
    state = torch.randn(LENGTH, WIDTH)
    new.write(2, (state,))
    assert not list(tmp_path.iterdir())
    new.finish()
    assert torch.equal(new.read(2)[0], state)
    assert not list(tmp_path.iterdir())


# The store ------------------------------------------------------------------------------------


def test_taps_are_page_cache_and_not_memory(tmp_path):
    tokens = sequence(1)
    store = DiskTaps(tmp_path)
    for _ in range(2):
        record = open_record(store, tokens)
        fill(record, tokens)
        for tap in (record[0], record[2], record.hidden):
            assert is_file_mapped(tap)
    assert record.rows == []


def test_a_damaged_file_is_computed_again(tmp_path):
    tokens = sequence(1, batch=3)
    store = DiskTaps(tmp_path)
    fill(open_record(store, tokens), tokens)
    paths = sorted(tmp_path.glob("*.taps"))
    whole = {path: path.read_bytes() for path in paths}
    paths[0].write_bytes(whole[paths[0]][:-100])
    paths[1].write_bytes(b"")
    again = open_record(DiskTaps(tmp_path), tokens)
    assert len(again.rows or []) == 2
    fill(again, tokens)
    assert_holds(again, tokens)
    assert {path: path.read_bytes() for path in paths} == whole
    assert open_record(DiskTaps(tmp_path), tokens).rows == []


def test_a_frozen_pass_that_fails_leaves_nothing(tmp_path):
    tokens = sequence(1, batch=2)
    store = DiskTaps(tmp_path)
    record = open_record(store, tokens)
    record.write(0, states_of(tokens)[0])
    assert names(tmp_path) == [".json", ".part", ".part"]
    record.discard()
    assert names(tmp_path) == [".json"]
    record = open_record(store, tokens)
    assert record.rows == [0, 1]
    record.write(0, states_of(tokens)[0])
    del record
    assert names(tmp_path) == [".json"]


def test_two_that_write_the_same_sequence_both_have_it(tmp_path):
    tokens = sequence(1)
    one, two = (open_record(DiskTaps(tmp_path), tokens) for _ in range(2))
    assert one.rows == two.rows == [0]
    fill(one, tokens)
    fill(two, tokens)
    assert_holds(one, tokens)
    assert_holds(two, tokens)
    assert names(tmp_path) == [".json", ".taps"]


def test_the_cache_is_bounded(tmp_path):
    size = EntryLayout("ab" * 32, PLAN, LENGTH).size
    base = len(json.dumps({"format": "", "base": "", "fingerprint": ""})) + 200
    limit = 2 * size + base
    store = DiskTaps(tmp_path, limit=limit)
    for seed in (1, 2):
        fill(open_record(store, sequence(seed)), sequence(seed))
    with pytest.warns(TapWarning, match=r"tap cache holds .* training goes on.* are not kept"):
        record = open_record(store, sequence(3))
    fill(record, sequence(3))
    assert_holds(record, sequence(3))
    assert is_file_mapped(record[2])
    # Said once; those that are there are used.
    record = open_record(store, sequence(4))
    fill(record, sequence(4))
    assert_holds(record, sequence(4))
    assert open_record(store, sequence(1)).rows == []
    assert open_record(store, sequence(3)).rows == [0]
    assert names(tmp_path) == [".json", ".taps", ".taps"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit


def test_files_in_the_making_count(tmp_path):
    size = EntryLayout("ab" * 32, PLAN, LENGTH).size
    store = DiskTaps(tmp_path, limit=2 * size)
    tokens = sequence(1, batch=3)
    with pytest.warns(TapWarning, match="tap cache holds"):
        record = open_record(store, tokens)
    fill(record, tokens)
    assert_holds(record, tokens)
    assert names(tmp_path) == [".json", ".taps"]


# Whose folder it is ---------------------------------------------------------------------------


def test_a_folder_is_of_one_base(tmp_path):
    store = DiskTaps(tmp_path)
    fill(open_record(store, sequence(1)), sequence(1))
    found = json.loads((tmp_path / "base.json").read_text())
    assert found == {
        "format": "ladder_kernels taps", "base": "some/base", "fingerprint": "f" * 64,
    }  # fmt: skip
    other = make_plan(fingerprint="e" * 64, base="another/base")
    message = r"taps of some/base \(fingerprint ffffffffffff\), not of another/base \(fing.* eeee"
    for again in (store, DiskTaps(tmp_path)):
        with pytest.raises(BaseMismatchError, match=message):
            again.check(other.fingerprint, other.base)
        with pytest.raises(BaseMismatchError, match=message):
            open_record(again, sequence(1), other)
    assert open_record(DiskTaps(tmp_path), sequence(1)).rows == []


def test_a_base_without_fingerprint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="some/base has no fingerprint"):
        open_record(DiskTaps(tmp_path / "new"), sequence(1), make_plan(fingerprint=""))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a readable JSON"), ("[]", "something else"), ('{"a": 1}', "something else")],
)
def test_a_folder_of_something_else_is_refused(content, message, tmp_path):
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_record(DiskTaps(tmp_path), sequence(1))
    assert names(tmp_path) == [".json"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: no folder that taps can be kept in \(Not a"):
        open_record(DiskTaps(tmp_path / "file"), sequence(1))


# Faults of the world --------------------------------------------------------------------------


@pytest.fixture
def file_limit() -> Iterator[Any]:
    """``file_limit(n)``: no file of this process grows beyond ``n`` bytes, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_from_the_start(tmp_path, file_limit):
    store = DiskTaps(tmp_path)
    fill(open_record(store, sequence(1)), sequence(1))
    file_limit(1000)
    tokens = torch.cat([sequence(1), sequence(2, batch=2)])
    with pytest.warns(TapWarning, match=r"cannot be written \(File too large\); training goes on"):
        record = open_record(store, tokens)
    assert record.rows == [1, 2]
    fill(record, tokens)
    assert_holds(record, tokens)
    fill(open_record(store, sequence(3)), sequence(3))  # said once
    assert open_record(store, sequence(1)).rows == []
    assert names(tmp_path) == [".json", ".taps"]


def test_no_room_for_the_folders_own_file(tmp_path, file_limit):
    file_limit(0)
    store = DiskTaps(tmp_path / "new")
    with pytest.warns(TapWarning, match="cannot be written"):
        record = open_record(store, sequence(1))
    fill(record, sequence(1))
    assert_holds(record, sequence(1))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_no_room_in_the_middle(layer, tmp_path, file_limit):
    """What is written stays readable, what comes after waits in memory, and no file is left."""
    store = DiskTaps(tmp_path)
    tokens = sequence(1, batch=2)
    record = open_record(store, tokens)
    for place, state in enumerate(states_of(tokens)):
        if place < layer:
            record.write(place, state)
    offset = EntryLayout("ab" * 32, PLAN, LENGTH).places[[0, 2, 2, 3, -1][layer]][0].offset
    file_limit(offset + 100)  # a write may be cut short before one fails
    with pytest.warns(TapWarning, match="cannot be written"):
        finish(record, tokens, layer)
    assert_holds(record, tokens)
    assert names(tmp_path) == [".json"]


def in_a_process(code: str, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    root = Path(ladder_kernels.__file__).parents[1]
    path = os.pathsep.join((str(root), str(Path(__file__).parent)))
    return subprocess.Popen(
        [*before, sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


FILL_A_DISK = """
import sys, warnings
from pathlib import Path
from test_taps_disk import *
folder = Path(sys.argv[1])
warnings.simplefilter("always")
store = DiskTaps(folder)
kept = []
with warnings.catch_warnings(record=True) as said:
    for seed in range(12):
        tokens = sequence(seed)
        record = open_record(store, tokens)
        fill(record, tokens)
        assert_holds(record, tokens)
        kept.append(open_record(store, tokens).rows == [])
again = [open_record(DiskTaps(folder), sequence(seed)).rows == [] for seed in range(12)]
assert again == kept, (again, kept)
assert kept[0] and not kept[-1], kept
assert len(said) == 1, [str(each.message) for each in said]
assert "No space left on device" in str(said[0].message), said[0].message
assert not list(folder.glob("*.part"))
print("went on")
"""


def can_mount() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a file system of its own to fill")
def test_the_disk_is_full(tmp_path):
    """A real file system of 100 kB, which several sequences fill in the middle of one."""
    mount = f'mount -t tmpfs -o size=100k tmpfs {tmp_path} && exec "$@"'
    before = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    process = in_a_process(FILL_A_DISK, str(tmp_path), before=before)
    out, _ = process.communicate(timeout=120)
    assert (process.returncode, out.splitlines()[-1:]) == (0, ["went on"]), out


WRITE_AND_WAIT = """
import sys, time
from test_taps_disk import *
store = DiskTaps(sys.argv[1])
fill(open_record(store, sequence(1)), sequence(1))
record = open_record(store, sequence(2))
for layer, state in enumerate(states_of(sequence(2))[:4]):
    record.write(layer, state)
print("half", flush=True)
time.sleep(3600)
"""


def test_killed_while_writing(tmp_path):
    process = in_a_process(WRITE_AND_WAIT, str(tmp_path))
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        assert names(tmp_path) == [".json", ".part", ".taps"]
        # Another process leaves alone what one that lives is writing.
        assert open_record(DiskTaps(tmp_path), sequence(1)).rows == []
        assert names(tmp_path) == [".json", ".part", ".taps"]
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert names(tmp_path) == [".json", ".part", ".taps"]
    tokens = torch.cat([sequence(1), sequence(2)])
    record = open_record(DiskTaps(tmp_path), tokens)
    assert record.rows == [1]
    assert len(list(tmp_path.glob("*.part"))) == 1  # this record's own; the other is removed
    fill(record, tokens)
    assert_holds(record, tokens)
    assert names(tmp_path) == [".json", ".taps", ".taps"]
