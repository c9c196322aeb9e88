"""The native rung merge against float64, in every instruction set variant that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.errors import BackendError
from ladder_kernels.ops.rung_merge import cpu, reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["sum", "gate", "channel"]
EPS = 1e-6


def plain(side, taps, downs, gate):
    """Design section 3, written down in the dtype of the side stream."""
    projected = 0
    for tap, down in zip(taps, downs, strict=True):
        tap = tap.to(side.dtype)
        projected = projected + tap * torch.rsqrt(tap.pow(2).mean(-1, keepdim=True) + EPS) @ down.T
    return side + projected if gate is None else gate * side + (1 - gate) * projected


class Case:
    """Random arguments of one call."""

    def __init__(self, dtype, tap_dtypes, mode, T, d, widths, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def make(rows, columns, to):
            # Rows further apart than they are long, which begin wherever they do.
            return torch.randn(rows, columns + 3, generator=generator).to(to)[:, 1 : columns + 1]

        self.dtype, self.mode = dtype, mode
        self.side, self.grad = make(T, d, dtype), make(T, d, dtype)
        self.taps = [make(T, width, to) * 4 for width, to in zip(widths, tap_dtypes, strict=True)]
        self.downs = [(make(d, width, torch.float32) / width**0.5).to(dtype) for width in widths]
        gates = {"sum": 0, "gate": 1, "channel": d}[mode]
        self.gate = torch.rand(gates, generator=generator).to(dtype) if gates else None

    def forward(self, module=cpu):
        return module.rung_merge(self.side, self.taps, self.downs, self.gate, self.mode, EPS)

    def backward(self, module=cpu, side=True, downs=True, gate=True):
        arguments = (self.side, self.taps, self.downs, self.gate, self.mode, EPS)
        needs = (side, [downs] * len(self.downs), gate)
        return module.rung_merge_backward(self.grad, *arguments, *needs)

    def expected(self, to):
        """The output and the gradients of side, downs and gate, in a dtype."""
        leaves = [
            t.detach().to(to).requires_grad_()
            for t in (self.side, *self.downs, self.gate)
            if t is not None
        ]
        downs = leaves[1 : 1 + len(self.downs)]
        gate = None if self.gate is None else leaves[-1]
        out = plain(leaves[0], [tap.to(to) for tap in self.taps], downs, gate)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(to))]

    def check(self, assert_as_accurate):
        out = self.forward()
        dside, ddowns, dgate = self.backward()
        actual = [out, dside, *ddowns, *([] if self.gate is None else [dgate])]
        same, exact = self.expected(self.dtype), self.expected(torch.float64)
        for ours, theirs, true in zip(actual, same, exact, strict=True):
            assert ours.dtype == self.dtype
            if true.numel() >= 64:  # a maximum over fewer numbers is luck
                assert_as_accurate(ours, theirs, true)
        if self.mode == "gate":
            # One sum over all tokens and channels, whose terms may cancel.
            taps, downs = ([t.double() for t in ts] for ts in (self.taps, self.downs))
            z = plain(torch.zeros_like(self.side, dtype=torch.float64), taps, downs, None)
            terms = self.grad.double() * (self.side.double() - z)
            allowed = torch.finfo(self.dtype).eps * exact[-1].abs() + 1e-6 * terms.abs().sum()
            assert (dgate.double() - exact[-1]).abs() <= allowed


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    taps=st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 200)), min_size=1, max_size=3),
    mode=st.sampled_from(MODES),
    T=st.integers(1, 100),
    d=st.integers(1, 80),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(assert_as_accurate, use_isa, isa, dtype, taps, mode, T, d, seed):
    use_isa(isa)
    dtypes, widths = zip(*taps, strict=True)
    Case(dtype, dtypes, mode, T, d, widths, seed).check(assert_as_accurate)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tap_dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 8])
def test_the_gate_of_few_tokens(assert_as_accurate, use_isa, isa, dtype, tap_dtype, T):
    """Also where side and what it is merged with nearly cancel: seed 15 does, of one token."""
    use_isa(isa)
    for seed in range(12, 20):
        widths = (131, 131, 126)
        Case(dtype, [tap_dtype] * 3, "gate", T, 1, widths, seed).check(assert_as_accurate)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("T", "d", "widths"),
    [(900, 36, (840,)), (5, 50, (900, 830)), (40, 1050, (64, 830)), (2100, 20, (96,))],
)
def test_more_than_one_slice_or_piece(assert_as_accurate, use_isa, isa, dtype, mode, T, d, widths):
    use_isa(isa)
    Case(dtype, [torch.bfloat16] * len(widths), mode, T, d, widths).check(assert_as_accurate)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 8, 9, 1000])
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, dtype, T):
    use_isa(isa)
    case = Case(dtype, DTYPES[:2], "channel", T, 72, (576, 500))
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        dside, ddowns, dgate = case.backward()
        results.append([case.forward(), dside, *ddowns, dgate])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_float32_inside(use_isa, isa):
    """A narrow side stream does not narrow what happens before its one rounding."""
    use_isa(isa)
    for T in (4, 60):
        case = Case(torch.bfloat16, [torch.float32] * 2, "gate", T, 48, (300, 500))
        for ours, exact in zip(
            [case.forward(), *case.backward()[1]],
            [case.forward(reference), *case.backward(reference)[1]],
            strict=True,
        ):
            assert (ours == exact).float().mean() > 0.98  # but for borders of rounding
            torch.testing.assert_close(ours, exact, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("T", [6, 30])
def test_nan_and_infinity_stay_in_their_row(use_isa, isa, bad, T):
    use_isa(isa)
    case = Case(torch.float32, [torch.bfloat16], "gate", T, 20, (90,))
    case.taps[0][3, 7] = bad
    assert case.forward().isnan().all(1).nonzero().flatten().tolist() == [3]
    assert torch.equal(case.forward().isnan(), case.forward(reference).isnan())


def test_only_what_is_needed():
    case = Case(torch.float32, [torch.float32] * 2, "channel", 40, 8, (16, 24))
    wanted = case.backward()
    dside, ddowns, dgate = case.backward(side=False, downs=False)
    assert (dside.shape, [d.shape for d in ddowns]) == ((0,), [(0,), (0,)])
    assert torch.equal(dgate, wanted[2])
    dside, ddowns, dgate = case.backward(gate=False)
    assert dgate.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(ddowns, wanted[1], strict=True))
    _, ddowns, _ = case.backward(side=False, downs=False, gate=False)
    assert [d.shape for d in ddowns] == [(0,), (0,)]


@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode):
    case = Case(torch.bfloat16, [torch.float32], mode, 0, 8, (16,))
    assert case.forward().shape == (0, 8)
    dside, ddowns, dgate = case.backward()
    assert dside.shape == (0, 8)
    assert torch.equal(ddowns[0], torch.zeros_like(case.downs[0]))
    assert (dgate == 0).all()


def test_nothing_to_project():
    case = Case(torch.float32, [torch.float32], "gate", 12, 8, (0,))
    torch.testing.assert_close(case.forward(), case.forward(reference))
    torch.testing.assert_close(case.backward(), case.backward(reference))


def test_no_temporaries(recorder):
    side, grad, gate = torch.randn(512, 8), torch.randn(512, 8), torch.rand(1)
    taps, downs = [torch.randn(512, 64) for _ in range(3)], [torch.randn(8, 64) for _ in range(3)]
    with recorder:
        cpu.rung_merge(side, taps, downs, gate, "gate", EPS)
    assert recorder.peak == 4 * 512 * 8
    with recorder:
        cpu.rung_merge_backward(grad, side, taps, downs, gate, "gate", EPS, True, [True] * 3, True)
    assert recorder.largest == 512 * 8


def test_the_operation_uses_it():
    case = Case(torch.float32, [torch.bfloat16], "gate", 60, 24, (96,))
    leaves = [t.detach().clone().requires_grad_() for t in (case.side, case.downs[0], case.gate)]
    out = ops.rung_merge(leaves[0], case.taps, [leaves[1]], leaves[2])
    assert torch.equal(out, case.forward())
    grads = torch.autograd.grad(out, leaves, case.grad)
    dside, ddowns, dgate = case.backward()
    assert all(torch.equal(a, b) for a, b in zip(grads, (dside, *ddowns, dgate), strict=True))


def test_wide_taps_of_a_narrow_side_are_refused():
    case = Case(torch.float32, [torch.float64], "sum", 6, 4, (8,))
    assert cpu.unsupported(case.side, case.taps) == (
        "there is no native kernel for taps of torch.float64"
    )
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="taps of torch"):
        ops.rung_merge(case.side, case.taps, case.downs, None, "sum")
