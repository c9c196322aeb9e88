"""The Triton SwiGLU against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import interpreting
from ladder_kernels.errors import BackendError
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops import _nf4_args
from ladder_kernels.ops.nf4_linear.configurations import Configuration, using
from ladder_kernels.ops.nf4_swiglu import gpu

# The interpreter miscomputes products of bfloat16.
DTYPES = [torch.float32, torch.float16]
CONFIGURATIONS = {
    "fused": Configuration("fused", 16, 32, 64),
    "scales shared": Configuration("fused", 32, 16, 32, parts=2),
    "unpacked": Configuration("unpacked"),
    "unpacked in pieces": Configuration("unpacked", workspace_bytes=20000),
}


def plain(x, w_gate, w_up):
    return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)


def check(
    assert_as_accurate, M, N, K, dtype=torch.float32, blocksizes=(64, 64), nested=True, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        # Rows apart, with NaN around them.
        around = torch.full((shape[0] + 2, shape[1] + 7), float("nan")).to(dtype)
        return around[1:-1, 3:-4].copy_(torch.randn(*shape, generator=generator))

    weights = [
        quantize_nf4(make(N, K) / K**0.5, blocksize=blocksize, double_quant=nested)
        for blocksize in blocksizes
    ]
    x, grad = make(M, K), make(M, N)
    dense = [w.dequantize(dtype) for w in weights]

    def gradient(to):
        leaf = x.detach().to(to).requires_grad_()
        return torch.autograd.grad(plain(leaf, *(d.to(to) for d in dense)), leaf, grad.to(to))[0]

    exact = plain(x.double(), *(d.double() for d in dense))
    with interpreting():
        y = gpu.nf4_swiglu(x, *weights)
        dx = gpu.nf4_swiglu_backward(grad, x, *weights)
    assert_as_accurate(y, plain(x, *dense), exact)
    assert_as_accurate(dx, gradient(dtype), gradient(torch.float64))


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    configuration=st.sampled_from(list(CONFIGURATIONS.values())),
    M=st.integers(16, 24),
    N=st.integers(20, 40),
    K=st.one_of(st.integers(30, 70), st.sampled_from([64, 128])),
    blocksizes=st.tuples(*[st.sampled_from([32, 64])] * 2),
    nested=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(assert_as_accurate, configuration, M, N, K, blocksizes, nested, seed):
    with using(configuration):
        check(assert_as_accurate, M, N, K, torch.float32, blocksizes, nested, seed)


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))
def test_every_way_in_float16(assert_as_accurate, configuration):
    with using(configuration):
        check(assert_as_accurate, 20, 40, 64, torch.float16)


def test_the_backward_takes_some_rows_at_a_time(assert_as_accurate, monkeypatch):
    monkeypatch.setattr(gpu, "_BACKWARD_NUMBERS", 1)
    check(assert_as_accurate, 66, 10, 32, blocksizes=(32, 32))


def test_gradient_of_the_public_operation(assert_as_accurate):
    weights = [quantize_nf4(torch.randn(40, 96) / 10, blocksize=32) for _ in range(2)]
    x, grad = torch.randn(2, 9, 96), torch.randn(2, 9, 40)

    def compute(function, to, of):
        leaf = x.to(to).detach().requires_grad_()
        out = function(leaf, *of)
        return out.detach(), torch.autograd.grad(out, leaf, grad.to(to))[0]

    dense = [w.dequantize() for w in weights]
    with interpreting():
        actual = compute(ops.nf4_swiglu, torch.float32, weights)
    same = compute(plain, torch.float32, dense)
    exact = compute(plain, torch.float64, [d.double() for d in dense])
    for ours, theirs, true in zip(actual, same, exact, strict=True):
        assert_as_accurate(ours, theirs, true)


def test_opcheck():
    weights = [
        *_nf4_args.flatten(quantize_nf4(torch.randn(8, 6), blocksize=32)),
        *_nf4_args.flatten(quantize_nf4(torch.randn(8, 6), double_quant=False)),
    ]
    with interpreting():
        x = torch.randn(3, 6, requires_grad=True)
        opcheck(torch.ops.ladder_kernels.nf4_swiglu.default, (x, *weights))


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("way", ["fused", "unpacked"])
def test_nothing_to_do(rows, way):
    width = 0 if rows else 8
    weight = quantize_nf4(torch.randn(width, 64), double_quant=False)
    x, grad = torch.randn(rows, 64), torch.randn(rows, width)
    with interpreting(), using(CONFIGURATIONS[way]):
        assert gpu.nf4_swiglu(x, weight, weight).shape == (rows, width)
        assert torch.equal(gpu.nf4_swiglu_backward(grad, x, weight, weight), torch.zeros(rows, 64))


def test_bfloat16_is_refused_by_the_interpreter():
    weight, x = quantize_nf4(torch.randn(8, 64)), torch.randn(3, 64).bfloat16()
    with interpreting(), pytest.raises(BackendError, match="miscomputes matrix products"):
        ops.nf4_swiglu(x, weight, weight)
