"""From floats to bits: those of bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ladder_kernels import quantize_nf4
from ladder_kernels.errors import ConfigError, NonFiniteError
from ladder_kernels.nf4 import BLOCKSIZES, NF4_VALUES, NF4Weight
from ladder_kernels.nf4 import quantize as module

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_equal_weights(ours, theirs, assert_same_bits):
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, tensor in ours.tensors().items():
        assert_same_bits(tensor, theirs.tensors()[name])
    assert (ours.shape, ours.blocksize, ours.dtype) == (
        theirs.shape,
        theirs.blocksize,
        theirs.dtype,
    )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data(), blocksize=st.sampled_from(BLOCKSIZES), double_quant=st.booleans())
def test_bits_are_bitsandbytes(data, blocksize, double_quant, quantize, weights, assert_same_bits):
    weight = data.draw(weights())
    theirs = NF4Weight.from_bitsandbytes(*quantize(weight, blocksize, double_quant))
    ours = quantize_nf4(weight, blocksize, double_quant)
    assert_equal_weights(ours, theirs, assert_same_bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_a_matrix_of_several_pieces(blocksize, double_quant, dtype, quantize, assert_same_bits):
    """Longer than what is worked on at a time, with a ragged end."""
    weight = torch.randn(301, 2001).to(dtype)
    assert weight.numel() > 2 * module._CPU_PIECE
    theirs = NF4Weight.from_bitsandbytes(*quantize(weight, blocksize, double_quant))
    assert_equal_weights(quantize_nf4(weight, blocksize, double_quant), theirs, assert_same_bits)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "weight",
    [
        torch.empty(0),
        torch.empty(0, 7),
        torch.empty(5, 0),
        torch.tensor(-3.0),
        torch.tensor([0.25]),
        torch.tensor([[0.0]]),
        torch.zeros(64, 64),
        torch.zeros(3, 50),
        torch.full((3, 70), -0.0),
        torch.full((3, 70), 1e-45),
        torch.full((3, 70), -1e-39),
        torch.full((2, 64), 65504.0, dtype=torch.float16),
        torch.full((2, 70), 3e38).mul_(torch.tensor([1.0, -1.0]).repeat(35)) / 8,
        torch.full((2, 70), 3.0e38, dtype=torch.bfloat16) / 8,
    ],
    ids=lambda weight: f"{list(weight.shape)}-{weight.flatten()[:1].tolist()}",
)
def test_extremes(weight, double_quant, quantize, assert_same_bits):
    theirs = NF4Weight.from_bitsandbytes(*quantize(weight, 64, double_quant))
    ours = quantize_nf4(weight, 64, double_quant)
    assert_equal_weights(ours, theirs, assert_same_bits)
    assert ours.dequantize().shape == weight.shape


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=70),
    blocksize=st.sampled_from([32, 64]),
)
def test_any_float32(values, blocksize, quantize, assert_same_bits):
    weight = torch.tensor(values, dtype=torch.float32)
    theirs = NF4Weight.from_bitsandbytes(*quantize(weight, blocksize, False))
    assert_equal_weights(quantize_nf4(weight, blocksize, False), theirs, assert_same_bits)


def test_numbers_beside_every_midpoint(quantize, assert_same_bits):
    """The neighbours of each border between centroids, where one bit decides."""
    code = torch.tensor(NF4_VALUES)
    middles = (code[:-1] + code[1:]) / 2
    near = [middles]
    for direction in (-2.0, 2.0):
        step = middles
        for _ in range(3):
            step = torch.nextafter(step, torch.full_like(step, direction))
            near.append(step)
    for scale in (1.0, 0.37, 1e-20, 3e20):
        weight = torch.cat([*near, torch.ones(128 - 7 * 15)]) * scale
        for ragged in (weight, weight[:-1], torch.cat([weight[:45], weight[:45]])):
            theirs = NF4Weight.from_bitsandbytes(*quantize(ragged, 64, False))
            assert_equal_weights(quantize_nf4(ragged, 64, False), theirs, assert_same_bits)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t(),
        lambda w: w[::2],
        lambda w: w[:, 1::3],
        lambda w: w.view(8, 12, 70).permute(2, 0, 1),
        lambda w: w[:1].expand(5, -1),
    ],
)
def test_strides_do_not_matter(view, assert_same_bits):
    weight = view(torch.randn(96, 70))
    assert not weight.is_contiguous()
    ours = quantize_nf4(weight)
    assert_equal_weights(ours, quantize_nf4(weight.contiguous()), assert_same_bits)
    assert all(tensor.is_contiguous() for tensor in ours.tensors().values())


@pytest.mark.parametrize("seed", range(4))
def test_the_number_of_threads_changes_no_bit(seed, assert_same_bits):
    """More scales than one thread of PyTorch sums by itself."""
    weight = torch.randn(3_000_000, generator=torch.Generator().manual_seed(seed))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(quantize_nf4(weight, 32))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert_equal_weights(other, made[0], assert_same_bits)


def test_the_weight_is_left_as_it_is():
    weight = torch.randn(70, 70, requires_grad=True)
    before = weight.detach().clone()
    ours = quantize_nf4(weight)
    assert torch.equal(weight, before)
    assert not any(tensor.requires_grad for tensor in ours.tensors().values())


def test_a_parameter_is_a_tensor():
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    assert quantize_nf4(parameter).shape == (8, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bad", "counts"),
    [
        ([float("nan")], "1 NaN of 12000 values"),
        ([float("inf"), -float("inf")], "2 infinite of 12000 values"),
        ([float("nan"), float("inf"), float("nan")], "2 NaN and 1 infinite of 12000 values"),
    ],
)
@pytest.mark.parametrize("first", [0, 5000, 11990])
def test_not_finite(dtype, bad, counts, first):
    """In the first block, in a full one, and in the short one at the end."""
    weight = torch.randn(120, 100).to(dtype)
    for offset, value in enumerate(bad):
        weight.view(-1)[first + offset] = value
    with pytest.raises(NonFiniteError) as caught:
        quantize_nf4(weight, name="model.layers.3.mlp.up_proj.weight")
    assert str(caught.value) == (
        f"'model.layers.3.mlp.up_proj.weight' cannot be quantised: {counts} in shape [120, 100], "
        f"the first at [{first // 100}, {first % 100}]; all must be finite"
    )
    with pytest.raises(ValueError, match=r"^'weight' cannot be quantised"):
        quantize_nf4(weight)


def test_not_finite_is_counted_over_all_pieces():
    weight = torch.zeros(3, module._CPU_PIECE)
    weight[1, 5] = weight[2, 7] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2 NaN of .* the first at \[1, 5\]"):
        quantize_nf4(weight)


def test_scales_without_a_mean():
    weight = torch.full((4, 64), 3e38)
    with pytest.raises(NonFiniteError) as caught:
        quantize_nf4(weight, name="w")
    assert str(caught.value) == (
        "'w' is too large for double quantisation: the sum of its 4 scales is infinite in float32; "
        "use double_quant=False"
    )
    assert torch.isfinite(quantize_nf4(weight, double_quant=False).dequantize()).all()


@pytest.mark.parametrize(
    ("weight", "blocksize", "message"),
    [
        ([1.0], 64, "'w' is a list; it must be a torch.Tensor"),
        (
            torch.ones(3, dtype=torch.float64),
            64,
            "'w' has dtype torch.float64; it must be one of float32, bfloat16, float16",
        ),
        (
            torch.ones(3, dtype=torch.int32),
            64,
            "'w' has dtype torch.int32; it must be one of float32, bfloat16, float16",
        ),
        (
            torch.ones(3),
            48,
            "blocksize is 48; it must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096",
        ),
        (
            torch.ones(3),
            0,
            "blocksize is 0; it must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096",
        ),
    ],
)
def test_refused(weight, blocksize, message):
    with pytest.raises(ConfigError) as caught:
        quantize_nf4(weight, blocksize, name="w")
    assert str(caught.value) == message


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 7), (64, 128), (300, 1001)])
def test_shapes_without_values(shape, double_quant):
    """A meta tensor and a fake one give the tensors that a real one gives, without values."""
    real = quantize_nf4(torch.randn(shape), 64, double_quant)
    meta = quantize_nf4(torch.empty(shape, device="meta"), 64, double_quant)
    with FakeTensorMode():
        fake = quantize_nf4(torch.randn(shape), 64, double_quant)
    for other, device in ((meta, "meta"), (fake, "cpu")):
        assert other.tensors().keys() == real.tensors().keys()
        for name, tensor in other.tensors().items():
            wanted = real.tensors()[name]
            assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype), name
            assert tensor.device.type == device
