"""From bits to floats: those of bitsandbytes, for any range."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ladder_kernels import quantize_nf4
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import BLOCKSIZES, NF4_VALUES, NF4Weight
from ladder_kernels.nf4 import weight as module
from ladder_kernels.nf4.dequantize import dequantize_range, dequantize_scales

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_settings = settings(max_examples=150, deadline=None, derandomize=True)


@_settings
@given(
    data=st.data(),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_bits_are_bitsandbytes(
    data, blocksize, double_quant, dtype, quantize, dequantize, weights, assert_same_bits
):
    packed, state = quantize(data.draw(weights()), blocksize, double_quant)
    ours = NF4Weight.from_bitsandbytes(packed, state)
    assert_same_bits(ours.dequantize(dtype), dequantize(packed, state, dtype))
    assert_same_bits(ours.dequantize(), dequantize(packed, state))
    assert ours.dequantize().dtype == state.dtype


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_a_matrix_of_several_pieces(
    blocksize, double_quant, quantize, dequantize, assert_same_bits
):
    packed, state = quantize(torch.randn(601, 4001), blocksize, double_quant)
    ours = NF4Weight.from_bitsandbytes(packed, state)
    assert ours.numel > 2 * module._PIECE
    for dtype in DTYPES:
        assert_same_bits(ours.dequantize(dtype), dequantize(packed, state, dtype))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_whole_blocks(blocksize, double_quant, dtype, quantize, assert_same_bits):
    """bitsandbytes on the shape itself, where its CPU kernel is right."""
    packed, state = quantize(torch.randn(9, 4096).to(dtype), blocksize, double_quant)
    with torch.compiler.set_stance("force_eager"):
        theirs = bnb.dequantize_4bit(packed, state)
    assert_same_bits(NF4Weight.from_bitsandbytes(packed, state).dequantize(), theirs)


def test_every_byte():
    """Both halves of all 256 bytes, the high one first."""
    weight = NF4Weight(
        torch.arange(256, dtype=torch.uint8), torch.full((8,), 2.0), (512,), 64, torch.float32
    )
    values = weight.dequantize().view(256, 2)
    for byte in range(256):
        assert values[byte].tolist() == [2 * NF4_VALUES[byte >> 4], 2 * NF4_VALUES[byte & 15]]


def test_float64_is_float32_widened():
    weight = quantize_nf4(torch.randn(30, 50))
    assert torch.equal(weight.dequantize(torch.float64), weight.dequantize(torch.float32).double())


def test_quantising_again_changes_nothing(assert_same_bits):
    """Values of the format are its own nearest values."""
    once = quantize_nf4(torch.randn(40, 96), double_quant=False)
    again = quantize_nf4(once.dequantize(), double_quant=False)
    for name, tensor in once.tensors().items():
        assert_same_bits(tensor, again.tensors()[name])


@_settings
@given(
    shape=st.sampled_from(
        [(7, 33), (12, 64), (1, 500), (40, 3), (9, 5, 7), (100,), (6, 0), (0, 6)]
    ),
    blocksize=st.sampled_from([32, 64, 256]),
    double_quant=st.booleans(),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_rows(shape, blocksize, double_quant, dtype, ends, assert_same_bits):
    weight = quantize_nf4(torch.randn(shape), blocksize, double_quant)
    start, stop = sorted(round(end * shape[0]) for end in ends)
    rows = weight.dequantize_rows(start, stop, dtype)
    assert_same_bits(rows, weight.dequantize(dtype)[start:stop])
    assert rows.is_contiguous()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("columns", [33, 64, 1000])
def test_rows_of_several_pieces(columns, double_quant, monkeypatch, assert_same_bits):
    weight = quantize_nf4(torch.randn(50, columns), double_quant=double_quant)
    whole = weight.dequantize()
    monkeypatch.setattr(module, "_PIECE", 777)
    assert_same_bits(weight.dequantize(), whole)
    assert_same_bits(weight.dequantize_rows(3, 41), whole[3:41])


def test_only_the_bytes_of_the_rows_are_read():
    """What lies outside may be anything: here, scales that would give NaN."""
    weight = quantize_nf4(torch.randn(8, 64), double_quant=False)
    wanted = weight.dequantize()[2:5]
    weight.absmax[:2] = weight.absmax[5:] = float("nan")
    assert torch.equal(weight.dequantize_rows(2, 5), wanted)


@_settings
@given(start=st.integers(0, 300), length=st.integers(0, 300), first=st.integers(0, 3))
def test_ranges(start, length, first, assert_same_bits):
    weight = quantize_nf4(torch.randn(20, 31), blocksize=32, double_quant=False)
    start, stop = max(start, 32 * first), min(max(start, 32 * first) + length, weight.numel)
    values = dequantize_range(
        weight.packed, weight.absmax[first:], 32, start, stop, first_block=first
    )
    assert_same_bits(values, weight.dequantize().view(-1)[start:stop])


@_settings
@given(first=st.integers(0, 700), length=st.integers(0, 700))
def test_scales(first, length, quantize, assert_same_bits):
    weight = quantize_nf4(torch.randn(700, 33), blocksize=32)
    _, state = quantize(torch.randn(700, 33), 32)
    state.absmax, state.state2.absmax, state.offset = (
        weight.absmax,
        weight.nested_absmax,
        weight.nested_offset,
    )
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    nested = (weight.nested_absmax, weight.nested_code, weight.nested_offset)
    last = min(first + length, weight.absmax.numel())
    assert_same_bits(
        dequantize_scales(weight.absmax, *nested, first, last), theirs[first:last].contiguous()
    )


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6), (6, 6)])
def test_refused_rows(start, stop):
    with pytest.raises(ConfigError) as caught:
        quantize_nf4(torch.randn(5, 7)).dequantize_rows(start, stop)
    assert str(caught.value) == (
        f"rows {start} to {stop} were asked of a tensor of shape [5, 7]; "
        "0 <= start <= stop <= rows must hold"
    )


def test_a_number_has_no_rows():
    weight = quantize_nf4(torch.tensor(2.0), double_quant=False)
    assert weight.dequantize().item() == 2.0
    with pytest.raises(ConfigError, match=r"rows 0 to 0 were asked of a tensor of shape \[\]"):
        weight.dequantize_rows(0, 0)


def test_refused_dtype():
    with pytest.raises(ConfigError) as caught:
        quantize_nf4(torch.randn(5, 7)).dequantize(torch.int8)
    assert str(caught.value) == (
        "NF4 cannot be dequantised to torch.int8; it must be one of float16, bfloat16, float32, "
        "float64"
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(0, 7), (5, 7), (64, 128)])
def test_without_values(shape, double_quant):
    meta = quantize_nf4(torch.empty(shape, device="meta"), 64, double_quant)
    assert meta.dequantize(torch.bfloat16).shape == shape
    assert meta.dequantize().device.type == "meta"
    assert meta.dequantize_rows(0, shape[0]).shape == shape
    with FakeTensorMode():
        fake = quantize_nf4(torch.randn(shape), 64, double_quant)
        out = fake.dequantize(torch.float16)
        assert (out.shape, out.dtype, out.device.type) == (shape, torch.float16, "cpu")
        assert fake.dequantize_rows(0, shape[0]).shape == shape


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_compiles_without_graph_breaks(backend, double_quant, assert_same_bits):
    weight = quantize_nf4(torch.randn(37, 50), 64, double_quant)

    def use(x):
        rows = weight.dequantize_rows(3, 30, torch.float32)
        return x @ weight.dequantize(torch.float32).t(), rows

    torch.compiler.reset()
    x = torch.randn(4, 50)
    out, rows = torch.compile(use, backend=backend, fullgraph=True)(x)
    assert_same_bits(rows, weight.dequantize_rows(3, 30))
    torch.testing.assert_close(out, x @ weight.dequantize().t())
