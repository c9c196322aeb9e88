"""Interchange in memory, both ways, without copies."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_kernels import NF4Weight, quantize_nf4
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import BLOCKSIZES
from ladder_kernels.nf4.bitsandbytes import as_bytes, as_storage

STORAGES = [
    torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.int16, torch.float32, torch.int32,
    torch.float64, torch.int64,
]  # fmt: skip


def assert_same_state(ours, theirs, assert_same_bits):
    assert (ours.shape, ours.blocksize, ours.quant_type, ours.dtype, ours.nested) == (
        theirs.shape,
        theirs.blocksize,
        theirs.quant_type,
        theirs.dtype,
        theirs.nested,
    )
    assert_same_bits(ours.absmax, theirs.absmax)
    assert_same_bits(ours.code, theirs.code)
    if ours.nested:
        assert_same_bits(ours.offset, theirs.offset)
        assert_same_bits(ours.state2.absmax, theirs.state2.absmax)
        assert_same_bits(ours.state2.code, theirs.state2.code)
        assert ours.state2.blocksize == theirs.state2.blocksize == 256
        assert ours.state2.dtype == theirs.state2.dtype == torch.float32


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), blocksize=st.sampled_from(BLOCKSIZES), double_quant=st.booleans())
def test_what_we_give_is_what_they_make(
    data, blocksize, double_quant, quantize, dequantize, weights, assert_same_bits
):
    weight = data.draw(weights())
    packed, state = quantize_nf4(weight, blocksize, double_quant).to_bitsandbytes()
    their_packed, their_state = quantize(weight, blocksize, double_quant)
    assert_same_bits(packed, their_packed)
    assert_same_state(state, their_state, assert_same_bits)
    assert_same_bits(dequantize(packed, state), dequantize(their_packed, their_state))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_storages(storage, double_quant, quantize, dequantize, assert_same_bits):
    weight = torch.randn(24, 64)
    theirs, state = quantize(weight, 64, double_quant, storage)
    assert theirs.dtype == storage
    taken = NF4Weight.from_bitsandbytes(theirs, state)
    ours = quantize_nf4(weight, 64, double_quant)
    assert_same_bits(taken.packed, ours.packed)
    packed, our_state = ours.to_bitsandbytes(storage)
    assert packed.dtype == storage
    assert packed.shape == theirs.shape
    assert torch.equal(packed.view(torch.uint8), theirs.view(torch.uint8))
    assert_same_bits(dequantize(packed, our_state), ours.dequantize())


@pytest.mark.parametrize("turn", [lambda p: p, lambda p: p.t(), lambda p: p.view(-1)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_orientations(turn, storage, quantize, assert_same_bits):
    packed, state = quantize(torch.randn(24, 64), 64, True, storage)
    weight = NF4Weight.from_bitsandbytes(turn(packed), state)
    assert_same_bits(weight.packed, packed.view(torch.uint8).view(-1))


def test_nothing_is_copied(quantize):
    packed, state = quantize(torch.randn(24, 64))
    weight = NF4Weight.from_bitsandbytes(packed, state)
    again, back = weight.to_bitsandbytes()
    assert packed.data_ptr() == weight.packed.data_ptr() == again.data_ptr()
    assert state.absmax.data_ptr() == weight.absmax.data_ptr() == back.absmax.data_ptr()
    assert state.state2.absmax.data_ptr() == back.state2.absmax.data_ptr()
    assert state.offset.data_ptr() == back.offset.data_ptr()


def test_a_parameter_of_theirs(assert_same_bits):
    """Params4bit carries Python state, which must not follow its bytes."""
    weight = torch.randn(64, 128)
    parameter = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    ours = NF4Weight.from_bitsandbytes(parameter, parameter.quant_state)
    assert type(ours.packed) is torch.Tensor
    assert_same_bits(ours.packed, quantize_nf4(weight).packed)
    assert_same_bits(ours.dequantize(), quantize_nf4(weight).dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_matmul_takes_ours(dtype):
    """At the tolerance of a product of that dtype."""
    weight = quantize_nf4(torch.randn(32, 64).to(dtype))
    packed, state = weight.to_bitsandbytes()
    x = torch.randn(5, 64).to(dtype).requires_grad_()
    out = bnb_matmul(x, packed, state)
    wanted = torch.nn.functional.linear(x, weight.dequantize())
    assert torch.equal(out, wanted)


def bnb_matmul(x, packed, state):
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def test_bytes_that_do_not_fit_a_storage():
    weight = quantize_nf4(torch.randn(5, 7))
    with pytest.raises(ConfigError) as caught:
        weight.to_bitsandbytes(torch.float32)
    assert str(caught.value) == (
        "18 packed bytes cannot be stored as torch.float32: not a multiple of 4; use "
        "quant_storage=torch.uint8"
    )
    assert weight.to_bitsandbytes(torch.bfloat16)[0].shape == (9, 1)
    assert as_bytes(as_storage(weight.packed, torch.bfloat16)).tolist() == weight.packed.tolist()


def test_a_dtype_that_they_do_not_have(quantize):
    weight = quantize_nf4(torch.randn(4, 64), double_quant=False)
    wide = NF4Weight(weight.packed, weight.absmax, weight.shape, 64, torch.float64)
    with pytest.raises(ConfigError) as caught:
        wide.to_bitsandbytes()
    assert str(caught.value) == (
        "bitsandbytes has no weights of torch.float64; only float32, bfloat16, float16"
    )


def test_fp4_is_refused():
    packed, state = bnb.quantize_4bit(torch.randn(4, 64), quant_type="fp4")
    with pytest.raises(ConfigError, match=r"^quant_type is 'fp4'; only 'nf4' can be used$"):
        NF4Weight.from_bitsandbytes(packed, state)


def test_another_nested_blocksize_is_refused(quantize):
    packed, state = quantize(torch.randn(4, 64))
    state.state2.blocksize = 128
    with pytest.raises(ConfigError, match=r"^the nested blocksize is 128; it must be 256$"):
        NF4Weight.from_bitsandbytes(packed, state)


@pytest.mark.parametrize("missing", ["shape", "blocksize", "dtype"])
def test_incomplete_states_are_refused(missing, quantize):
    packed, state = quantize(torch.randn(4, 64))
    setattr(state, missing, None)
    with pytest.raises(ConfigError, match="lacks shape, blocksize or dtype; it must have all"):
        NF4Weight.from_bitsandbytes(packed, state)


def test_a_state_of_another_weight_is_refused(quantize):
    packed, _ = quantize(torch.randn(4, 64))
    _, state = quantize(torch.randn(8, 64))
    with pytest.raises(ConfigError, match=r"packed is torch\.uint8 \[128\]; it must be .* \[256\]"):
        NF4Weight.from_bitsandbytes(packed, state)


def test_repacked_weights_are_refused():
    """After its first forward in evaluation on a CPU with AVX512-BF16; here by its own function."""
    layer = Linear4bit(64, 32, bias=False, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(32, 64)})
    layer.to("cpu")
    state = copy.deepcopy(layer.weight.quant_state)
    packed, state = bnb._convert_weight_packed_for_cpu(layer.weight.data, state)
    with pytest.raises(ConfigError, match="repacked this weight for AVX512-BF16") as caught:
        NF4Weight.from_bitsandbytes(packed, state)
    assert "take the weight before that, or load it anew" in str(caught.value)
