"""How taps are encoded, and what a record hands out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_kernels.errors import ConfigError
from ladder_kernels.memory.tap_stores import tap_store_of
from ladder_kernels.memory.taps import HIDDEN, DeviceTaps, TapEncoding, TapPlan
from ladder_kernels.memory.taps_disk import DiskTaps
from ladder_kernels.memory.taps_host import HostTaps
from ladder_kernels.memory.tracing import fake_cuda
from ladder_kernels.nn.attention import SequenceLayout

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def make_plan(**options) -> TapPlan:
    values = {
        "layers": (0, 2, 3), "stop": 4, "width": 8, "encoding": TapEncoding(torch.float32),
        "dtype": torch.float32, "device": torch.device("cpu"), "fingerprint": "f" * 64,
        "base": "some/base",
    }  # fmt: skip
    return TapPlan(**{**values, **options})


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    width=st.integers(1, 700),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    seed=st.integers(0, 99),
)
def test_int8_rounds_to_the_nearest_of_255_steps(leading, width, dtype, seed):
    state = torch.randn(*leading, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    encoding = TapEncoding(torch.int8)
    codes, scales = encoding.encode(state)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert [(t.dtype, t.shape[-1]) for t in (codes, scales)] == list(encoding.parts(width))
    most = state.double().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scales.double(), most / 127, rtol=1e-6, atol=0)
    if codes.numel():
        assert codes.abs().max() == 127
        nearest = (state.double() / scales.double()).round()
        off = (codes.double() - nearest).abs()
        assert off.max() <= 1
        # Only what float32 cannot tell from a tie may go the other way.
        ties = ((state.double() / scales.double()).frac().abs() - 0.5).abs()
        assert (ties[off > 0] < 1e-4).all()
    back = encoding.decode((codes, scales), torch.float64)
    assert ((back - state.double()).abs() <= scales * 0.5001).all()


def test_ties_go_to_the_even_step():
    state = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, _ = TapEncoding(torch.int8).encode(state)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_int8_of_zeros_tiny_numbers_and_no_numbers():
    state = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])
    encoding = TapEncoding(torch.int8)
    back = encoding.decode(encoding.encode(state), torch.float32)
    assert torch.equal(back[:2], torch.zeros(2, 2))
    assert back[2:].isnan().all()


def test_large_states_are_encoded_in_slices_with_the_same_bits(monkeypatch):
    state = torch.randn(3, 50, 16)
    encoding = TapEncoding(torch.int8)
    whole = encoding.encode(state)
    monkeypatch.setattr("ladder_kernels.memory.taps._NUMBERS_AT_ONCE", 7 * 16)
    sliced = encoding.encode(state)
    assert all(torch.equal(one, two) for one, two in zip(whole, sliced, strict=True))
    decoded = encoding.decode(sliced, torch.bfloat16)
    assert torch.equal(decoded, (whole[0].float() * whole[1]).bfloat16())


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_rounded_once(dtype):
    state = torch.randn(2, 5, 8)
    encoding = TapEncoding(dtype)
    (kept,) = encoding.encode(state)
    assert torch.equal(kept, state.to(dtype))
    assert encoding.decode((kept,), torch.float32) is kept
    assert encoding.bytes_per_token(8) == 8 * dtype.itemsize
    assert TapEncoding(torch.int8).bytes_per_token(8) == 12


def test_the_last_state_has_a_place_of_its_own_unless_a_tap_is_it():
    assert make_plan().slots == (0, 2, 3, HIDDEN)
    assert make_plan(layers=(0, 4)).slots == (0, 4)
    rounded = make_plan(layers=(0, 4), encoding=TapEncoding(torch.bfloat16))
    assert rounded.slots == (0, 4, HIDDEN)
    assert rounded.slots_of(4) == [4, HIDDEN]
    assert rounded.slots_of(1) == []
    assert rounded.encoding_of(HIDDEN).dtype == torch.float32


@pytest.fixture(params=["device", "host", "disk"])
def store(request, tmp_path):
    return tap_store_of(request.param, cache=tmp_path if request.param == "disk" else None)


@pytest.mark.parametrize("encoding", [*FLOATS, torch.int8])
def test_a_record_gives_back_what_was_written(store, encoding):
    plan = make_plan(encoding=TapEncoding(encoding), dtype=torch.bfloat16)
    tokens = torch.randint(0, 99, (2, 5))
    record = store.open(plan, tokens, SequenceLayout.build(2, 5))
    states = torch.randn(5, 2, 5, 8).bfloat16()
    with torch.inference_mode():
        buffer = states[0].clone()
        for layer in range(5):
            buffer.copy_(states[layer])
            record.write(layer, buffer)
    record.finish()
    assert (list(record), len(record), 2 in record, 1 in record) == ([0, 2, 3], 3, True, False)
    with pytest.raises(KeyError):
        record[1]
    for layer in (0, 2, 3, 3, 2, 0):
        expected = states[layer].to(encoding)
        if encoding == torch.int8:
            rounded = plan.encoding.encode(states[layer])
            expected = plan.encoding.decode(rounded, torch.bfloat16)
        assert torch.equal(record[layer], expected)
        assert not record[layer].is_inference()
    assert torch.equal(record.hidden, states[4])
    # Autograd may keep them.
    down = torch.randn(3, 8, dtype=record[2].dtype, requires_grad=True)
    (record[2] @ down.t()).sum().backward()
    assert down.grad is not None


def test_taps_wait_on_the_host_while_the_step_runs_on_a_gpu():
    """Traced: of three taps two at most are on the device, and the host's buffers are used again.

    Streams and events are for a GPU; what is alive where is the same without.
    """
    with fake_cuda() as device:
        plan = make_plan(device=device, dtype=torch.bfloat16, encoding=TapEncoding(torch.int8))
        store = HostTaps()
        layout = SequenceLayout.build(1, 6, device=device)
        addresses = []
        for _ in range(3):
            tokens = torch.zeros(1, 6, dtype=torch.int64, device=device)
            record: Any = store.open(plan, tokens, layout)
            for layer in range(5):
                state = torch.randn(1, 6, 8, device=device, dtype=torch.bfloat16)
                record.write(layer, state)
            record.finish()
            kept = [part for parts in record._kept.values() for part in parts]
            assert {part.device.type for part in kept} == {"cpu"}
            for layer in (0, 2, 3, 3, 2, 0):
                tap = record[layer]
                assert (tap.device.type, tap.dtype) == ("cuda", torch.bfloat16)
                assert len(record._ahead) <= 1
            assert record.hidden.device.type == "cuda"
            addresses.append({part.untyped_storage()._cdata for part in kept})
            del record, kept
        copies = store._copies[device]
        assert len(copies._free) == 7
        assert not copies._sent
        held = {buffer.untyped_storage()._cdata for buffer in copies._free}
        assert addresses == [held, held, held]


def test_buffers_of_batches_of_any_length_do_not_add_up():
    with fake_cuda() as device:
        plan = make_plan(device=device)
        store = HostTaps()
        for length in (5, 9, 3, 7, 12, 1):
            tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
            record = store.open(plan, tokens, SequenceLayout.build(1, length, device=device))
            for layer in range(5):
                record.write(layer, torch.zeros(1, length, 8, device=device))
            record.finish()
            del record
        assert [buffer.numel() for buffer in store._copies[device]._free] == [12 * 8 * 4] * 4


def test_a_copied_store_has_buffers_of_its_own():
    store = HostTaps()
    assert copy.deepcopy(store) is not store
    assert isinstance(copy.deepcopy(store), HostTaps)


def test_stores_by_name(tmp_path):
    assert isinstance(tap_store_of("device"), DeviceTaps)
    assert isinstance(tap_store_of("host"), HostTaps)
    disk = tap_store_of("disk", cache=tmp_path, limit=5)
    assert isinstance(disk, DiskTaps)
    assert (disk.folder, disk.limit) == (tmp_path, 5)
    assert tap_store_of(disk) is disk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": "tape"}, "taps: found 'tape'; allowed are 'device', 'host', 'disk'"),
        ({"taps": "disk"}, "tap_cache: found nothing"),
        ({"taps": "disk", "cache": "x", "limit": 0}, "tap_cache_bytes: found 0; it must be 1"),
        ({"taps": "host", "cache": "x"}, "tap_cache: found x, but taps are 'host'"),
        ({"taps": "device", "limit": 9}, "tap_cache_bytes: found 9, but taps are 'device'"),
    ],
)
def test_refused_stores(options, message):
    with pytest.raises(ConfigError, match=message):
        tap_store_of(**options)
