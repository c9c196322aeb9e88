from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ladder_kernels import ops
from ladder_kernels.errors import ConfigError

pytestmark = pytest.mark.usefixtures("reference_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x, weight, eps):
    normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normalized if weight is None else weight * normalized


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 64), (1, 1), (5, 1), (0, 8)])
def test_bits_equal_transformers(dtype, shape):
    module = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    module.weight.data = torch.randn(shape[-1]).to(dtype)
    x = (torch.randn(shape) * 10).to(dtype)
    assert torch.equal(ops.rms_norm(x, module.weight, 1e-5), module(x))


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    width=st.integers(8, 70),  # of one number nothing but rounding is left in the gradient
    weighted=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(
    assert_as_accurate, dtype, leading, width, weighted, with_residual, seed
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        value = torch.randn(*shape, generator=generator).to(dtype)
        return value.requires_grad_()

    x, grad = make(*leading, width), make(*leading, width).detach()
    weight = make(width) if weighted else None
    residual = make(*leading, width) if with_residual else None
    inputs = [t for t in (x, weight, residual) if t is not None]

    def compute(function, to):
        moved = [None if t is None else t.detach().to(to).requires_grad_() for t in (x, weight)]
        extra = None if residual is None else residual.detach().to(to).requires_grad_()
        if function is plain and extra is not None:
            out = plain(moved[0] + extra, moved[1], 1e-5)
        elif extra is not None:
            out, _ = ops.rms_norm(*moved, 1e-5, extra)
        else:
            out = function(*moved, 1e-5)
        leaves = [t for t in (*moved, extra) if t is not None]
        return out.detach(), torch.autograd.grad(out, leaves, grad.to(to))

    actual, actual_grads = compute(ops.rms_norm, dtype)
    same, same_grads = compute(plain, dtype)
    exact, exact_grads = compute(plain, torch.float64)
    if residual is None:  # a rounded sum is part of the definition, not an error
        assert_as_accurate(actual, same, exact)
        for ours, theirs, true in zip(actual_grads, same_grads, exact_grads, strict=True):
            assert_as_accurate(ours, theirs, true)
    assert len(actual_grads) == len(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_the_norm_of_the_rounded_sum(dtype):
    x, residual = torch.randn(2, 4, 48).to(dtype), torch.randn(2, 4, 48).to(dtype)
    weight = torch.randn(48).to(dtype)
    y, total = ops.rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(x + residual, weight, 1e-6))


def test_residual_gradients_equal_those_of_the_parts():
    leaves = [torch.randn(3, 8).bfloat16().requires_grad_() for _ in range(2)]
    weight = torch.randn(8).bfloat16().requires_grad_()
    for pick in (lambda y, s: y.sum(), lambda y, s: s.sum(), lambda y, s: (y * 2 + s).sum()):
        fused = torch.autograd.grad(
            pick(*ops.rms_norm(leaves[0], weight, 1e-6, leaves[1])),
            [*leaves, weight],
            allow_unused=True,
        )
        total = leaves[0] + leaves[1]
        parts = torch.autograd.grad(
            pick(ops.rms_norm(total, weight, 1e-6), total), [*leaves, weight], allow_unused=True
        )
        for ours, theirs in zip(fused, parts, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(weighted):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True) if weighted else None
    assert gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-6), (x, weight))
    assert gradcheck(lambda x, w, r: ops.rms_norm(x, w, 1e-6, r), (x, weight, residual))


def test_only_the_gradients_asked_for():
    x, weight = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    ops.rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_non_contiguous_input_gives_a_contiguous_result():
    x = torch.randn(6, 4, 5).transpose(0, 2)
    y = ops.rms_norm(x, None, 1e-6)
    assert y.is_contiguous()
    assert torch.equal(y, ops.rms_norm(x.contiguous(), None, 1e-6))
    residual = torch.randn(6, 4, 5).transpose(0, 2)
    assert all(out.is_contiguous() for out in ops.rms_norm(x, None, 1e-6, residual))


def test_second_derivative_is_refused():
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.rms_norm(x, None, 1e-6).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_autocast_casts_all_inputs():
    x, weight = torch.randn(3, 8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.rms_norm(x, weight, 1e-6)
    assert torch.equal(y, ops.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], None, 1e-6), r"rms_norm: x is a list; it must be a torch.Tensor"),
        ((torch.ones(3, dtype=torch.int32), None, 1e-6), r"x has dtype torch.int32; allowed are"),
        ((torch.tensor(1.0), None, 1e-6), r"x has no dimension"),
        ((torch.ones(2, 3), torch.ones(2), 1e-6), r"weight has shape \[2\]; it must be \[3\]"),
        ((torch.ones(2, 3), torch.ones(3).half(), 1e-6), r"weight has dtype torch.float16"),
        (
            (torch.ones(2, 3), torch.ones(3, device="meta"), 1e-6),
            r"weight is on device meta; it must be on cpu, as x",
        ),
        (
            (torch.ones(2, 3), None, 1e-6, torch.ones(3)),
            r"residual has shape \[3\]; it must be \[2, 3\]",
        ),
        ((torch.ones(2), None, 1e-6, torch.ones(2).double()), r"residual has dtype torch.float64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ops.rms_norm(*arguments)
