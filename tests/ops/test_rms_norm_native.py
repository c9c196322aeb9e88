"""The native RMS norm against float64, in every instruction set variant that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.ops.rms_norm import cpu, reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def plain(x, weight):
    """As transformers' Llama: normalised in float32, rounded, then weighted."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalized = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return normalized if weight is None else weight * normalized


def gradients(x, weight, grad, to):
    leaves = [t.detach().to(to).requires_grad_() for t in (x, weight) if t is not None]
    out = plain(leaves[0], None if weight is None else leaves[1])
    return torch.autograd.grad(out, leaves, grad.to(to))


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 70),
    width=st.integers(8, 300),  # of one number nothing but rounding is left in the gradient
    weighted=st.booleans(),
    first_column=st.integers(0, 3),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(
    assert_as_accurate, use_isa, isa, dtype, rows, width, weighted, first_column, scale, seed
):
    use_isa(isa)
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        wide = torch.randn(*shape[:-1], shape[-1] + 4, generator=generator).to(dtype)
        return wide[..., first_column : first_column + shape[-1]]

    x, grad = make(rows, width) * scale, make(rows, width)
    weight = make(width) if weighted else None
    double = None if weight is None else weight.double()
    assert_as_accurate(cpu.rms_norm(x, weight, EPS), plain(x, weight), plain(x.double(), double))

    dx, dweight = cpu.rms_norm_backward(grad, x, weight, EPS, weighted)
    same = gradients(x, weight, grad, dtype)
    exact = gradients(x, weight, grad, torch.float64)
    assert_as_accurate(dx, same[0], exact[0])
    if weighted:
        assert_as_accurate(dweight, same[1], exact[1])
    else:
        assert dweight.shape == (0,)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 64, 1000])
def test_bits_equal_the_reference_where_the_sum_is_exact(use_isa, isa, dtype, width):
    """Whole numbers: no order of summation rounds, so only the roundings after it are left."""
    use_isa(isa)
    x, residual = (torch.randint(-9, 10, (50, width)).to(dtype) for _ in range(2))
    weight = torch.randn(width).to(dtype)
    for w in (weight, None):
        assert torch.equal(cpu.rms_norm(x, w, EPS), reference.rms_norm(x, w, EPS))
        ours = cpu.add_rms_norm(x, residual, w, EPS)
        theirs = reference.add_rms_norm(x, residual, w, EPS)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_the_norm_of_the_rounded_sum(use_isa, isa, dtype):
    use_isa(isa)
    x, residual = torch.randn(3, 40, 77).to(dtype), torch.randn(3, 40, 77).to(dtype)
    weight = torch.randn(77).to(dtype)
    y, total = cpu.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, cpu.rms_norm(x + residual, weight, EPS))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(3000, 40), (70, 5000), (1, 9)])
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, dtype, rows, width):
    use_isa(isa)
    x, grad = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        back = cpu.rms_norm_backward(grad, x, weight, EPS, True)
        results.append((cpu.rms_norm(x, weight, EPS), *back))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_row(use_isa, isa, dtype, bad):
    use_isa(isa)
    x, weight = torch.randn(5, 83).to(dtype), torch.randn(83).to(dtype)
    x[2, 80] = bad
    y, expected = cpu.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[2].isnan().any()
    dx, _ = cpu.rms_norm_backward(torch.randn(5, 83).to(dtype), x, weight, EPS, True)
    assert dx.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("isa", ISAS)
def test_tiny_and_huge_rows(use_isa, isa):
    use_isa(isa)
    x = torch.stack((torch.full((64,), 1e-30), torch.full((64,), 1e18), torch.zeros(64)))
    torch.testing.assert_close(cpu.rms_norm(x, None, EPS), reference.rms_norm(x, None, EPS))


def test_only_the_results_are_made(recorder):
    x, weight = torch.randn(1000, 64).bfloat16(), torch.randn(64).bfloat16()
    with recorder:
        cpu.rms_norm(x, weight, EPS)
        cpu.rms_norm_backward(x, x, weight, EPS, True)
    assert recorder.peak == 1000 * 64 * 2 + 64 * 2


def test_strided_and_empty():
    x = torch.randn(6, 4, 5).transpose(0, 2)
    assert torch.equal(cpu.rms_norm(x, None, EPS), cpu.rms_norm(x.contiguous(), None, EPS))
    grad = torch.ones(1, 1).expand(5, 6)
    dx, _ = cpu.rms_norm_backward(grad, x[:, 0], None, EPS, False)
    assert torch.equal(dx, cpu.rms_norm_backward(grad.clone(), x[:, 0], None, EPS, False)[0])
    nothing = torch.randn(0, 8)
    assert cpu.rms_norm(nothing, None, EPS).shape == (0, 8)
    dx, dweight = cpu.rms_norm_backward(nothing, nothing, torch.ones(8), EPS, True)
    assert dx.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros(8))
    assert cpu.rms_norm(torch.randn(3, 0), None, EPS).shape == (3, 0)


def test_the_operation_uses_it():
    x, weight = torch.randn(100, 96, requires_grad=True), torch.randn(96, requires_grad=True)
    y = ops.rms_norm(x, weight, EPS)
    assert torch.equal(y, cpu.rms_norm(x.detach(), weight.detach(), EPS))
    grad = torch.randn(100, 96)
    actual = torch.autograd.grad(y, (x, weight), grad)
    expected = cpu.rms_norm_backward(grad, x.detach(), weight.detach(), EPS, True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
