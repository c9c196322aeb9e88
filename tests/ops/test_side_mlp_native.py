"""The native side MLP against float64, in every instruction set variant that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.errors import BackendError
from ladder_kernels.native.tensors import DTYPES as TO_CODE
from ladder_kernels.native.tensors import library
from ladder_kernels.ops.side_mlp import cpu, reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def plain(u, norm_weight, gate, up, down):
    """The formula, written down in the dtype of the side stream."""
    x = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + EPS) * norm_weight
    return u + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


class Case:
    """Random arguments of one call."""

    def __init__(self, dtype, rows, width, inner, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def make(*shape):
            return torch.randn(shape, generator=generator)

        self.dtype = dtype
        # Rows further apart than they are long, which begin wherever they do.
        u, grad = (make(rows, width + 3)[:, 1 : width + 1] for _ in range(2))
        matrices = [make(inner, width), make(inner, width), make(width, inner)]
        scaled = [each / each.shape[1] ** 0.5 for each in matrices]
        self.inputs = [each.to(dtype) for each in (u, 1 + 0.1 * make(width), *scaled)]
        self.grad = grad.to(dtype)

    def forward(self, module=cpu):
        return module.side_mlp(*self.inputs, EPS)

    def backward(self, *needs, module=cpu):
        return module.side_mlp_backward(self.grad, *self.inputs, EPS, *(needs or (True,) * 3))

    def expected(self, to):
        leaves = [value.to(to).requires_grad_() for value in self.inputs]
        out = plain(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(to))]

    def check(self, assert_as_accurate):
        actual = [self.forward(), *self.backward()]
        same, exact = self.expected(self.dtype), self.expected(torch.float64)
        for ours, theirs, true in zip(actual, same, exact, strict=True):
            assert ours.dtype == self.dtype
            assert ours.is_contiguous()
            if true.numel() >= 64:  # a maximum over fewer numbers is luck
                assert_as_accurate(ours, theirs, true)


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 70),
    width=st.integers(8, 60),
    inner=st.integers(1, 90),
    seed=st.integers(0, 2**31),
)
def test_shapes(assert_as_accurate, use_isa, isa, rows, width, inner, seed):
    use_isa(isa)
    Case(torch.float32, rows, width, inner, seed).check(assert_as_accurate)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "inner"), [(93, 40, 66), (70, 33, 47), (700, 36, 96)])
def test_values_and_gradients(assert_as_accurate, use_isa, isa, dtype, rows, width, inner):
    """Enough numbers for the largest error of a half precision not to be luck; several tasks."""
    use_isa(isa)
    torch.set_num_threads(3)
    Case(dtype, rows, width, inner).check(assert_as_accurate)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_joins_the_halves_rounds_once(use_isa, isa, dtype):
    """Where gates saturate, too."""
    use_isa(isa)
    a = torch.cat((torch.linspace(-120, 120, 1001), torch.randn(1000))).to(dtype)
    b, f = torch.randn(2001).to(dtype), torch.randn(2001).to(dtype)
    wide = [value.double().requires_grad_() for value in (a, b)]
    joined = F.silu(wide[0]) * wide[1]
    da, db = torch.autograd.grad(joined, wide, f.double())
    lib, code = library(), TO_CODE[dtype]
    made = a.clone()
    assert lib.lk_swiglu(code, a.numel(), made.data_ptr(), b.data_ptr(), 2) == 0
    back = [value.clone() for value in (a, b, f)]
    pointers = (value.data_ptr() for value in back)
    assert lib.lk_swiglu_backward(code, a.numel(), *pointers, 2) == 0
    allowed = torch.finfo(dtype).eps / 2 + 2e-6
    joined = joined.detach()
    for found, exact in zip((made, *back), (joined, da, db, joined), strict=True):
        smallest = 2e-6 if dtype == torch.float16 else 1e-7
        assert ((found.double() - exact).abs() <= allowed * exact.abs() + smallest).all()


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_what_is_needed(needs):
    case = Case(torch.float32, 9, 16, 24)
    found = case.backward(*needs)
    wanted = (needs[0], needs[1], *[needs[2]] * 3)
    for value, full, want in zip(found, case.backward(), wanted, strict=True):
        assert torch.equal(value, full if want else torch.empty(0))


@pytest.mark.parametrize(("rows", "inner"), [(0, 8), (5, 0)])
def test_nothing_to_multiply(rows, inner):
    case = Case(torch.float32, rows, 16, inner)
    torch.testing.assert_close(case.forward(), case.forward(reference))
    torch.testing.assert_close(case.backward(), case.backward(module=reference))


def test_three_tensors_of_the_inner_size_at_most(recorder):
    case = Case(torch.float32, 300, 8, 64)
    with recorder:
        case.forward()
    assert recorder.peak <= 4 * 300 * (2 * 64 + 2 * 8)
    with recorder:
        case.backward(True, True, False)
    assert recorder.peak <= 4 * 300 * (3 * 64 + 4 * 8)


def test_the_operation_uses_it():
    case = Case(torch.bfloat16, 40, 24, 32)
    leaves = [value.detach().clone().requires_grad_() for value in case.inputs]
    out = ops.side_mlp(*leaves, EPS)
    assert torch.equal(out, case.forward())
    grads = torch.autograd.grad(out, leaves, case.grad)
    assert all(torch.equal(a, b) for a, b in zip(grads, case.backward(), strict=True))
    with torch.inference_mode():
        assert torch.equal(ops.side_mlp(*case.inputs, EPS), out)


def test_float64_is_refused_by_name():
    inputs = [value.double() for value in Case(torch.float32, 3, 8, 8).inputs]
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="no native kernel for"):
        ops.side_mlp(*inputs)
