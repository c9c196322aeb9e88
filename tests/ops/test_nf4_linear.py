from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from ladder_kernels import ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops.nf4_linear import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("reference_backend")


def plain(x, weight, bias=None, residual=None):
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    blocksize=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(
    assert_as_accurate,
    dtype,
    leading,
    rows,
    columns,
    blocksize,
    double_quant,
    with_bias,
    with_residual,
    seed,
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = quantize_nf4(make(rows, columns), blocksize=blocksize, double_quant=double_quant)
    x, grad = make(*leading, columns), make(*leading, rows)
    bias = make(rows) if with_bias else None
    residual = make(*leading, rows) if with_residual else None

    def compute(function, to, of):
        leaves = [
            None if t is None else t.detach().to(to).requires_grad_() for t in (x, bias, residual)
        ]
        out = function(leaves[0], of, *leaves[1:])
        given = [leaf for leaf in leaves if leaf is not None]
        return [out.detach(), *torch.autograd.grad(out, given, grad.to(to))]

    # The definition rounds the weight to x's dtype, so that is what float64 sees too.
    rounded = weight.dequantize(dtype)
    actual = compute(ops.nf4_linear, dtype, weight)
    same = compute(plain, dtype, rounded)
    exact = compute(plain, torch.float64, rounded.double())
    for ours, theirs, true in zip(actual, same, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_accurate(ours, theirs, true)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_rows(assert_as_accurate, dtype, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_NUMBERS", 1000)
    weight = quantize_nf4(torch.randn(130, 96), blocksize=64)
    assert len(reference.row_blocks(weight)) == 13
    x, grad = torch.randn(33, 96).to(dtype), torch.randn(33, 130).to(dtype)
    bias, residual = torch.randn(130).to(dtype), torch.randn(33, 130).to(dtype)
    dense = weight.dequantize(dtype)
    wide = [t.double() for t in (x, dense, bias, residual)]
    out = ops.nf4_linear(x, weight, bias, residual)
    assert_as_accurate(out, plain(x, dense, bias, residual), plain(*wide))
    back = ops.nf4_linear_transposed(grad, weight)
    assert_as_accurate(back, grad @ dense, grad.double() @ dense.double())


def test_derivatives_of_every_order():
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    weight = quantize_nf4(torch.randn(5, 6), blocksize=32)
    inputs = (make(2, 2, 6), make(5), make(2, 2, 5))
    assert gradcheck(lambda x, b, r: ops.nf4_linear(x, weight, b, r), inputs)
    assert gradgradcheck(lambda x, b, r: ops.nf4_linear(x, weight, b, r), inputs)
    assert gradcheck(lambda g: ops.nf4_linear_transposed(g, weight), (make(3, 5),))
    assert gradgradcheck(lambda g: ops.nf4_linear_transposed(g, weight), (make(3, 5),))


def test_second_derivative_through_a_curve():
    weight = quantize_nf4(torch.randn(5, 6), blocksize=32)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (
        lambda: ops.nf4_linear(x, weight),
        lambda: x @ weight.dequantize(torch.float64).T,
    ):
        (first,) = torch.autograd.grad(function().pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_backward_saves_the_packed_weight_and_nothing_else():
    weight = quantize_nf4(torch.randn(64, 128))
    x = torch.randn(16, 128, requires_grad=True)
    residual = torch.randn(16, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), id):
        ops.nf4_linear(x, weight, torch.randn(64, requires_grad=True), residual)
    assert set(saved) == {t.data_ptr() for t in weight.tensors().values()}


def test_only_the_gradients_asked_for():
    weight = quantize_nf4(torch.randn(8, 32))
    x, residual = torch.randn(3, 32), torch.randn(3, 8)
    bias = torch.randn(8, requires_grad=True)
    ops.nf4_linear(x, weight, bias, residual).sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 3.0))
    assert x.grad is None
    assert residual.grad is None


def test_the_dequantised_weight_is_never_whole(recorder, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_NUMBERS", 4096)
    weight = quantize_nf4(torch.randn(1024, 64))
    with recorder:
        reference.nf4_linear(torch.randn(2, 64), weight)
        reference.nf4_linear_transposed(torch.randn(2, 1024), weight)
    assert recorder.largest <= 2 * 4096


def test_one_dimension_and_non_contiguous():
    weight = quantize_nf4(torch.randn(8, 32))
    x = torch.randn(32)
    torch.testing.assert_close(ops.nf4_linear(x, weight), weight.dequantize() @ x)
    x = torch.randn(32, 5, 3).transpose(0, 2)
    residual = torch.randn(8, 5, 3).transpose(0, 2)
    out = ops.nf4_linear(x, weight, None, residual)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain(x, weight.dequantize(), None, residual))


def test_inference_mode():
    weight = quantize_nf4(torch.randn(8, 32))
    with torch.inference_mode():
        x = torch.randn(3, 32)
        out = ops.nf4_linear(x, weight, torch.zeros(8), torch.zeros(3, 8))
    assert out.is_inference()
    torch.testing.assert_close(out.clone(), F.linear(x.clone(), weight.dequantize()))


def test_autocast_casts_all_inputs():
    weight = quantize_nf4(torch.randn(8, 32))
    inputs = [torch.randn(3, 32), torch.randn(8), torch.randn(3, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.nf4_linear(inputs[0], weight, *inputs[1:])
    narrow = [t.bfloat16() for t in inputs]
    assert torch.equal(out, ops.nf4_linear(narrow[0], weight, *narrow[1:]))


W = quantize_nf4(torch.ones(4, 32), blocksize=32)
X = torch.ones(3, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.ones(4, 32)), r"weight is a Tensor; it must be an NF4Weight"),
        ((X, quantize_nf4(torch.ones(2, 2, 32))), r"weight has shape \[2, 2, 32\]; .*\[N, K\]"),
        ((X[:, :31], W), r"x has shape \[3, 31\]; it must be \['...', 32\] for a weight"),
        ((torch.tensor(1.0), W), r"x has shape \[\]"),
        ((X.int(), W), "x has dtype torch.int32; allowed are float16, bfloat16, float32 and"),
        ((X, W, torch.ones(5)), r"bias has shape \[5\]; it must be \[4\]"),
        ((X, W, torch.ones(4).half()), "bias has dtype torch.float16; it must be torch.float32"),
        ((X, W, None, torch.ones(4)), r"residual has shape \[4\]; it must be \[3, 4\]"),
        ((X, W, None, torch.ones(3, 4).double()), "residual has dtype torch.float64"),
        ((X.to("meta"), W), "weight is on device cpu; it must be on meta, as x"),
        ((X, W, torch.ones(4, device="meta")), "bias is on device meta; it must be on cpu"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ops.nf4_linear(*arguments)


def test_bad_arguments_of_the_transpose():
    with pytest.raises(ConfigError, match=r"grad has shape \[3, 32\]; it must be \['...', 4\]"):
        ops.nf4_linear_transposed(X, W)
