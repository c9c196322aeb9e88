from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ladder_kernels import ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.ops.rung_merge import reference

pytestmark = pytest.mark.usefixtures("reference_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["sum", "gate", "channel"]


def plain(side, taps, downs, gate, mode, eps=1e-6):
    """Design section 3, written down in the dtype of the side stream."""
    projected = 0
    for tap, down in zip(taps, downs, strict=True):
        tap = tap.to(side.dtype)
        projected = projected + tap * torch.rsqrt(tap.pow(2).mean(-1, keepdim=True) + eps) @ down.T
    return side + projected if mode == "sum" else gate * side + (1 - gate) * projected


def make_gate(mode, width, dtype, generator=None):
    shape = {"sum": None, "gate": (1,), "channel": (width,)}[mode]
    return None if shape is None else torch.rand(shape, generator=generator).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tap_dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    leading=st.lists(st.integers(0, 6), min_size=0, max_size=2),
    narrow=st.integers(1, 9),
    wide=st.integers(1, 40),
    taps=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@example(  # a gate's gradient that is small beside its terms
    dtype=torch.float32,
    tap_dtype=torch.bfloat16,
    mode="gate",
    leading=[],
    narrow=6,
    wide=21,
    taps=2,
    seed=49,
)
def test_values_and_gradients(
    assert_as_accurate, dtype, tap_dtype, mode, leading, narrow, wide, taps, seed
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, to=dtype):
        return torch.randn(*shape, generator=generator).to(to)

    side, grad = make(*leading, narrow), make(*leading, narrow)
    read = [make(*leading, wide, to=tap_dtype) * 5 for _ in range(taps)]
    downs = [make(narrow, wide) for _ in range(taps)]
    gate = make_gate(mode, narrow, dtype, generator)

    def compute(function, to):
        leaves = [t.detach().to(to).requires_grad_() for t in (side, *downs, gate) if t is not None]
        weights = leaves[1 : 1 + taps]
        # float64 must see the taps as they are, and so must a narrow same-dtype expression
        inputs = [tap.to(to) if function is plain else tap for tap in read]
        out = function(leaves[0], inputs, weights, None if gate is None else leaves[-1], mode)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    actual = compute(ops.rung_merge, dtype)
    same = compute(plain, dtype)
    exact = compute(plain, torch.float64)
    for ours, theirs, true in zip(actual, same, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_accurate(ours, theirs, true)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("taps", [1, 3])
def test_gradcheck(mode, taps):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    read = [torch.randn(2, 3, 6, dtype=torch.float64) for _ in range(taps)]
    gate = make_gate(mode, 4, torch.float64)
    trained = [make(2, 3, 4), *[make(4, 6) for _ in range(taps)]]
    if gate is not None:
        trained.append(gate.requires_grad_())

    def merge(side, *rest):
        return ops.rung_merge(
            side, read, rest[:taps], rest[taps] if gate is not None else None, mode
        )

    assert gradcheck(merge, trained)


def test_scalar_gate_of_no_dimension():
    side, tap, down = torch.randn(5, 4), torch.randn(5, 8), torch.randn(4, 8)
    gate = torch.tensor(0.3, requires_grad=True)
    out = ops.rung_merge(side, [tap], [down], gate)
    assert torch.equal(out, ops.rung_merge(side, [tap], [down], torch.tensor([0.3])))
    out.sum().backward()
    assert gate.grad.shape == ()


def test_taps_are_constants():
    side = torch.randn(5, 4, requires_grad=True)
    tap = torch.randn(5, 8, requires_grad=True)
    ops.rung_merge(side, [tap], [torch.randn(4, 8)], None, "sum").sum().backward()
    assert tap.grad is None
    assert torch.equal(side.grad, torch.ones(5, 4))


def test_only_the_gradients_asked_for():
    side, tap = torch.randn(5, 4), torch.randn(5, 8)
    downs = [torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)]
    gate = torch.rand(4)
    ops.rung_merge(side, [tap, tap], downs, gate, "channel").sum().backward()
    assert downs[0].grad is not None
    assert downs[1].grad is None
    assert side.grad is None
    assert gate.grad is None


def test_a_free_rung_is_the_side_stream_itself():
    side = torch.randn(5, 4)
    assert ops.rung_merge(side, [], [], None, "sum") is side
    assert ops.rung_merge(side, [], [], torch.rand(1), "gate") is side


def test_blocks_of_rows_give_one_result(monkeypatch):
    side, gate = torch.randn(50, 4), torch.rand(4)
    taps, downs = [torch.randn(50, 8).bfloat16()], [torch.randn(4, 8)]
    whole = reference.rung_merge(side, taps, downs, gate, "channel", 1e-6)
    needs = (True, [True], True)
    grads = reference.rung_merge_backward(side, side, taps, downs, gate, "channel", 1e-6, *needs)
    monkeypatch.setattr(reference, "TOKENS", 7)
    torch.testing.assert_close(
        reference.rung_merge(side, taps, downs, gate, "channel", 1e-6), whole
    )
    torch.testing.assert_close(
        reference.rung_merge_backward(side, side, taps, downs, gate, "channel", 1e-6, *needs), grads
    )


def test_normalised_taps_are_never_whole(recorder, monkeypatch):
    monkeypatch.setattr(reference, "TOKENS", 32)
    side, gate = torch.randn(512, 4), torch.rand(1)
    taps, downs = [torch.randn(512, 64) for _ in range(3)], [torch.randn(4, 64) for _ in range(3)]
    with recorder:
        reference.rung_merge(side, taps, downs, gate, "gate", 1e-6)
        reference.rung_merge_backward(
            side, side, taps, downs, gate, "gate", 1e-6, True, [True] * 3, True
        )
    assert recorder.peak < 4 * 512 * 64


def test_saved_tensors_are_inputs_only():
    side, gate = torch.randn(16, 4, requires_grad=True), torch.rand(1, requires_grad=True)
    tap, down = torch.randn(16, 64), torch.randn(4, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), id):
        ops.rung_merge(side, [tap], [down], gate)
    assert set(saved) <= {t.data_ptr() for t in (side, gate, tap, down)}


def test_autocast_casts_what_is_trained():
    side, tap, down, gate = (torch.randn(*s) for s in ((5, 4), (5, 8), (4, 8), (1,)))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.rung_merge(side, [tap], [down], gate)
    narrow = ops.rung_merge(side.bfloat16(), [tap], [down.bfloat16()], gate.bfloat16())
    assert torch.equal(out, narrow)


SIDE, TAP, DOWN = torch.ones(5, 4), torch.ones(5, 8), torch.ones(4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SIDE, [TAP], [DOWN], None, "add"), "mode is 'add'; allowed are 'sum', 'gate' and"),
        ((SIDE, [TAP], [DOWN], None, "gate"), r"gate is None; mode 'gate' needs"),
        ((SIDE, [TAP], [DOWN], None, "channel"), r"gate is None; mode 'channel' needs .* \[4\]"),
        ((SIDE, [TAP], [DOWN], torch.ones(1), "sum"), "gate is given; mode 'sum' takes None"),
        ((SIDE, [TAP], [DOWN], torch.ones(4), "gate"), r"gate has shape \[4\]; mode 'gate' needs"),
        (
            (SIDE, [TAP], [DOWN], torch.ones(1), "channel"),
            r"gate has shape \[1\]; it must be \[4\]",
        ),
        ((SIDE, [TAP], [DOWN], torch.ones(1).half(), "gate"), "gate has dtype torch.float16"),
        ((SIDE, [TAP, TAP], [DOWN], None, "sum"), "downs has 1 entries; it must have 2"),
        ((SIDE, TAP, [DOWN], None, "sum"), "taps is a Tensor; it must be a sequence"),
        ((SIDE, [TAP], DOWN, None, "sum"), "downs is a Tensor; it must be a sequence"),
        ((SIDE, [TAP[:4]], [DOWN], None, "sum"), r"taps\[0\] has shape \[4, 8\]; .*\[5, 'D'\]"),
        ((SIDE, [TAP.int()], [DOWN], None, "sum"), r"taps\[0\] has dtype torch.int32"),
        ((SIDE, [TAP], [DOWN.T], None, "sum"), r"downs\[0\] has shape \[8, 4\]; .*\[4, 8\]"),
        ((SIDE, [TAP], [DOWN.half()], None, "sum"), r"downs\[0\] has dtype torch.float16"),
        ((SIDE, [TAP.to("meta")], [DOWN], None, "sum"), r"taps\[0\] is on device meta"),
        ((SIDE.int(), [TAP], [DOWN], None, "sum"), "side has dtype torch.int32"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ops.rung_merge(*arguments)
