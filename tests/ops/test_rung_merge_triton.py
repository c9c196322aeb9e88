"""The Triton merge of a rung against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import interpreting
from ladder_kernels.errors import BackendError
from ladder_kernels.ops import _triton
from ladder_kernels.ops.rung_merge import gpu, reference
from tests.ops.triton_support import interpreting_amid_poison

# The interpreter computes no products of bfloat16.
DTYPES = [torch.float32, torch.float16]
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


def use_small_tiles(module, patch):
    """Several programs along each dimension of what tests can afford."""
    small = module._Tile(16, 16, 32, 4, 2)
    for table in ("_FORWARD", "_PRODUCT"):
        patch.setattr(module, table, {key: {"": small} for key in (False, True)})
    patch.setattr(module, "_ROWWISE", small)
    patch.setattr(module, "_PROGRAMS", 8)


def check(assert_as_accurate, module, grad, side, taps, downs, gate, mode):
    """Everything that ``module`` computes, against float64."""

    def expected(to):
        leaves = [t.detach().to(to).requires_grad_() for t in (side, *downs, gate) if t is not None]
        inputs, weights = [tap.to(to) for tap in taps], leaves[1 : 1 + len(taps)]
        out = plain(leaves[0], inputs, weights, None if gate is None else leaves[-1], mode)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    arguments = side, taps, downs, gate, mode, 1e-6
    needs = True, [True] * len(taps), gate is not None
    out = module.rung_merge(*arguments)
    dside, ddowns, dgate = module.rung_merge_backward(grad, *arguments, *needs)
    actual = [out, dside, *ddowns, *([] if gate is None else [dgate])]
    same, exact = expected(side.dtype), expected(torch.float64)
    for ours, theirs, true in zip(actual, same, exact, strict=True):
        assert ours.dtype == side.dtype
        assert_as_accurate(ours, theirs, true)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    tap_dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    leading=st.lists(st.integers(0, 7), min_size=0, max_size=2),
    narrow=st.integers(1, 35),
    wides=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    first_column=st.integers(0, 3),
    programs=st.sampled_from([1, 8, 256]),
    seed=st.integers(0, 2**31),
)
@example(  # a gate's gradient that is small beside its terms
    dtype=torch.float32,
    tap_dtype=torch.float16,
    mode="gate",
    leading=[],
    narrow=6,
    wides=[21, 21],
    first_column=0,
    programs=256,
    seed=49,
)
def test_values_and_gradients(
    assert_as_accurate,
    dtype,
    tap_dtype,
    mode,
    leading,
    narrow,
    wides,
    first_column,
    programs,
    seed,
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, to=dtype):
        wide = torch.randn(*shape[:-1], shape[-1] + 4, generator=generator).to(to)
        return wide[..., first_column : first_column + shape[-1]]

    side, grad = make(*leading, narrow), make(*leading, narrow)
    read = [make(*leading, wide, to=tap_dtype) * 5 for wide in wides]
    downs = [make(narrow, wide) for wide in wides]
    gate = make_gate(mode, narrow, dtype, generator)

    with interpreting_amid_poison() as patch:
        use_small_tiles(gpu, patch)
        patch.setattr(gpu, "_PROGRAMS", programs)
        check(assert_as_accurate, gpu, grad, side, read, downs, gate, mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_as_shipped(assert_as_accurate, dtype):
    side, tap, down = torch.randn(70, 72), torch.randn(70, 200), torch.randn(72, 200)
    side, tap, down, gate = (x.to(dtype) for x in (side, tap, down, torch.tensor(0.3)))
    with interpreting_amid_poison():
        check(assert_as_accurate, gpu, side.flip(0), side, [tap], [down], gate, "gate")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_through_the_operation(mode):
    side, tap, down = torch.randn(2, 5, 6), torch.randn(2, 5, 9), torch.randn(6, 9)
    gate = make_gate(mode, 6, torch.float32)

    def compute():
        leaves = [t.detach().requires_grad_() for t in (side, down, gate) if t is not None]
        taken = None if gate is None else leaves[2]
        out = ops.rung_merge(leaves[0], [tap], [leaves[1]], taken, mode)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    with interpreting():
        actual = compute()
    for ours, theirs in zip(actual, compute(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_the_gradients_asked_for():
    side, gate = torch.randn(3, 4), torch.rand(1)
    taps, downs = [torch.randn(3, 8), torch.randn(3, 5)], [torch.randn(4, 8), torch.randn(4, 5)]
    arguments = side, side, taps, downs, gate, "gate", 1e-6
    launched = []
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        everything = gpu.rung_merge_backward(*arguments, True, [True, True], True)
        one = gpu.rung_merge_backward(*arguments, False, [False, True], False)
        launch = _triton.launch
        patch.setattr(
            _triton, "launch", lambda *a, **o: (launched.append(a[0].__name__), launch(*a, **o))
        )
        nothing = gpu.rung_merge_backward(*arguments, False, [False, False], False)
    assert [value.numel() for value in (one[0], one[1][0], one[2])] == [0, 0, 0]
    assert torch.equal(one[1][1], everything[1][1])
    assert [value.numel() for value in (nothing[0], *nothing[1], nothing[2])] == [0, 0, 0, 0]
    assert launched == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tokens", "narrow"), [(0, 4), (3, 0)])
def test_nothing_to_do(mode, tokens, narrow):
    side, tap, down = torch.randn(tokens, narrow), torch.randn(tokens, 8), torch.randn(narrow, 8)
    gate = make_gate(mode, narrow, torch.float32)
    needs = (True, [True], gate is not None)
    with interpreting():
        out = gpu.rung_merge(side, [tap], [down], gate, mode, 1e-6)
        actual = gpu.rung_merge_backward(side, side, [tap], [down], gate, mode, 1e-6, *needs)
    wanted = reference.rung_merge_backward(side, side, [tap], [down], gate, mode, 1e-6, *needs)
    assert out.shape == (tokens, narrow)
    assert torch.equal(actual[0], wanted[0])
    assert torch.equal(actual[1][0], wanted[1][0])
    assert torch.equal(actual[2], wanted[2])


def test_gate_gradient_that_is_small_beside_its_terms(assert_as_accurate, broken):
    tap, down, grad = torch.randn(60, 40).half(), torch.randn(20, 40).half(), torch.randn(60, 20)
    side = reference.rung_merge(torch.zeros(60, 20), [tap], [down.float()], None, "sum", 1e-6)
    side, grad, gate = (side * 1.02).half(), grad.half(), torch.rand(1).half()

    def dgate(module, to):
        values = (grad.to(to), side.to(to), [tap.to(to)], [down.to(to)], gate.to(to))
        return module.rung_merge_backward(*values, "gate", 1e-6, False, [False], True)[2]

    wrong_gpu = broken(gpu, "product = tl.dot(tl.trans(low), x, product)", "pass")
    with interpreting():
        actual, wrong = dgate(gpu, torch.float16), dgate(wrong_gpu, torch.float16)
    same, exact = dgate(reference, torch.float16), dgate(reference, torch.float64)
    assert_as_accurate(actual, same, exact)
    with pytest.raises(AssertionError):
        assert_as_accurate(wrong, same, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(monkeypatch, dtype):
    use_small_tiles(gpu, monkeypatch)
    side, gate = torch.randn(50, 20).to(dtype), torch.rand(20).to(dtype)
    taps = [torch.randn(50, 40).to(dtype), torch.randn(50, 34).to(dtype)]
    downs = [torch.randn(20, 40).to(dtype), torch.randn(20, 34).to(dtype)]
    arguments = taps, downs, gate, "channel", 1e-6

    def compute():
        out = gpu.rung_merge(side, *arguments)
        dside, ddowns, dgate = gpu.rung_merge_backward(
            out, side, *arguments, True, [True, True], True
        )
        return out, dside, *ddowns, dgate

    with interpreting():
        first, second = compute(), compute()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_temporary_as_large_as_a_tap(recorder, monkeypatch):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: None)
    tokens, wide, narrow = 2048, 2048, 64
    side, gate = torch.randn(tokens, narrow), torch.rand(1)
    taps = [torch.randn(tokens, wide) for _ in range(3)]
    downs = [torch.randn(narrow, wide) for _ in range(3)]
    with recorder:
        gpu.rung_merge(side, taps, downs, gate, "gate", 1e-6)
    assert recorder.peak == 4 * tokens * narrow * 2  # the result, and the sum so far
    recorder.peak = 0
    with recorder:
        gpu.rung_merge_backward(side, side, taps, downs, gate, "gate", 1e-6, True, [True] * 3, True)
    results = 4 * (tokens * narrow + 3 * narrow * wide)
    tile = gpu._PRODUCT[True][""]
    splits = gpu._PROGRAMS * 4 * tile.narrow * tile.wide
    assert recorder.peak <= results + splits + 8 * (gpu._PROGRAMS * 128 + tokens)
    assert recorder.largest < tokens * wide


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("/ D + eps", "/ (D + 1) + eps"),
        ("left = along < D - start", "left = along < D"),
        ("(stream - product)", "(stream + product)"),
        ("product += tl.load(carried", "product = tl.load(carried"),
        ("split * share + tl", "split * TOKENS + tl"),
        ("(channel + split * d) * D", "channel * D"),
        ("factor = 1.0 - tl.load(", "factor = tl.load("),
        ("(e * kept[None, :])", "e"),
        ("dgate -= crossed", "dgate += crossed"),
    ],
)
def test_a_wrong_kernel_is_found(assert_as_accurate, monkeypatch, broken, right, wrong):
    wrong_gpu = broken(gpu, right, wrong)
    use_small_tiles(wrong_gpu, monkeypatch)
    with interpreting_amid_poison(), pytest.raises(AssertionError):
        check(assert_as_accurate, wrong_gpu, *for_wrong_kernels())


def test_the_right_kernel_passes_for_right(assert_as_accurate, monkeypatch):
    use_small_tiles(gpu, monkeypatch)
    with interpreting():
        check(assert_as_accurate, gpu, *for_wrong_kernels())


def for_wrong_kernels():
    def make(*shape):
        return torch.randn(shape).half()

    taps, downs = [make(40, 40), make(40, 40)], [make(20, 40), make(20, 40)]
    return make(40, 20), make(40, 20), taps, downs, torch.rand(20).half(), "channel"


@pytest.mark.parametrize(
    ("side", "tap", "message"),
    [
        (torch.bfloat16, torch.bfloat16, "miscomputes matrix products of bfloat16"),
        (torch.float32, torch.bfloat16, "miscomputes matrix products of bfloat16"),
        (torch.float32, torch.float64, "not torch.float64"),
    ],
)
def test_dtypes_that_are_refused(side, tap, message):
    down = torch.ones(3, 4, dtype=side)
    with interpreting(), pytest.raises(BackendError, match=message):
        ops.rung_merge(
            torch.ones(2, 3, dtype=side), [torch.ones(2, 4, dtype=tap)], [down], None, "sum"
        )


def test_a_tap_without_channels_is_refused():
    with interpreting(), pytest.raises(BackendError, match="a tap has no channels"):
        ops.rung_merge(torch.ones(2, 3), [torch.ones(2, 0)], [torch.ones(3, 0)], None, "sum")
