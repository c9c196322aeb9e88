from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ladder_kernels import ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops.nf4_linear import reference as blocks
from ladder_kernels.ops.nf4_swiglu import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("reference_backend")


def plain(x, w_gate, w_up):
    return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)


def make_weights(rows, columns, generator=None, **options):
    return [
        quantize_nf4(torch.randn(rows, columns, generator=generator) / columns**0.5, **options)
        for _ in range(2)
    ]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    block=st.sampled_from([256, 1 << 20]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_values(assert_as_accurate, dtype, leading, rows, columns, block, double_quant, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = make_weights(rows, columns, generator, blocksize=32, double_quant=double_quant)
    x = torch.randn(*leading, columns, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_NUMBERS", block)
        out = ops.nf4_swiglu(x, *weights)
    dense = [w.dequantize(dtype) for w in weights]
    exact = plain(x.double(), *(w.double() for w in dense))
    assert out.dtype == dtype
    if block == 1 << 20:
        torch.testing.assert_close(out, plain(x, *dense))
    if rows * columns >= 64:  # a maximum over fewer numbers is luck
        assert_as_accurate(out, plain(x, *dense), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [2000, 1 << 20])
def test_gradient(assert_as_accurate, dtype, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", block)
    weights = make_weights(200, 96)
    x, grad = torch.randn(2, 20, 96).to(dtype), torch.randn(2, 20, 200).to(dtype)
    dense = [w.dequantize(dtype) for w in weights]

    def compute(function, to, of):
        leaf = x.detach().to(to).requires_grad_()
        return torch.autograd.grad(function(leaf, *of), leaf, grad.to(to))[0]

    assert_as_accurate(
        compute(ops.nf4_swiglu, dtype, weights),
        compute(plain, dtype, dense),
        compute(plain, torch.float64, [w.double() for w in dense]),
    )


@pytest.mark.parametrize("block", [20, 1 << 20])
def test_gradcheck(block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", block)
    weights = make_weights(9, 6, blocksize=32)
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: ops.nf4_swiglu(x, *weights), (x,))


def test_neither_half_nor_a_weight_is_ever_whole(recorder, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 32 * 64)
    weights = make_weights(512, 64)
    x, grad = torch.randn(32, 64), torch.randn(32, 512)
    with recorder:
        out = reference.nf4_swiglu(x, *weights)
    assert recorder.peak - out.nbytes < 2 * 4 * 32 * 512
    with recorder:
        reference.nf4_swiglu_backward(grad, x, *weights)
    assert recorder.largest == out.numel()  # the result above; nothing larger since


def test_backward_saves_x_and_the_packed_weights():
    weights = make_weights(48, 64)
    x = torch.randn(16, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), id):
        ops.nf4_swiglu(x, *weights)
    packed = {t.data_ptr() for w in weights for t in w.tensors().values()}
    assert set(saved) == packed | {x.data_ptr()}


def test_mixed_quantisation_and_strides():
    w_gate = quantize_nf4(torch.randn(24, 64), blocksize=32, double_quant=False)
    w_up = quantize_nf4(torch.randn(24, 64), blocksize=128, double_quant=True)
    x = torch.randn(64, 5).t().requires_grad_()
    out = ops.nf4_swiglu(x, w_gate, w_up)
    torch.testing.assert_close(out, plain(x, w_gate.dequantize(), w_up.dequantize()))
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_autocast_casts_x():
    weights, x = make_weights(8, 32), torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.nf4_swiglu(x, *weights)
    assert torch.equal(out, ops.nf4_swiglu(x.bfloat16(), *weights))


def test_second_derivative_is_refused():
    weights = make_weights(8, 32)
    x = torch.randn(3, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.nf4_swiglu(x, *weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


W = quantize_nf4(torch.ones(4, 32), blocksize=32)
X = torch.ones(3, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.ones(4, 32), W), "w_gate is a Tensor; it must be an NF4Weight"),
        ((X, W, None), "w_up is a NoneType; it must be an NF4Weight"),
        (
            (X, W, quantize_nf4(torch.ones(5, 32))),
            r"w_up has shape \[5, 32\]; it must be \[4, 32\]",
        ),
        ((X.T, W, W), r"x has shape \[32, 3\]; it must be \['...', 32\]"),
        ((X.long(), W, W), "x has dtype torch.int64"),
        ((X.to("meta"), W, W), "w_gate is on device cpu; it must be on meta, as x"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ops.nf4_swiglu(*arguments)
