"""The Triton products with NF4 weights against float64, in the interpreter."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from ladder_kernels import ops
from ladder_kernels.audit import executing, interpreting
from ladder_kernels.audit.ptx import MemoryAccessError
from ladder_kernels.errors import BackendError
from ladder_kernels.nf4 import gpu as nf4_gpu
from ladder_kernels.nf4 import permute, quantize_nf4
from ladder_kernels.ops import _nf4_args
from ladder_kernels.ops.nf4_linear import configurations, gpu
from ladder_kernels.ops.nf4_linear.configurations import Configuration, using

# The interpreter miscomputes products of bfloat16.
DTYPES = [torch.float32, torch.float16]
CONFIGURATIONS = {
    "rows": Configuration("rows", block_n=16, block_k=128),
    "rows of one block": Configuration("rows", block_n=32, block_k=32),
    "fused": Configuration("fused", 16, 32, 64),
    "scales shared": Configuration("fused", 32, 16, 32, parts=2),
    "splits": Configuration("fused", 16, 32, 32, splits=3),
    "splits and parts": Configuration("fused", 16, 64, 32, parts=2, splits=2),
    "wide": Configuration("fused", 16, 16, 128),
    "unpacked": Configuration("unpacked"),
    "unpacked in pieces": Configuration("unpacked", workspace_bytes=8000),
}
EVERY = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))


def plain(x, weight, bias=None, residual=None):
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def within_nan(value):
    """The same matrix, its rows apart and with NaN around them."""
    rows, columns = value.shape
    around = torch.full((rows + 2, columns + 7), float("nan"), dtype=value.dtype)
    inner = around[1:-1, 3 : 3 + columns]
    return inner.copy_(value)


def check(
    assert_as_accurate,
    M,
    N,
    K,
    dtype=torch.float32,
    blocksize=64,
    double_quant=True,
    addends=(True, True),
    seed=0,
    module=gpu,
    machine=interpreting,
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = quantize_nf4(make(N, K), blocksize=blocksize, double_quant=double_quant)
    x, grad = make(M, K), make(M, N)
    bias = make(N) if addends[0] else None
    residual = make(M, N) if addends[1] else None
    dense = weight.dequantize(dtype)
    wide = [None if t is None else t.double() for t in (x, dense, bias, residual)]
    with machine():
        y = module.nf4_linear(
            within_nan(x), weight, bias, None if residual is None else within_nan(residual)
        )
        back = module.nf4_linear_transposed(within_nan(grad), weight)
        added = module.nf4_linear_transposed(grad, weight, within_nan(x))
    assert_as_accurate(y, plain(x, dense, bias, residual), plain(*wide))
    exact = grad.double() @ dense.double()
    assert_as_accurate(back, grad @ dense, exact)
    assert_as_accurate(added, grad @ dense + x, exact + x.double())


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    configuration=st.sampled_from(list(CONFIGURATIONS.values())),
    dtype=st.sampled_from(DTYPES),
    M=st.integers(2, 20),
    N=st.integers(2, 40),
    K=st.one_of(st.integers(1, 150), st.sampled_from([32, 64, 96, 128, 160])),
    blocksize=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    addends=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_values(
    assert_as_accurate, configuration, dtype, M, N, K, blocksize, double_quant, addends, seed
):
    with using(configuration):
        check(assert_as_accurate, M, N, K, dtype, blocksize, double_quant, addends, seed)


@EVERY
@pytest.mark.parametrize("shape", [(5, 20, 160), (3, 19, 45)], ids=["blocks", "anywhere"])
def test_every_way(assert_as_accurate, configuration, shape):
    with using(configuration):
        check(assert_as_accurate, *shape)


@EVERY
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_weight_is_rounded_to_the_dtype_of_x(configuration, double_quant):
    """With x a unit vector the product is the dequantised weight itself, bit for bit."""
    weight = quantize_nf4(torch.randn(20, 128) * 3 + 0.2, double_quant=double_quant)
    dense = weight.dequantize(torch.float16)
    x, grad = torch.eye(128).half()[60:68], torch.eye(20).half()
    with interpreting(), using(configuration):
        assert torch.equal(gpu.nf4_linear(x, weight), dense.t()[60:68])
        assert torch.equal(gpu.nf4_linear_transposed(grad, weight), dense)


def test_more_blocks_than_share_a_second_level_scale(assert_as_accurate):
    with using(Configuration("fused", 16, 64, 64, splits=2)):
        check(assert_as_accurate, 3, 140, 160, blocksize=32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_is_written_beside_the_result(transposed, splits):
    weight = quantize_nf4(torch.randn(37, 96), blocksize=32)
    width = weight.shape[1 if transposed else 0]
    x = torch.randn(5, weight.shape[0 if transposed else 1])
    buffer = torch.full((5 * width + 200,), float("nan"))
    out = buffer[100:-100].view(5, width)
    configuration = Configuration("fused", 16, 32, 64, splits=splits)
    with interpreting():
        gpu._run_fused(x, weight, None, None, out, configuration, transposed=transposed)
    assert out.isfinite().all()
    assert buffer[:100].isnan().all()
    assert buffer[-100:].isnan().all()


def test_rows_write_nothing_beside_the_result():
    weight = quantize_nf4(torch.randn(37, 96), blocksize=32)
    buffer = torch.full((3 * 37 + 200,), float("nan"))
    out = buffer[100:-100].view(3, 37)
    with interpreting():
        gpu._run_rows(torch.randn(3, 96), weight, None, None, out, CONFIGURATIONS["rows"])
    assert out.isfinite().all()
    assert buffer[:100].isnan().all()
    assert buffer[-100:].isnan().all()


def test_the_workspace_keeps_its_budget(recorder, monkeypatch):
    weight = quantize_nf4(torch.randn(64, 128))
    x, grad = torch.randn(2, 128), torch.randn(2, 64)
    # What is watched is the workspace; the interpreter makes tensors of its own.
    monkeypatch.setattr(gpu, "dequantize_into", lambda dense, *_: dense.zero_())
    with interpreting(), using(Configuration("unpacked", workspace_bytes=64 * 64 * 4)), recorder:
        gpu.nf4_linear(x, weight)
        gpu.nf4_linear_transposed(grad, weight)
    assert recorder.largest == 64 * 64


@given(length=st.integers(1, 40000), most=st.integers(1, 40000))
def test_pieces_are_even_and_of_whole_tiles(length, most):
    size = gpu.piece(length, most)
    assert 1 <= size <= min(length, most)
    count = -(-length // size)
    if most < 256:
        assert size == min(length, most)
    elif most < length:
        assert size % 256 == 0  # vectors can be read wherever a piece begins
        assert count == -(-length // (most // 256 * 256))
        assert size - (length - (count - 1) * size) < 256 * count


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_public_operation(assert_as_accurate, dtype):
    weight = quantize_nf4(torch.randn(40, 96), blocksize=32)
    x, grad = torch.randn(2, 9, 96).to(dtype), torch.randn(2, 9, 40).to(dtype)
    bias, residual = torch.randn(40).to(dtype), torch.randn(2, 9, 40).to(dtype)

    def compute(function, to, of):
        leaves = [t.detach().to(to).requires_grad_() for t in (x, bias, residual)]
        out = function(leaves[0], of, *leaves[1:])
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    dense = weight.dequantize(dtype)
    with interpreting():
        actual = compute(ops.nf4_linear, dtype, weight)
    same = compute(plain, dtype, dense)
    exact = compute(plain, torch.float64, dense.double())
    for ours, theirs, true in zip(actual, same, exact, strict=True):
        assert_as_accurate(ours, theirs, true)


def test_opcheck():
    weight = _nf4_args.flatten(quantize_nf4(torch.randn(8, 6), blocksize=32))
    x, bias = torch.randn(2, 3, 6, requires_grad=True), torch.randn(8, requires_grad=True)
    operators = torch.ops.ladder_kernels
    with interpreting():
        opcheck(operators.nf4_linear.default, (x, *weight, bias, torch.randn(2, 3, 8)))
        opcheck(operators.nf4_linear_transposed.default, (torch.randn(3, 8), *weight))


@pytest.mark.parametrize(("M", "N", "K"), [(0, 8, 32), (3, 0, 32), (3, 8, 0)])
@pytest.mark.parametrize("way", ["rows", "fused", "unpacked"])
def test_nothing_to_do(M, N, K, way):
    weight = quantize_nf4(torch.randn(N, K), double_quant=False)
    bias = torch.randn(N)
    with interpreting(), using(CONFIGURATIONS[way]):
        out = gpu.nf4_linear(torch.randn(M, K), weight, bias)
        back = gpu.nf4_linear_transposed(torch.randn(M, N), weight)
    assert torch.equal(out, bias.expand(M, N))
    assert torch.equal(back, torch.zeros(M, K))


def test_bfloat16_is_refused_by_the_interpreter():
    weight, x = quantize_nf4(torch.randn(8, 64)), torch.randn(3, 64).bfloat16()
    with interpreting(), pytest.raises(BackendError, match="miscomputes matrix products"):
        ops.nf4_linear(x, weight)
    with interpreting(), pytest.raises(BackendError, match="miscomputes matrix products"):
        ops.nf4_linear_transposed(x[:, :8], weight)


BROKEN = {
    "nibble order": (
        nf4_gpu,
        "tl.join(high, low)",
        "tl.join(low, high)",
    ),
    "nibble order of permuted bytes": (permute, "tl.join(even, odd)", "tl.join(odd, even)"),
    "nested scale": (
        nf4_gpu,
        "(block + further >> log2(_NESTED))",
        "(block >> log2(_NESTED))",
    ),
    "offset of the nested scale": (nf4_gpu, " * largest + offset", " * largest"),
    "mask of the columns of x": (gpu, "x_inside &= (column < left_over)[None, :]", "pass"),
    "mask of the rows of grad": (gpu, "[:, None] & n_inside[None, :], other", "[:, None], other"),
    "scale of a later block": (nf4_gpu, "absmax + further + block", "absmax + block"),
}


def broken_gpu(tmp_path, home, right, wrong):
    """Copies of the modules from ``home`` on, the first of them wrong; returns that of ``gpu``.

    The kernels are new ones: Triton would take what it has compiled of the old ones before.
    """
    chain = (permute, nf4_gpu, gpu)
    before = {}
    for original in chain[chain.index(home) :]:
        source = Path(original.__file__).read_text()
        if original is home:
            assert right in source
            source = source.replace(right, wrong)
        path = tmp_path / f"broken_{original.__name__.replace('.', '_')}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        vars(module).update({name: before[name] for name in before.keys() & vars(module).keys()})
        before = {k: v for k, v in vars(module).items() if isinstance(v, JITFunction)}
    return module


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        pytest.param(machine, name, id=f"{way}-{name}")
        for way, machine in (("interpreted", interpreting), ("compiled", executing))
        for name in BROKEN
        # The interpreter knows no PTX, and no kernel permutes bytes there.
        if machine is executing or BROKEN[name][0] is not permute
    ],
)
def test_wrong_nibbles_scales_and_masks_are_caught(assert_as_accurate, tmp_path, machine, name):
    """In Triton's interpreter, and in the PTX compiled of the same wrong source."""
    home, right, wrong = BROKEN[name]
    module = broken_gpu(tmp_path, home, right, wrong)
    call = {"M": 5, "N": 135, "K": 160, "blocksize": 32, "machine": machine}
    # For numbers of 16 bits, compiled code permutes bytes.
    gathers = machine is interpreting or name == "nibble order"
    call["dtype"] = torch.float32 if gathers else torch.float16
    with using(Configuration("fused", 16, 128, 64)):
        # Compiled code must not touch what is not there, either.
        with pytest.raises((AssertionError, MemoryAccessError)):
            check(assert_as_accurate, **call, module=module)
        check(assert_as_accurate, **call)


ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx1100", "gfx1201")


PRODUCTS = ("forward", "transposed", "gated", "int8", "gated_int8")


def test_the_table_knows_every_call():
    for name, product, dtype, rows, numbers in itertools.product(
        (*ARCHITECTURES, *AMD),
        PRODUCTS,
        (torch.float16, torch.bfloat16, torch.float32),
        (1, 2, 3, 16, 17, 64, 128, 2048, 1 << 20),
        (1 << 10, 1 << 24),
    ):
        if name == "sm_75" and "int8" in product:
            continue  # the operations say that they cannot run there
        row = configurations.look_up(name, product, dtype, rows, numbers)
        assert row.configuration.way != "rows" or product == "forward"
        assert row.configuration.way == "fused" or "int8" not in product
        assert name in row.architectures


def test_an_unknown_architecture_takes_the_nearest_older_one():
    def found(name):
        return configurations.look_up(name, "forward", torch.bfloat16, 300, 1 << 24)

    assert found("sm_87") == found("sm_86")
    assert found("sm_103") == found("sm_100")
    assert found("sm_70") == found("sm_75")
    assert found("gfx1030") == found("gfx942")


def test_every_row_of_the_table_is_reachable_and_says_what_it_rests_on():
    reached = set()
    for row in configurations.TABLE:
        assert row.evidence in ("modelled", "measured")
    for name, product, dtype in itertools.product(
        (*ARCHITECTURES, *AMD), PRODUCTS, (torch.half, torch.float32)
    ):
        if name == "sm_75" and "int8" in product:
            continue
        for rows, numbers in itertools.product(
            (1, 3, 8, 16, 64, 128, 256, 999, 4000), (9, 1 << 24)
        ):
            reached.add(configurations.look_up(name, product, dtype, rows, numbers))
    assert reached == set(configurations.TABLE)


def test_a_weight_whose_blocks_begin_anywhere_takes_small_tiles():
    weight = quantize_nf4(torch.randn(8, 45), blocksize=32)
    few, many = (configurations.choose("forward", torch.randn(n, 45), weight) for n in (16, 17))
    assert (few.way, many.way) == ("fused", "unpacked")
    with interpreting():
        out = gpu.nf4_linear(torch.eye(45)[:3], weight)
    assert torch.equal(out, weight.dequantize().t()[:3])


def test_a_forced_configuration_holds_inside_only():
    weight, x = quantize_nf4(torch.randn(8, 64)), torch.randn(3, 64)
    before = configurations.choose("forward", x, weight)
    with using(CONFIGURATIONS["rows"]):
        assert configurations.choose("forward", x, weight) == CONFIGURATIONS["rows"]
        assert configurations.choose("transposed", x, weight).way != "rows"
        with using(CONFIGURATIONS["unpacked"]):
            assert configurations.choose("gated", x, weight).way == "unpacked"
            assert configurations.choose("int8", x, weight).way == "fused"
    assert configurations.choose("forward", x, weight) == before
