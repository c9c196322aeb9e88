"""The native kernels: the bits of the reference and of bitsandbytes, in every variant."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ladder_kernels import backend, native, quantize_nf4, use_backend
from ladder_kernels.errors import BackendError, BackendFallbackWarning, NonFiniteError
from ladder_kernels.nf4 import BLOCKSIZES, NF4_VALUES, NF4Weight, cpu
from ladder_kernels.nf4 import quantize as reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PIECE = 1 << 16  # kPieceNumbers of csrc/src/nf4_quantize.inc


def by_reference(weight, blocksize=64, double_quant=True):
    with use_backend("reference"):
        return quantize_nf4(weight, blocksize, double_quant)


def natively(weight, blocksize=64, double_quant=True):
    with use_backend("cpu"):
        return quantize_nf4(weight, blocksize, double_quant)


def assert_same(ours, other, assert_same_bits):
    assert ours.tensors().keys() == other.tensors().keys()
    for name, tensor in ours.tensors().items():
        assert_same_bits(tensor, other.tensors()[name])


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), blocksize=st.sampled_from(BLOCKSIZES), double_quant=st.booleans())
def test_quantising(
    data, blocksize, double_quant, isa, use_isa, quantize, weights, assert_same_bits
):
    use_isa(isa)
    weight = data.draw(weights())
    ours = natively(weight, blocksize, double_quant)
    assert_same(ours, by_reference(weight, blocksize, double_quant), assert_same_bits)
    theirs = NF4Weight.from_bitsandbytes(*quantize(weight, blocksize, double_quant))
    assert_same(ours, theirs, assert_same_bits)


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.data(),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_dequantising(
    data, blocksize, double_quant, dtype, isa, use_isa, dequantize, weights, assert_same_bits
):
    use_isa(isa)
    weight = by_reference(data.draw(weights()), blocksize, double_quant)
    whole = cpu.dequantize(weight, 0, weight.numel, dtype)
    with use_backend("reference"):
        assert_same_bits(whole, weight.dequantize(dtype).flatten())
    packed, state = weight.to_bitsandbytes()
    assert_same_bits(whole, dequantize(packed, state, dtype).flatten())
    start, stop = sorted(data.draw(st.integers(0, weight.numel)) for _ in range(2))
    assert_same_bits(cpu.dequantize(weight, start, stop, dtype), whole[start:stop])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "numel",
    [1, 2, 31, 32, 33, 63, 64, 65, 4095, 4097, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 4063],
)
def test_sizes(isa, dtype, numel, use_isa, assert_same_bits):
    """Around the vectors, the blocks, and what a thread takes at a time."""
    use_isa(isa)
    weight = torch.randn(numel).to(dtype)
    for blocksize in (32, 64, 4096):
        ours = natively(weight, blocksize)
        assert_same(ours, by_reference(weight, blocksize), assert_same_bits)
        for output in DTYPES:
            with use_backend("reference"):
                wanted = ours.dequantize(output)
            assert_same_bits(cpu.dequantize(ours, 0, numel, output), wanted)


_DENORMAL = """
import torch
import ladder_kernels as lk

torch.set_num_threads(1)
assert torch.set_flush_denormal(True)
for dtype in (torch.float32, torch.bfloat16):
    weight = (torch.linspace(-1, 1, 64 * 9 + 7) * 1e-42).to(dtype)
    packed = lk.quantize_nf4(weight.view(1, -1)).packed
    assert packed.numel() == 64 * 9 // 2 + 4
"""


@pytest.mark.parametrize("isa", ISAS)
def test_denormal_numbers_that_are_taken_for_zero(isa):
    """As in a process that loaded a library made with -ffast-math."""
    environment = {**os.environ, "LADDER_KERNELS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", _DENORMAL], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes(isa, dtype, use_isa, assert_same_bits):
    """Beside a number that is at least as large, so that all quotients occur."""
    use_isa(isa)
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    shuffled = numbers[torch.randperm(numbers.numel())]
    for weight in (numbers, shuffled, shuffled.abs().clamp(1e-3, 1.0)):
        assert_same(natively(weight, 32, False), by_reference(weight, 32, False), assert_same_bits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("divided", [False, True])
def test_numbers_beside_every_border(isa, divided, use_isa, quantize, assert_same_bits):
    """Where one bit decides, in blocks that are multiplied and in one that is divided."""
    use_isa(isa)
    code = torch.tensor(NF4_VALUES)
    borders = (code[:-1] + code[1:]) / 2
    steps = torch.arange(-40, 41, dtype=torch.int32)
    near = (borders.view(torch.int32).view(-1, 1) + steps).view(torch.float32)
    for scale in (1.0, 0.37, 3.0, 1e-20, 3e20, 1e-37, 1e-42):
        for row in near.unbind(1):
            block = torch.cat((row, torch.ones(1), row.flip(0), -torch.ones(1))) * scale
            weight = block if divided else block.repeat(4)
            ours = natively(weight, 64 if divided else 32, False)
            theirs = NF4Weight.from_bitsandbytes(*quantize(weight, ours.blocksize, False))
            assert_same(ours, theirs, assert_same_bits)


@pytest.mark.parametrize("isa", ISAS)
def test_a_fine_sweep(isa, use_isa, assert_same_bits):
    """From -1 to 1 in steps of 2^-20."""
    use_isa(isa)
    weight = torch.linspace(-1, 1, (1 << 21) + 1)[: 1 << 21].view(-1, 32)
    weight = torch.cat((weight, torch.ones(weight.shape[0], 32)), dim=1)
    assert_same(natively(weight, 64, False), by_reference(weight, 64, False), assert_same_bits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "scales",
    [
        torch.zeros(600),
        torch.full((600,), 1.5),
        torch.tensor([1.0, 1.0 + 2**-23]).repeat(300),
        torch.full((600,), 1e-42).index_fill_(0, torch.tensor([5]), 3e-42),
        torch.arange(1, 65800).float(),
        torch.tensor([3e38, 0.0, 1e-45]),
        torch.tensor([2.0]),
        torch.empty(0),
    ],
    ids=lambda scales: f"{scales.numel()}-{scales[:2].tolist()}",
)
def test_scales(isa, scales, use_isa, assert_same_bits):
    """Groups without spread, whose inverse is infinite, and the shorter group at the end."""
    use_isa(isa)
    ours = cpu.quantize_absmax(scales, name="w")
    for tensor, wanted in zip(ours, reference.quantize_absmax(scales, name="w"), strict=True):
        assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "bits",
    [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, 0x7F800000, -0x800000, 1, 0x00800000, 0x7F7FFFFF],
)
def test_scales_of_any_kind(isa, dtype, bits, use_isa, assert_same_bits):
    """NaN of any payload stays NaN; infinity, overflow and subnormal results are PyTorch's."""
    use_isa(isa)
    packed = torch.randint(0, 256, (150,), dtype=torch.uint8)
    absmax = torch.full((5,), bits, dtype=torch.int32).view(torch.float32)
    weight = NF4Weight(packed, absmax, (300,), 64, torch.float32)
    with use_backend("reference"):
        wanted = weight.dequantize(dtype)
    assert_same_bits(cpu.dequantize(weight, 0, 300, dtype), wanted)
    assert_same_bits(cpu.dequantize(weight, 3, 290, dtype), wanted[3:290])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(isa, dtype, use_isa, assert_same_bits):
    use_isa(isa)
    weight = torch.randn(1501, 1801).to(dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        ours = natively(weight, double_quant=False)  # PyTorch's mean depends on threads
        results.append((ours, cpu.dequantize(ours, 70001, 2500001, dtype)))
    for ours, values in results[1:]:
        assert_same(ours, results[0][0], assert_same_bits)
        assert_same_bits(values, results[0][1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(isa, dtype, bad, use_isa):
    """Wherever it stands: said as the reference says it."""
    use_isa(isa)
    clean = torch.randn(3, PIECE + 21).to(dtype)
    for at in (0, 63, 64, PIECE - 1, PIECE, 2 * PIECE + 5, clean.numel() - 64, clean.numel() - 1):
        weight = clean.clone()
        weight.view(-1)[at] = bad
        messages = []
        for quantise in (natively, by_reference):
            with pytest.raises(NonFiniteError) as caught:
                quantise(weight)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert torch.isfinite(natively(clean).dequantize()).all()


def test_not_finite_where_several_threads_look(use_isa):
    use_isa(ISAS[0])
    weight = torch.randn(9, PIECE)
    weight[2, 3] = weight[7, 5] = float("nan")
    torch.set_num_threads(4)
    with pytest.raises(NonFiniteError, match=r"2 NaN of .* the first at \[2, 3\]"):
        natively(weight)


def test_nan_of_any_sign_and_payload():
    for bits in (0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF):
        for numel in (64, 40):
            weight = torch.randn(numel)
            weight.view(torch.int32)[17] = bits
            with pytest.raises(NonFiniteError, match=r"1 NaN of .* the first at \[17\]"):
                natively(weight)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t(),
        lambda w: w[::2],
        lambda w: w.view(-1)[1::3],
        lambda w: w[3:, 1:],
        lambda w: w.view(8, 12, 70).permute(2, 0, 1),
        lambda w: w[:1].expand(5, -1),
        lambda w: w.view(-1)[1:],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_offsets(view, dtype, assert_same_bits):
    weight = view(torch.randn(96, 70).to(dtype))
    assert_same(natively(weight), by_reference(weight), assert_same_bits)


def test_parameters_of_bitsandbytes(assert_same_bits):
    from bitsandbytes.nn import Params4bit

    weight = torch.randn(40, 64)
    parameter = Params4bit(weight.clone(), requires_grad=False)
    assert_same(natively(parameter), by_reference(weight), assert_same_bits)


# Which of the two runs ------------------------------------------------------------------------


def test_what_is_chosen():
    weight = torch.randn(4, 64)
    for name, chosen in (("auto", True), ("cpu", True), ("reference", False), ("triton", False)):
        with use_backend(name):
            assert cpu.is_chosen(weight, torch.bfloat16) is chosen
            assert not cpu.is_chosen(weight, torch.float64)
            assert not cpu.is_chosen(weight.to("meta"), torch.float32)
            with FakeTensorMode():
                assert not cpu.is_chosen(torch.randn(4, 64), torch.float32)


def test_a_real_weight_under_a_fake_mode():
    weight = natively(torch.randn(4, 64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = weight.dequantize(torch.bfloat16)
    assert (out.shape, out.dtype) == ((4, 64), torch.bfloat16)


def test_a_trace_computes_what_it_saw(assert_same_bits):
    """Not constants: another weight's tensors give that weight's values."""
    first, second = natively(torch.randn(4, 64)), natively(torch.randn(4, 64))

    def values(packed, absmax, nested_absmax):
        nested = (nested_absmax, first.nested_code, first.nested_offset)
        return NF4Weight(packed, absmax, (4, 64), 64, torch.float32, *nested).dequantize()

    inputs = (first.packed, first.absmax, first.nested_absmax)
    traced = make_fx(values)(*inputs)
    others = (second.packed, second.absmax, second.nested_absmax)
    assert_same_bits(traced(*inputs), first.dequantize())
    assert_same_bits(traced(*others), values(*others))


def test_dispatch_modes_see_every_step():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    seen = set()
    weight = natively(torch.randn(4, 64))
    with Watch():
        weight.dequantize()
    assert torch.ops.aten.index_select.default in seen


@pytest.fixture
def _no_native_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "MODULE", "ladder_kernels.native._no_such_library")
    native.load.cache_clear()
    backend.warn_once.cache_clear()
    yield
    native.load.cache_clear()
    backend.warn_once.cache_clear()


@pytest.mark.usefixtures("_no_native_library")
def test_without_a_library(assert_same_bits):
    tensor = torch.randn(5, 70)
    with pytest.warns(BackendFallbackWarning, match="instead of their 'cpu' kernels: the native"):
        weight = quantize_nf4(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(quantize_nf4(tensor), by_reference(tensor), assert_same_bits)
        values = weight.dequantize()
    with use_backend("reference"):
        assert_same_bits(values, weight.dequantize())
    for ask in (lambda: quantize_nf4(tensor), weight.dequantize):
        with (
            use_backend("cpu"),
            pytest.raises(BackendError, match="nf4: backend 'cpu' cannot run this call: the nat"),
        ):
            ask()
