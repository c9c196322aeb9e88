"""The native SwiGLU against float64, in every instruction set variant that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops.nf4_swiglu import cpu

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x, w_gate, w_up):
    return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)


def check(assert_as_accurate, M, N, K, dtype, blocksize=64, double_quant=True, *, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = [
        quantize_nf4(make(N, K) / K**0.5, blocksize=blocksize, double_quant=double_quant)
        for _ in range(2)
    ]
    x, grad = make(M, K), make(M, N)
    dense = [w.dequantize(dtype) for w in weights]

    def gradient(to):
        leaf = x.detach().to(to).requires_grad_()
        return torch.autograd.grad(plain(leaf, *(d.to(to) for d in dense)), leaf, grad.to(to))[0]

    exact = plain(x.double(), *(d.double() for d in dense))
    # Of 16 bits, a maximum over fewer roundings than these is luck: the halves [M, N] are rounded
    # in the gradient too. In float32 all are below the rule's share of the scale.
    enough = 0 if dtype == torch.float32 else 1024
    if enough <= M * N:
        assert_as_accurate(cpu.nf4_swiglu(x, *weights), plain(x, *dense), exact)
    if enough <= M * min(N, K):
        back = cpu.nf4_swiglu_backward(grad, x, *weights)
        assert_as_accurate(back, gradient(dtype), gradient(torch.float64))


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    M=st.integers(1, 100),
    N=st.integers(1, 150),
    K=st.integers(1, 300),
    blocksize=st.sampled_from([32, 64]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(
    dtype=torch.bfloat16, M=61, N=120, K=120, blocksize=64, double_quant=False, seed=3775287
).via("the gradients through gate and up, rounded before their sum, erred too much")
def test_values_and_gradient(
    assert_as_accurate, use_isa, isa, dtype, M, N, K, blocksize, double_quant, seed
):
    use_isa(isa)
    check(assert_as_accurate, M, N, K, dtype, blocksize, double_quant, seed=seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(200, 130, 1600), (2100, 40, 64), (20, 1100, 832), (5, 60, 128)]
)
def test_more_than_one_slice_or_piece(assert_as_accurate, use_isa, isa, dtype, M, N, K):
    use_isa(isa)
    check(assert_as_accurate, M, N, K, dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_gates_of_any_size(use_isa, isa):
    """silu from where its exponential overflows to where it vanishes, in both ways of computing."""
    use_isa(isa)
    weights = [quantize_nf4(torch.eye(64), double_quant=False) for _ in range(2)]
    gates = torch.cat((torch.linspace(-120, 120, 1000), torch.tensor([0.0, 1e-30, -1e-30, 3e4])))
    for rows in (1, gates.numel()):
        for start in range(0, gates.numel(), rows):
            x = torch.zeros(rows, 64)
            x[:, 3] = gates[start : start + rows]
            out = cpu.nf4_swiglu(x, *weights)[:, 3]
            exact = (F.silu(x[:, 3].double()) * x[:, 3].double()).float()
            torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 16, 17, 300])
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, dtype, M):
    use_isa(isa)
    weights = [quantize_nf4(torch.randn(190, 832)) for _ in range(2)]
    x = torch.randn(M, 832).to(dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(cpu.nf4_swiglu(x, *weights))
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_neither_half_is_in_memory(recorder):
    weights = [quantize_nf4(torch.randn(512, 64)) for _ in range(2)]
    x = torch.randn(1000, 64)
    with recorder:
        cpu.nf4_swiglu(x, *weights)
    assert recorder.peak == 1000 * 512 * 4  # the result


def test_strided_and_empty():
    weights = [quantize_nf4(torch.randn(48, 64)) for _ in range(2)]
    wide = torch.randn(30, 100)
    wanted = cpu.nf4_swiglu(wide[:, 5:69].contiguous(), *weights)
    assert torch.equal(cpu.nf4_swiglu(wide[:, 5:69], *weights), wanted)
    assert cpu.nf4_swiglu(torch.randn(0, 64), *weights).shape == (0, 48)
    assert cpu.nf4_swiglu_backward(torch.randn(0, 48), torch.randn(0, 64), *weights).shape == (
        0,
        64,
    )


def test_the_operation_uses_it():
    weights = [quantize_nf4(torch.randn(64, 128)) for _ in range(2)]
    x = torch.randn(40, 128).bfloat16()
    native_result = cpu.nf4_swiglu(x, *weights)
    assert torch.equal(ops.nf4_swiglu(x, *weights), native_result)
    with ops.use_backend("reference"):
        assert not torch.equal(ops.nf4_swiglu(x, *weights), native_result)
