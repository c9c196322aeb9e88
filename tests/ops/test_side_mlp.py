from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ladder_kernels import ops
from ladder_kernels.errors import ConfigError

pytestmark = pytest.mark.usefixtures("reference_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def plain(u, norm_weight, gate, up, down):
    """The formula, written down in the dtype of the side stream."""
    x = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + EPS) * norm_weight
    return u + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def make_inputs(leading, width, inner, dtype=torch.float32, generator=None):
    shapes = ((*leading, width), (width,), (inner, width), (inner, width), (width, inner))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    scaled = [matrix / max(1, matrix.shape[1]) ** 0.5 for matrix in made[2:]]
    return [value.to(dtype) for value in (*made[:2], *scaled)]


def gradients(function, inputs, grad, to):
    leaves = [value.detach().to(to).requires_grad_() for value in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]


def check(assert_as_accurate, inputs, grad):
    dtype = grad.dtype
    actual = gradients(ops.side_mlp, inputs, grad, dtype)
    same = gradients(plain, inputs, grad, dtype)
    exact = gradients(plain, inputs, grad, torch.float64)
    for ours, theirs, true in zip(actual, same, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_accurate(ours, theirs, true)


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 6), min_size=0, max_size=2),
    width=st.integers(8, 40),  # of one number nothing but rounding is left in the gradient
    inner=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_shapes(assert_as_accurate, leading, width, inner, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(leading, width, inner, generator=generator)
    check(assert_as_accurate, inputs, torch.randn(inputs[0].shape, generator=generator))


# Enough numbers for the largest error of a half precision not to be a matter of luck.
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(assert_as_accurate, dtype):
    inputs = make_inputs((3, 31), 40, 66, dtype)
    check(assert_as_accurate, inputs, torch.randn(3, 31, 40).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_modules_that_it_stands_for(dtype):
    u, norm_weight, gate, up, down = make_inputs((2, 5), 24, 40, dtype)
    x = ops.rms_norm(u, norm_weight, EPS)
    expected = u + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    assert torch.equal(ops.side_mlp(u, norm_weight, gate, up, down, EPS), expected)


def test_gradcheck():
    inputs = [value.double().requires_grad_() for value in make_inputs((2, 3), 5, 7)]
    assert gradcheck(ops.side_mlp, inputs)


@pytest.mark.parametrize("wanted", [0, 1, 2, 4])
def test_only_the_gradients_asked_for(wanted):
    inputs = make_inputs((3,), 8, 12)
    everything = gradients(ops.side_mlp, inputs, inputs[0], torch.float32)[1:]
    inputs[wanted].requires_grad_()
    ops.side_mlp(*inputs).backward(inputs[0].detach())
    for i, value in enumerate(inputs):
        assert (value.grad is not None) == (i == wanted)
    assert torch.equal(inputs[wanted].grad, everything[wanted])


def test_what_is_kept_for_the_backward_pass():
    kept = []
    inputs = [value.requires_grad_() for value in make_inputs((5,), 8, 12)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.side_mlp(*inputs)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}


def test_non_contiguous_inputs():
    u, norm_weight, gate, up, down = make_inputs((3, 4), 8, 12)
    expected = ops.side_mlp(u, norm_weight, gate, up, down)
    turned = u.transpose(0, 1).contiguous().transpose(0, 1)
    out = ops.side_mlp(turned, norm_weight, gate.t().contiguous().t(), up, down)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)


def test_second_derivative_is_refused():
    inputs = [value.requires_grad_() for value in make_inputs((3,), 4, 5)]
    (grad,) = torch.autograd.grad(ops.side_mlp(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_autocast_casts_all_inputs():
    inputs = make_inputs((3,), 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.side_mlp(*inputs)
    assert torch.equal(y, ops.side_mlp(*(value.bfloat16() for value in inputs)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: [1.0]}, r"side_mlp: u is a list; it must be a torch.Tensor"),
        ({0: torch.ones(2, 4).int()}, r"u has dtype torch.int32; allowed are"),
        ({0: torch.tensor(1.0)}, r"u has no dimension; it must be \[\.\.\., d\]"),
        ({1: torch.ones(3)}, r"norm_weight has shape \[3\]; it must be \[4\]"),
        ({1: None}, r"norm_weight is a NoneType; it must be a torch.Tensor"),
        ({2: torch.ones(6)}, r"gate has shape \[6\]; it must be \[m, d\]"),
        ({2: torch.ones(6, 3)}, r"gate has shape \[6, 3\]; it must be \[6, 4\]"),
        ({3: torch.ones(5, 4)}, r"up has shape \[5, 4\]; it must be \[6, 4\]"),
        ({3: torch.ones(6, 4).half()}, r"up has dtype torch.float16; it must be torch.float32"),
        ({4: torch.ones(6, 4)}, r"down has shape \[6, 4\]; it must be \[4, 6\]"),
        ({4: torch.ones(4, 6, device="meta")}, r"down is on device meta; it must be on cpu, as u"),
    ],
)
def test_bad_arguments(change, message):
    inputs: list = make_inputs((2,), 4, 6)
    for place, value in change.items():
        inputs[place] = value
    with pytest.raises(ConfigError, match=message):
        ops.side_mlp(*inputs)
