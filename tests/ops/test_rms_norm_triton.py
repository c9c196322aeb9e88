"""The Triton RMS norm against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import interpreting
from ladder_kernels.errors import BackendError
from ladder_kernels.ops.rms_norm import gpu

EPS = 1e-5
# The interpreter cuts stores of bfloat16 instead of rounding them.
DTYPES = [torch.float32, torch.float16]


def plain(x, weight):
    """As transformers' Llama: normalised in float32, rounded, then weighted."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalized = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return normalized if weight is None else weight * normalized


def gradients(x, weight, grad, to):
    leaves = [t.detach().to(to).requires_grad_() for t in (x, weight) if t is not None]
    out = plain(leaves[0], None if weight is None else leaves[1])
    return torch.autograd.grad(out, leaves, grad.to(to))


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 9),
    width=st.integers(8, 300),  # of one number nothing but rounding is left in the gradient
    weighted=st.booleans(),
    first_column=st.integers(0, 3),
    programs=st.sampled_from([1, 2, 512]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(
    assert_as_accurate, dtype, rows, width, weighted, first_column, programs, seed
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        wide = torch.randn(*shape[:-1], shape[-1] + 4, generator=generator).to(dtype)
        return wide[..., first_column : first_column + shape[-1]]

    x, grad = make(rows, width), make(rows, width)
    weight = make(width) if weighted else None
    double = None if weight is None else weight.double()
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_PROGRAMS", programs)
        y = gpu.rms_norm(x, weight, EPS)
        dx, dweight = gpu.rms_norm_backward(grad, x, weight, EPS, weighted)
    assert_as_accurate(y, plain(x, weight), plain(x.double(), double))
    same = gradients(x, weight, grad, dtype)
    exact = gradients(x, weight, grad, torch.float64)
    assert_as_accurate(dx, same[0], exact[0])
    if weighted:
        assert_as_accurate(dweight, same[1], exact[1])
    else:
        assert dweight.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_the_norm_of_the_rounded_sum(dtype):
    x, residual = torch.randn(3, 4, 77).to(dtype), torch.randn(3, 4, 77).to(dtype)
    weight = torch.randn(77).to(dtype)
    with interpreting():
        y, total = ops.rms_norm(x, weight, EPS, residual)
        again = ops.rms_norm(x + residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, again)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 5)])
def test_nothing_to_do(shape):
    x = torch.empty(shape)
    with interpreting():
        assert gpu.rms_norm(x, None, EPS).shape == shape
        dx, dweight = gpu.rms_norm_backward(x, x, None, EPS, True)
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1]))


def test_rows_wider_than_a_program_are_refused():
    with interpreting(), pytest.raises(BackendError, match="a row of 65537 elements is wider"):
        ops.rms_norm(torch.ones(1, 65537), None, EPS)
