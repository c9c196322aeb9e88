"""Every Triton kernel as compiled for NVIDIA GPUs: its PTX, executed on the CPU, against float64.

bfloat16 and float16, ragged sizes, in lockstep and warp by warp in both orders, which shows missing
barriers; every access is checked for bounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import executing
from ladder_kernels.audit.audit import kernels
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.ops.nf4_linear.configurations import Configuration, using
from ladder_kernels.ops.nf4_linear_int8 import gpu as int8
from ladder_kernels.ops.nf4_linear_int8 import reference
from tests.ops.int8_support import exactly

BF16, FP16 = torch.bfloat16, torch.float16
RUNS = [
    pytest.param({"target": 86}, BF16, id="sm_86-bf16-lockstep"),
    pytest.param({"target": 86, "lockstep": False}, FP16, id="sm_86-fp16-warps"),
    pytest.param(
        {"target": 86, "lockstep": False, "reverse": True}, BF16, id="sm_86-bf16-reversed"
    ),
    pytest.param(
        {"target": 120, "lockstep": False, "reverse": True}, FP16, id="sm_120-fp16-reversed"
    ),
]
FUSED = Configuration("fused", 32, 32, 32, num_warps=4, num_stages=3)
WAYS = {
    "fused": FUSED,
    "fused, split": Configuration("fused", 16, 32, 64, splits=3, num_warps=4, num_stages=2),
    "fused, tiles share scales": Configuration("fused", 32, 32, 32, 2, 1, 4, 3),
    "rows": Configuration("rows", block_n=4, block_k=128, num_warps=2, num_stages=2),
    "unpacked": Configuration("unpacked", workspace_bytes=1 << 13),
}

runs = pytest.mark.parametrize(("machine", "dtype"), RUNS)


def _randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def _weight(rows: int, columns: int) -> NF4Weight:
    return quantize_nf4(torch.randn(rows, columns) / columns**0.5)


def _check(assert_as_accurate: Any, actual: Any, plain: Any, *inputs: torch.Tensor) -> None:
    """``actual`` against ``plain(*inputs)`` in the same dtype and in float64."""
    assert_as_accurate(actual, plain(*inputs), plain(*(each.double() for each in inputs)))


@runs
@pytest.mark.parametrize("way", WAYS)
def test_nf4_linear(assert_as_accurate, machine, dtype, way):
    weight = _weight(72, 320)
    dense = weight.dequantize(dtype)
    x, bias, residual = (_randn(*s, dtype=dtype) for s in ((37, 320), (72,), (37, 72)))
    x.requires_grad_()
    with executing(**machine) as launches, using(WAYS[way]):
        y = ops.nf4_linear(x, weight, bias, residual)
        (dx,) = torch.autograd.grad(y, x, residual)
    assert launches
    exact = x.detach().double() @ dense.double().t() + bias.double() + residual.double()
    same = x.detach() @ dense.t() + bias + residual
    assert_as_accurate(y.detach(), same, exact)
    assert_as_accurate(dx, residual @ dense, residual.double() @ dense.double())


@runs
@pytest.mark.parametrize("columns", [96, 100])  # whole blocks a row, and blocks that straddle rows
def test_nf4_linear_where_rows_and_blocks_do_not_fit(assert_as_accurate, machine, dtype, columns):
    weight = _weight(40, columns)
    dense, x = weight.dequantize(dtype), _randn(19, columns, dtype=dtype)
    with executing(**machine), using(FUSED):
        y = ops.nf4_linear(x, weight)
    assert_as_accurate(y, x @ dense.t(), x.double() @ dense.double().t())


@runs
@pytest.mark.parametrize("way", ["fused", "unpacked"])
def test_nf4_swiglu(assert_as_accurate, machine, dtype, way):
    gate, up = _weight(48, 128), _weight(48, 128)
    dense = [weight.dequantize(dtype) for weight in (gate, up)]
    x, grad = _randn(21, 128, dtype=dtype), _randn(21, 48, dtype=dtype)

    def plain(to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().to(to).requires_grad_()
        y = silu(leaf @ dense[0].to(to).t()) * (leaf @ dense[1].to(to).t())
        return y.detach(), torch.autograd.grad(y, leaf, grad.to(to))[0]

    leaf = x.detach().requires_grad_()
    with executing(**machine), using(WAYS[way]):
        y = ops.nf4_swiglu(leaf, gate, up)
        (dx,) = torch.autograd.grad(y, leaf, grad)
    for actual, same, exact in zip(
        (y.detach(), dx), plain(dtype), plain(torch.float64), strict=True
    ):
        assert_as_accurate(actual, same, exact)


INT8 = {
    "tile": Configuration("fused", 32, 32, 64, num_warps=4, num_stages=3),
    "split": Configuration("fused", 16, 32, 64, splits=2, num_warps=4, num_stages=2),
}


@pytest.fixture(params=["prmt", "portable"])
def decoder(request, monkeypatch):
    """How NVIDIA's GPUs decode nibbles to int8, and how others do."""
    if request.param == "portable":
        monkeypatch.setattr(int8, "takes_ptx", lambda device: False)


@runs
@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("way", INT8)
def test_nf4_linear_int8(assert_as_accurate, machine, dtype, way):
    weight = _weight(72, 320)
    x, bias, residual = (_randn(*s, dtype=dtype) for s in ((37, 320), (72,), (37, 72)))
    with executing(**machine) as launches, using(INT8[way]):
        y = ops.nf4_linear_int8(x, weight, bias, residual)
    assert len(launches) == (2 if way == "tile" else 3)
    same = reference.nf4_linear_int8(x, weight, bias, residual)
    assert_as_accurate(y, same, exactly(x, weight, bias, residual))


@runs
@pytest.mark.usefixtures("decoder")
def test_nf4_swiglu_int8(assert_as_accurate, machine, dtype):
    gate, up = _weight(40, 192), _weight(40, 192)
    x = _randn(37, 192, dtype=dtype)
    with executing(**machine), using(INT8["tile"]):
        y = ops.nf4_swiglu_int8(x, gate, up)
    with ops.use_backend("reference"):
        same = ops.nf4_swiglu_int8(x, gate, up)
    assert_as_accurate(y, same, silu(exactly(x, gate)) * exactly(x, up))


@runs
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("columns", "blocksize"), [(70, 64), (72, 64), (96, 32), (4100, 4096)])
def test_nf4_bits(machine, dtype, double_quant, columns, blocksize):
    weight = _randn(33, columns, dtype=dtype)
    with ops.use_backend("reference"):
        expected = quantize_nf4(weight, blocksize=blocksize, double_quant=double_quant)
        dense = expected.dequantize(dtype)
    with executing(**machine) as launches:
        packed = quantize_nf4(weight, blocksize=blocksize, double_quant=double_quant)
        unpacked = expected.dequantize(dtype)
    assert len(launches) == 2
    # Where packed words are whole ones, bytes are permuted.
    assert ("0x4051" in launches[1].compiled.asm["ptx"]) is (33 * columns % 8 == 0)
    for name, value in expected.tensors().items():
        assert torch.equal(value, packed.tensors()[name]), name
    assert torch.equal(dense, unpacked)


@runs
@pytest.mark.parametrize("mode", ["sum", "gate", "channel"])
def test_rung_merge(assert_as_accurate, machine, dtype, mode):
    side, grad = _randn(35, 24, dtype=dtype), _randn(35, 24, dtype=dtype)
    taps = [_randn(35, 72, dtype=dtype) * 5 for _ in range(2)]
    downs = [_randn(24, 72, dtype=dtype) / 9 for _ in range(2)]
    shape = {"sum": None, "gate": (1,), "channel": (24,)}[mode]
    gate = None if shape is None else torch.rand(shape).to(dtype)

    def leaves(to: torch.dtype) -> list[torch.Tensor]:
        given = [side, *downs, *([] if gate is None else [gate])]
        return [each.detach().to(to).requires_grad_() for each in given]

    def plain(to: torch.dtype) -> list[torch.Tensor]:
        stream, *rest = leaves(to)
        z: Any = 0
        for tap, down in zip(taps, rest, strict=False):
            wide = tap.to(to)
            z = z + wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) @ down.t()
        out = stream + z if gate is None else rest[2] * stream + (1 - rest[2]) * z
        return [out.detach(), *torch.autograd.grad(out, [stream, *rest], grad.to(to))]

    own = leaves(dtype)
    with executing(**machine):
        out = ops.rung_merge(own[0], taps, own[1:3], own[3] if gate is not None else None, mode)
        found = [out.detach(), *torch.autograd.grad(out, own, grad)]
    for actual, same, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
        assert_as_accurate(actual, same, exact)


@runs
@pytest.mark.parametrize(("width", "inner"), [(36, 56), (72, 40), (144, 24)])
def test_side_mlp(assert_as_accurate, machine, dtype, width, inner):
    shapes = ((37, width), (width,), (inner, width), (inner, width), (width, inner))
    inputs = [torch.randn(shape) / max(1, shape[-1] // 4) ** 0.5 for shape in shapes]
    inputs, grad = [each.to(dtype) for each in inputs], _randn(37, width, dtype=dtype)

    def plain(to: torch.dtype) -> list[torch.Tensor]:
        u, norm, gate, up, down = leaves = [
            each.detach().to(to).requires_grad_() for each in inputs
        ]
        x = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
        out = u + (silu(x @ gate.t()) * (x @ up.t())) @ down.t()
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    leaves = [each.detach().requires_grad_() for each in inputs]
    with executing(**machine):
        out = ops.side_mlp(*leaves)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for actual, same, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
        assert_as_accurate(actual, same, exact)


@runs
@pytest.mark.parametrize("head_in", ["dense", "NF4"])
def test_linear_cross_entropy(assert_as_accurate, machine, dtype, head_in):
    hidden = _randn(21, 64, dtype=dtype).requires_grad_()
    packed = _weight(200, 64)
    dense = packed.dequantize(dtype).requires_grad_()
    labels = torch.randint(0, 200, (21,))
    labels[::4] = -100

    def plain(to: torch.dtype) -> list[torch.Tensor]:
        leaves = [hidden.detach().to(to).requires_grad_(), dense.detach().to(to).requires_grad_()]
        logits = leaves[0] @ leaves[1].t()
        loss = torch.nn.functional.cross_entropy(
            logits.to(torch.promote_types(to, torch.float32)), labels
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    with executing(**machine):
        if head_in == "dense":
            loss = ops.linear_cross_entropy(hidden, dense, labels)
            found = [loss.detach(), *torch.autograd.grad(loss, (hidden, dense))]
        else:
            loss = ops.linear_cross_entropy(hidden, packed, labels)
            found = [loss.detach(), *torch.autograd.grad(loss, hidden)]
    for actual, same, exact in zip(found, plain(dtype), plain(torch.float64), strict=False):
        assert_as_accurate(actual, same, exact)


@runs
def test_rms_norm(assert_as_accurate, machine, dtype):
    x, weight, grad = (_randn(*s, dtype=dtype) for s in ((5, 300), (300,), (5, 300)))

    def plain(to: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(to).requires_grad_(), weight.detach().to(to).requires_grad_()]
        wide = leaves[0].to(torch.promote_types(to, torch.float32))
        normal = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(to)
        out = leaves[1] * normal
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    residual = _randn(5, 300, dtype=dtype)
    with executing(**machine):
        out = ops.rms_norm(leaves[0], leaves[1], 1e-5)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        y, total = ops.rms_norm(x, weight, 1e-5, residual)
    for actual, same, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
        assert_as_accurate(actual, same, exact)
    assert torch.equal(total, x + residual)
    with ops.use_backend("reference"):
        again = ops.rms_norm(total, weight, 1e-5)
    # One rounding before the weight and one after it, of a row whose mean was summed otherwise.
    assert (y.double() - again.double()).abs().max() <= 2 * torch.finfo(
        dtype
    ).eps * again.abs().max()


@runs
def test_rotary(assert_as_accurate, machine, dtype):
    q, k = _randn(1, 7, 3, 32, dtype=dtype), _randn(1, 7, 1, 32, dtype=dtype)
    angle = torch.rand(1, 7, 1, 16) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def plain(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    turned = [q.clone(), k.clone()]
    with executing(**machine):
        ops.rotary_(*turned, cos, sin)
    for actual, x in zip(turned, (q, k), strict=True):
        _check(assert_as_accurate, actual, plain, x)


def test_every_kernel_is_executed_by_these_tests():
    """The list of what the calls above launch; a new kernel has to be brought in."""
    dtype = torch.bfloat16
    with executing() as launches:
        for way in ("fused, split", "rows", "unpacked"):
            with using(WAYS[way]):
                weight = _weight(32, 128)
                x = _randn(17, 128, dtype=dtype).requires_grad_()
                ops.nf4_linear(x, weight).sum().backward()
                ops.nf4_swiglu(x, weight, weight).sum().backward()
        ops.nf4_linear_int8(x.detach(), weight)
        ops.nf4_swiglu_int8(x.detach(), weight, weight)
        side = _randn(8, 16, dtype=dtype).requires_grad_()
        gate = torch.rand(1).to(dtype).requires_grad_()
        down = _randn(16, 64, dtype=dtype).requires_grad_()
        ops.rung_merge(side, [_randn(8, 64, dtype=dtype)], [down], gate).sum().backward()
        weights = [_randn(*s, dtype=dtype) for s in ((16,), (24, 16), (24, 16), (16, 24))]
        ops.side_mlp(side, *(each.requires_grad_() for each in weights)).sum().backward()
        hidden, head = _randn(8, 64, dtype=dtype).requires_grad_(), down
        ops.linear_cross_entropy(hidden, head, torch.arange(8)).backward()
        ops.rms_norm(hidden, None, 1e-6).sum().backward()
        ops.rotary_(*(_randn(1, 2, 1, size, dtype=dtype) for size in (16, 16, 8, 8)))
    launched = {launch.name for launch in launches}
    assert launched == {name.rpartition(".")[2] for name in kernels()}
