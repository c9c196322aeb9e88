"""The Triton kernels of the format: the bits of the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ladder_kernels import launch, quantize_nf4, use_backend
from ladder_kernels.audit import interpreting
from ladder_kernels.errors import BackendError, NonFiniteError
from ladder_kernels.nf4 import BLOCKSIZES, NF4_VALUES, NF4Weight, choice, cpu, gpu

# The interpreter cuts stores of bfloat16 instead of rounding them.
OUTPUTS = [torch.float32, torch.float16]


def by_reference(weight, blocksize=64, double_quant=True):
    with use_backend("reference"):
        return quantize_nf4(weight, blocksize, double_quant)


def by_triton(weight, blocksize=64, double_quant=True):
    with interpreting():
        return quantize_nf4(weight, blocksize, double_quant)


def assert_same(ours, other, assert_same_bits):
    assert ours.tensors().keys() == other.tensors().keys()
    for name, tensor in ours.tensors().items():
        assert_same_bits(tensor, other.tensors()[name])


ANY_EXAMPLE = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@settings(max_examples=30, **ANY_EXAMPLE)
@given(data=st.data(), blocksize=st.sampled_from(BLOCKSIZES), double_quant=st.booleans())
def test_quantising(data, blocksize, double_quant, weights, assert_same_bits):
    weight = data.draw(weights())
    if weight.dtype == torch.bfloat16:
        # The interpreter misreads subnormal numbers of bfloat16.
        weight = weight.masked_fill(weight.abs() < torch.finfo(torch.bfloat16).tiny, 0.0)
    ours = by_triton(weight, blocksize, double_quant)
    assert_same(ours, by_reference(weight, blocksize, double_quant), assert_same_bits)


@settings(max_examples=40, **ANY_EXAMPLE)
@given(
    data=st.data(),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from(OUTPUTS),
)
def test_dequantising(data, blocksize, double_quant, dtype, weights, assert_same_bits):
    weight = by_reference(data.draw(weights()), blocksize, double_quant)
    start, stop = sorted(data.draw(st.integers(0, weight.numel)) for _ in range(2))
    with use_backend("reference"):
        whole = weight.dequantize(dtype)
    with interpreting():
        assert_same_bits(weight.dequantize(dtype), whole)
        part = gpu.dequantize(weight, start, stop, dtype)
    assert_same_bits(part, whole.flatten()[start:stop])


@pytest.mark.parametrize("blocksize", [32, 4096])
@pytest.mark.parametrize("columns", [(0, 128), (32, 64), (5, 50)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_rectangle(blocksize, columns, double_quant, assert_same_bits):
    weight = by_reference(torch.randn(40, 128), blocksize, double_quant)
    first, last = columns
    width = last - first
    buffer = torch.full((6 * width + 200,), float("nan"))
    out = buffer[100:-100].view(6, width)
    with interpreting():
        gpu.dequantize_into(out, weight, 7 * 128 + first, 128)
    with use_backend("reference"):
        assert_same_bits(out, weight.dequantize()[7:13, first:last])
    assert buffer[:100].isnan().all()
    assert buffer[-100:].isnan().all()


@pytest.mark.parametrize("divided", [False, True])
def test_numbers_beside_every_border(divided, assert_same_bits):
    """Where one bit decides, in blocks that are multiplied and in one that is divided."""
    code = torch.tensor(NF4_VALUES)
    borders = (code[:-1] + code[1:]) / 2
    steps = torch.arange(-40, 41, dtype=torch.int32)
    near = (borders.view(torch.int32).view(-1, 1) + steps).view(torch.float32)
    for scale in (1.0, 0.37, 3e20, 1e-37, 1e-42):
        rows = torch.cat((near, torch.ones(15, 1), near.flip(1), -torch.ones(15, 1)), 1) * scale
        for weight in rows if divided else [rows.flatten()[: 15 * 160]]:
            blocksize = 256 if divided else 32
            ours = by_triton(weight, blocksize, False)
            assert_same(ours, by_reference(weight, blocksize, False), assert_same_bits)


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("bits", [0x7FC00000, -1, 0x7F800000, -0x800000, 1, 0x7F7FFFFF])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_scales_of_any_kind(dtype, bits, assert_same_bits):
    """NaN stays NaN; infinity, overflow and subnormal results are PyTorch's."""
    packed = torch.randint(0, 256, (150,), dtype=torch.uint8)
    absmax = torch.full((5,), bits, dtype=torch.int32).view(torch.float32)
    weight = NF4Weight(packed, absmax, (300,), 64, torch.float32)
    with use_backend("reference"):
        wanted = weight.dequantize(dtype)
    with interpreting():
        assert_same_bits(gpu.dequantize(weight, 0, 300, dtype), wanted)
        assert_same_bits(gpu.dequantize(weight, 3, 290, dtype), wanted[3:290])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 69])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_what_is_not_finite_is_refused(dtype, value, place):
    weight = torch.randn(7, 10).to(dtype)
    weight.view(-1)[place] = value
    with pytest.raises(NonFiniteError, match=r"1 (NaN|infinite) of 70 values"):
        by_triton(weight)


def test_a_strided_weight(assert_same_bits):
    weight = torch.randn(40, 30).t()
    assert_same(by_triton(weight), by_reference(weight), assert_same_bits)


def test_bfloat16_is_not_written_by_the_interpreter():
    weight = by_reference(torch.randn(64))
    with interpreting(), pytest.raises(BackendError, match="cuts numbers to bfloat16"):
        weight.dequantize(torch.bfloat16)


def test_which_kernels_are_chosen(monkeypatch):
    tensor = torch.randn(64)
    assert choice.kernels(tensor, torch.float32) is cpu
    with use_backend("triton"):
        assert choice.kernels(tensor, torch.float32) is None
    with interpreting():
        assert choice.kernels(tensor, torch.float32) is gpu
        assert choice.kernels(tensor, torch.float64) is None
        assert choice.kernels(tensor.to("meta"), torch.float32) is None
        with use_backend("reference"):
            assert choice.kernels(tensor, torch.float32) is None
        monkeypatch.setattr(choice, "missing", lambda: "no Triton here")
        with pytest.raises(BackendError, match="cannot run this call: no Triton here"):
            choice.kernels(tensor, torch.float32)
    assert launch.host() is None
