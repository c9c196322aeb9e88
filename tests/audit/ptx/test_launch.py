"""Kernels that Triton compiles for several GPUs, against references in float64."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from ladder_kernels.errors import BackendError

pytest.importorskip("triton")

import triton
import triton.language as tl

from ladder_kernels.audit.ptx import (
    Kernel,
    MemoryAccessError,
    PTXError,
    Schedule,
    UnsupportedInstructionError,
    execute,
    executing,
)
from ladder_kernels.backend import get_backend, use_backend
from ladder_kernels.launch import host


@pytest.fixture(autouse=True)
def _fusion(monkeypatch):
    # Triton warns where this is left to its default, which is about to change.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


_ORDERS = [
    {"lockstep": True},
    {"lockstep": False},
    {"lockstep": False, "reverse": True},
    {"lockstep": True, "late_copies": False},
]


@triton.jit
def _elementwise(x, y, z, N, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < N
    a = tl.load(x + places, mask=mask).to(tl.float32)
    b = tl.sigmoid(a) * tl.exp(a) + tl.rsqrt(a * a + 1) + tl.where(a > 0, tl.log(a + 1), -a)
    if z is not None:
        b += tl.load(z + places, mask=mask).to(tl.float32)
    tl.store(y + places, b.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _softmax(x, y, N, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    a = tl.load(x + row * stride + columns, mask=columns < N, other=-float("inf")).to(tl.float32)
    e = tl.exp(a - tl.max(a, 0))
    tl.store(y + row * N + columns, (e / tl.sum(e, 0)).to(y.dtype.element_ty), mask=columns < N)


@triton.jit
def _gemm(
    a,
    b,
    c,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    kind: tl.constexpr = c.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), kind)
    for k in range(0, K, BLOCK_K):
        left = tl.load(
            a + rows[:, None].to(tl.int64) * K + k + inner[None, :],
            mask=(rows[:, None] < M) & (k + inner[None, :] < K),
            other=0.0 if kind.is_floating() else 0,
        )
        right = tl.load(
            b + columns[None, :].to(tl.int64) * K + k + inner[:, None],
            mask=(columns[None, :] < N) & (k + inner[:, None] < K),
            other=0.0 if kind.is_floating() else 0,
        )
        total = tl.dot(left, right, total, out_dtype=kind, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], total, mask=mask)


@triton.jit
def _gather(table, codes, y, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    values = tl.load(table + tl.arange(0, 16))
    code = tl.load(codes + places).to(tl.int32)
    tl.store(y + places, tl.gather(values, code & 15, 0) + 100 * tl.gather(values, code >> 4, 0))


@triton.jit
def _count(x, totals, most, N, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < N
    a = tl.load(x + places, mask=mask, other=0)
    tl.atomic_add(totals + a % 8, 1.0, mask=mask)
    tl.atomic_max(most, tl.max(a, 0))


@triton.jit
def _rounded(x, y, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(y + places, tl.load(x + places).to(y.dtype.element_ty))


@triton.jit
def _unmasked(x, y, N, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + places, tl.load(x + places), mask=places < N)


@triton.jit
def _angles(x, y, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    a = tl.load(x + places)
    tl.store(y + places, tl.sin(a) + 2 * tl.cos(a))


def _elementwise_reference(x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    a = x.double()
    b = a.sigmoid() * a.exp() + (a * a + 1).rsqrt() + torch.where(a > 0, (a + 1).log(), -a)
    return b if z is None else b + z.double()


@pytest.mark.parametrize(
    ("target", "dtype", "added"),
    [
        (75, torch.float16, True),
        (86, torch.bfloat16, False),
        (86, torch.float32, True),
        (120, torch.bfloat16, True),
    ],
)
def test_elementwise(target, dtype, added):
    x = torch.randn(1000).to(dtype)
    z = torch.randn(1000).to(dtype) if added else None
    y = torch.full((1000,), torch.nan, dtype=dtype)
    with executing(target) as launches:
        _elementwise[(4,)](x, y, z, 1000, BLOCK=256)
    exact = _elementwise_reference(x, z)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=max(eps / 2, 1e-6) * 1.01, atol=1e-6)
    (launch,) = launches
    assert (launch.name, launch.grid, launch.counters) == ("_elementwise", (4,), None)
    assert launch.executed > 16 * 20


@pytest.mark.parametrize(("target", "dtype"), [(80, torch.float32), (120, torch.bfloat16)])
@pytest.mark.parametrize("order", _ORDERS[:3])
def test_softmax_of_a_strided_view(target, dtype, order):
    x = torch.randn(7, 300).to(dtype)[:, :200]
    y = torch.full((7, 200), torch.nan, dtype=dtype)
    with executing(target, **order):
        _softmax[(7,)](x, y, 200, x.stride(0), BLOCK=256)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double(), x.double().softmax(1), rtol=max(eps / 2, 1e-5) * 1.01, atol=1e-8
    )


def _operands(dtype: torch.dtype, M: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    if dtype == torch.int8:
        return (
            torch.randint(-128, 128, (M, K), dtype=dtype),
            torch.randint(-128, 128, (N, K), dtype=dtype),
        )
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)


def _product(a: torch.Tensor, b: torch.Tensor, *, stages: int = 1, precision: str = "ieee"):
    M, N = len(a), len(b)
    exact_kind = a.dtype == torch.int8
    c = torch.full((M, N), -1, dtype=torch.int32 if exact_kind else torch.float32)
    grid = (triton.cdiv(M, 64), triton.cdiv(N, 32))
    _gemm[grid](
        a,
        b,
        c,
        M,
        N,
        a.shape[1],
        BLOCK_M=64,
        BLOCK_N=32,
        BLOCK_K=32,
        PRECISION=precision,
        num_stages=stages,
    )
    return c


@pytest.mark.parametrize(
    ("target", "dtype", "stages", "instruction"),
    [
        (75, torch.float16, 1, r"fma\.rn\.f32"),
        (80, torch.bfloat16, 2, r"mma\.sync\.aligned\.m16n8k16.*\.bf16"),
        (86, torch.float16, 4, r"mma\.sync\.aligned\.m16n8k16.*\.f16"),
        (86, torch.bfloat16, 3, r"cp\.async\.wait_group"),
        (89, torch.int8, 3, r"mma\.sync\.aligned\.m16n8k32.*\.s8"),
        (120, torch.bfloat16, 3, r"mma\.sync\.aligned\.m16n8k16.*\.bf16"),
        (120, torch.float8_e4m3fn, 1, r"mma\.sync\.aligned\.m16n8k32.*\.e4m3"),
    ],
)
def test_products_with_ragged_edges(target, dtype, stages, instruction):
    a, b = _operands(dtype, 70, 50, 144)
    exact = a.double() @ b.double().t()
    for order in _ORDERS if stages == 3 else _ORDERS[:1]:
        with executing(target, **order) as launches:
            c = _product(a, b, stages=stages)
        assert re.search(instruction, launches[0].compiled.asm["ptx"])
        scale = 0 if dtype == torch.int8 else 1e-6 * float(exact.abs().max())
        assert float((c - exact).abs().max()) <= scale


def test_products_in_tf32():
    a, b = _operands(torch.float32, 70, 50, 144)
    exact = a.double() @ b.double().t()
    with executing(86) as launches:
        c = _product(a, b, stages=2, precision="tf32")
    assert ".tf32" in launches[0].compiled.asm["ptx"]
    error = (c - exact).abs()
    # Ten bits of both factors' mantissas stay, cut off: far from exact, and no further.
    assert error.max() > 1e-5
    assert (error <= 2.01 * 2.0**-10 * (a.double().abs() @ b.double().abs().t())).all()


@pytest.mark.parametrize("target", [80, 120])
def test_gather(target):
    table, codes = torch.randn(16), torch.randint(0, 256, (512,), dtype=torch.uint8)
    y = torch.zeros(512)
    with executing(target):
        _gather[(1,)](table, codes, y, BLOCK=512)
    high, low = (codes >> 4).long(), (codes & 15).long()
    torch.testing.assert_close(y, table[low] + 100 * table[high], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", _ORDERS[:3])
def test_atomics(order):
    x = torch.randint(0, 1000, (700,), dtype=torch.int32)
    totals, most = torch.zeros(8), torch.zeros(1, dtype=torch.int32)
    with executing(86, **order):
        _count[(3,)](x, totals, most, 700, BLOCK=256)
    assert torch.equal(totals, torch.bincount(x % 8, minlength=8).float())
    assert most == x.max()


@pytest.mark.parametrize(
    ("target", "source", "goal"),
    [
        (75, torch.float32, torch.bfloat16),
        (86, torch.float16, torch.float8_e5m2),
        (89, torch.float32, torch.float8_e4m3fn),
        (120, torch.int32, torch.float16),
        (120, torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_conversions_round_as_torch_does(target, source, goal):
    x = (torch.randn(256) * 50).to(source)
    y = torch.zeros(256, dtype=goal)
    with executing(target):
        _rounded[(1,)](x, y, BLOCK=256)
    assert torch.equal(y.double(), x.to(goal).double())


def test_large_angles_take_the_slow_way():
    # It has a table, local memory, carries and loops of different lengths.
    x = torch.logspace(0, 9, 128)
    y = torch.zeros(128)
    with executing(86) as launches:
        _angles[(1,)](x, y, BLOCK=128)
    assert "__local_depot" in launches[0].compiled.asm["ptx"]
    torch.testing.assert_close(
        y.double(), x.double().sin() + 2 * x.double().cos(), rtol=0, atol=1e-6
    )


def test_specialisation_and_what_a_context_compiles():
    x, y = torch.randn(64), torch.zeros(64)
    with executing(86) as launches:
        _unmasked[(1,)](x, y, 64, BLOCK=64)
        _unmasked[(1,)](x, y, 48, BLOCK=64)
        _unmasked[lambda meta: (triton.cdiv(33, meta["BLOCK"]),)](x, y, 33, BLOCK=64)
        _unmasked[(1,)](x, y, 1, BLOCK=64)
        _unmasked[(1,)](x, y, 33, BLOCK=64, num_warps=2)
    first, second, third, fourth, fifth = (launch.compiled for launch in launches)
    assert first is second
    assert len({id(k) for k in (first, third, fourth, fifth)}) == 4
    divisible = "tt.divisibility"
    counts = [k.asm["ttir"].count(divisible) for k in (first, third, fourth)]
    assert counts == [3, 2, 2]
    assert "%N: i32" not in fourth.asm["ttir"]
    assert fifth.metadata.num_warps == 2
    assert launches[2].grid == (1,)


def test_pointers_off_a_boundary_are_not_said_to_be_aligned():
    x, y = torch.randn(65), torch.zeros(64)
    with executing(86) as launches:
        _unmasked[(1,)](x[1:], y, 64, BLOCK=64)
    assert torch.equal(y, x[1:])
    assert launches[0].compiled.asm["ttir"].count("tt.divisibility") == 2


def test_contexts_nest_and_restore():
    autotuned = triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 32})], [])(
        _unmasked
    )
    before = triton.JITFunction.run, type(autotuned).run
    x, y = torch.randn(64), torch.zeros(64)
    with executing(86) as outer:
        assert (get_backend(), host()) == ("triton", "executor")
        within = triton.JITFunction.run
        with executing(80) as inner:
            _unmasked[(1,)](x, y, 64, BLOCK=64)
        assert triton.JITFunction.run is within
        autotuned[(1,)](x, y, 64)
    with pytest.raises(ZeroDivisionError), executing(86):
        raise ZeroDivisionError
    assert (len(outer), len(inner)) == (1, 1)
    assert "sm_86" in outer[0].compiled.asm["ptx"]
    assert "sm_80" in inner[0].compiled.asm["ptx"]
    assert torch.equal(x, y)
    assert (triton.JITFunction.run, type(autotuned).run) == before
    assert (get_backend(), host()) == ("auto", None)


@pytest.mark.parametrize(("which", "offset"), [("x", 160), ("y", 0)])
def test_a_missing_mask_names_the_argument(which, offset):
    x = torch.randn(40 if which == "x" else 64)
    y = torch.zeros(64 if which == "x" else 0)
    with pytest.raises(MemoryAccessError, match="out-of-bounds") as caught, executing(86):
        _unmasked[(1,)](x, y, 64, BLOCK=64)
    error = caught.value
    assert (error.argument, error.offset, error.kernel) == (which, offset, "_unmasked")
    assert "test_launch.py:" in error.source


def test_a_mask_removed_from_compiled_code_is_caught():
    a, b = _operands(torch.bfloat16, 70, 50, 144)
    with executing(86) as launches:
        c = _product(a, b, stages=1)
    ptx = launches[0].compiled.asm["ptx"]
    guarded = list(re.finditer(r"@%p\d+ (?=(?:ld|st)\.global)", ptx))
    assert len(guarded) > 4
    for guard in (guarded[0], guarded[-1]):
        changed = ptx[: guard.start()] + ptx[guard.end() :]
        with pytest.raises(MemoryAccessError, match="out-of-bounds") as caught:
            _again(launches[0].compiled, changed, a, b, c.clone(), Schedule())
        assert caught.value.argument == ("a" if guard is guarded[0] else "c")


def _again(compiled, ptx, a, b, c, schedule):
    arguments = {"a": a, "b": b, "c": c, "M": len(a), "N": len(b), "K": a.shape[1]}
    grid = (triton.cdiv(len(a), 64), triton.cdiv(len(b), 32))
    execute(
        Kernel.parse(ptx),
        arguments,
        grid,
        warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        schedule=schedule,
    )
    return c


def _survives(compiled, ptx, a, b, exact, schedule) -> bool:
    """Whether changed code still gives the right product."""
    c = torch.full(exact.shape, torch.nan)
    try:
        _again(compiled, ptx, a, b, c, schedule)
    except PTXError:
        return False
    return bool((c - exact).abs().max() <= 1e-5 * exact.abs().max())


@pytest.mark.parametrize(("stages", "redundant"), [(1, 0), (3, 1)])
def test_removed_barriers_are_caught_when_warps_take_turns(stages, redundant):
    a, b = _operands(torch.bfloat16, 64, 32, 144)
    exact = a.double() @ b.double().t()
    with executing(86) as launches:
        _product(a, b, stages=stages)
    compiled = launches[0].compiled
    ptx = compiled.asm["ptx"]
    orders = [Schedule(lockstep=False, reverse=reverse) for reverse in (False, True)]
    assert all(_survives(compiled, ptx, a, b, exact, order) for order in orders)
    barriers = list(re.finditer(r"bar\.sync\s+0;", ptx))
    assert len(barriers) >= 3
    missed = 0
    for barrier in barriers:
        changed = ptx[: barrier.start()] + ptx[barrier.end() :]
        missed += all(_survives(compiled, changed, a, b, exact, order) for order in orders)
        # In lockstep none of them is missed.
        assert _survives(compiled, changed, a, b, exact, Schedule())
    assert missed <= redundant


def test_a_removed_wait_is_caught_where_copies_land_late():
    a, b = _operands(torch.bfloat16, 64, 32, 144)
    exact = a.double() @ b.double().t()
    with executing(86) as launches:
        _product(a, b, stages=3)
    compiled = launches[0].compiled
    ptx = compiled.asm["ptx"]
    changed = re.sub(r"cp\.async\.wait_group\s+\d+;", "", ptx)
    assert changed != ptx
    assert _survives(compiled, ptx, a, b, exact, Schedule())
    assert not _survives(compiled, changed, a, b, exact, Schedule())
    assert _survives(compiled, changed, a, b, exact, Schedule(late_copies=False))
    # Waiting for one group too few is enough.
    late = re.sub(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;", ptx)
    assert late != ptx
    assert not _survives(compiled, late, a, b, exact, Schedule())


def test_counting():
    x, y = torch.randn(2, 1024), torch.zeros(1024)
    with executing(86, counting=True) as launches:
        _unmasked[(2,)](x[0], y, 1024, BLOCK=512)
    counters = launches[0].counters
    assert counters.total == launches[0].executed
    assert (counters.loads.bytes, counters.loads.coalescing) == (4096, 1)
    assert (counters.stores.bytes, counters.stores.coalescing) == (4096, 1)
    a, b = _operands(torch.bfloat16, 64, 32, 128)
    with executing(86, counting=True) as launches:
        _product(a, b, stages=3)
    counters = launches[0].counters
    # 64 by 32 by 128 in pieces of 16 by 8 by 16.
    assert counters.instructions["tensor"] == 4 * 4 * 8
    assert counters.loads.bytes == 2 * 128 * (64 + 32)
    assert counters.stores.bytes == 4 * 64 * 32
    assert counters.shared.wavefronts > counters.shared.requests > 0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(64, device="meta"), PTXError, "'x' is on device 'meta'"),
        (torch.zeros(64, dtype=torch.complex64), TypeError, "argument x"),
        ("text", TypeError, "argument x is a str"),
    ],
)
def test_arguments_that_cannot_be(value, error, message):
    with pytest.raises(error, match=message), executing(86):
        _unmasked[(1,)](value, torch.zeros(64), 64, BLOCK=64)


def test_the_librarys_own_kernels():
    from ladder_kernels import ops

    x, weight = torch.randn(5, 96).bfloat16(), torch.randn(96).bfloat16()
    with executing(120) as launches:
        y = ops.rms_norm(x, weight, 1e-6)
    assert launches
    exact = ops.rms_norm(x.double(), weight.double(), 1e-6)
    with use_backend("reference"):
        reference = ops.rms_norm(x, weight, 1e-6)
    error, allowed = ((value - exact).abs().max() for value in (y, reference))
    assert error <= 2 * allowed + 1e-5 * exact.abs().max()


def test_without_triton(monkeypatch):
    module = importlib.import_module("ladder_kernels.audit.ptx.launch")
    monkeypatch.setattr(module, "missing", lambda: "Triton is not installed")
    with pytest.raises(BackendError, match="not installed"), executing(86):
        pass


def test_importing_asks_for_no_triton():
    code = "import sys; import ladder_kernels.audit.ptx; print('triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_grids_of_numpy_and_torch_numbers():
    x, y = torch.randn(64), torch.zeros(64)
    with executing(86):
        _unmasked[(np.int64(1), torch.tensor(1))](x, y, 64, BLOCK=64)
    assert torch.equal(x, y)


@triton.jit
def _locked(lock, total, BLOCK: tl.constexpr):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    places = tl.arange(0, BLOCK)
    tl.store(total + places, tl.load(total + places) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@pytest.mark.parametrize("order", _ORDERS[:3])
def test_blocks_that_wait_for_each_other(order):
    lock, total = torch.zeros(1, dtype=torch.int32), torch.zeros(128)
    with executing(86, **order):
        _locked[(5,)](lock, total, BLOCK=128)
    assert (total == 5).all()
    assert lock == 0


@triton.jit
def _attention(
    q,
    k,
    v,
    out,
    T,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    rows = first + tl.arange(0, BLOCK)
    inner = tl.arange(0, D)
    head = tl.program_id(1).to(tl.int64) * T * D
    x = tl.load(q + head + rows[:, None] * D + inner[None, :], mask=rows[:, None] < T, other=0.0)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, tl.minimum(first + BLOCK, T) if CAUSAL else T, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        there = head + columns[:, None] * D + inner[None, :]
        keys = tl.load(k + there, mask=columns[:, None] < T, other=0.0)
        values = tl.load(v + there, mask=columns[:, None] < T, other=0.0)
        scores = tl.dot(x, tl.trans(keys)) * scale
        seen = columns[None, :] < T
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        shares = tl.exp(scores - highest[:, None])
        decay = tl.exp(most - highest)
        weight = weight * decay + tl.sum(shares, 1)
        total = total * decay[:, None] + tl.dot(shares.to(values.dtype), values)
        most = highest
    places = out + head + rows[:, None] * D + inner[None, :]
    tl.store(places, total / weight[:, None], mask=rows[:, None] < T)


@pytest.mark.parametrize("order", _ORDERS[:3])
@pytest.mark.parametrize(("target", "dtype"), [(75, torch.float16), (120, torch.bfloat16)])
def test_blocks_whose_loops_differ_in_length(target, dtype, order):
    q, k, v = (torch.randn(2, 100, 32).to(dtype) for _ in range(3))
    out = torch.full((2, 100, 32), torch.nan)
    with executing(target, **order):
        _attention[(4, 2)](q, k, v, out, 100, 32**-0.5, CAUSAL=True, D=32, BLOCK=32, num_stages=2)

    def attend(a, b, c):
        return torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True)

    exact = attend(q.double(), k.double(), v.double())
    error = (out - exact).abs().max()
    assert error <= 2 * (attend(q, k, v) - exact).abs().max() + 1e-5 * exact.abs().max()


@triton.jit
def _flagged(x, y, factor, scaled, added, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    a = tl.load(x + places)
    if scaled:
        a = a * factor
    tl.store(y + places, tl.cumsum(a + added, 0))


@pytest.mark.parametrize("scaled", [False, True])
def test_numbers_and_flags(scaled):
    x, y = torch.randn(64), torch.zeros(64)
    with executing(86):
        _flagged[(1,)](x, y, 2.5, scaled, 2**40, BLOCK=64)
    expected = (x.double() * (2.5 if scaled else 1) + 2**40).cumsum(0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0)


@triton.jit
def _inline(x, y, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    a = tl.load(x + places)
    code: tl.constexpr = "{ .reg .b32 t; shl.b32 t, $1, 3; add.s32 $0, t, $1; }"
    b = tl.inline_asm_elementwise(code, "=r,r", [a], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(y + places, b)


def test_inline_assembly():
    x = torch.randint(-99, 99, (64,), dtype=torch.int32)
    y = torch.zeros_like(x)
    with executing(86):
        _inline[(1,)](x, y, BLOCK=64)
    assert torch.equal(y, 9 * x)


@triton.jit
def _described(x, y, M, N, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BLOCK, BLOCK])
    target.store([tl.program_id(0) * BLOCK, 0], source.load([tl.program_id(0) * BLOCK, 0]) * 2)


def test_tensor_memory_access_is_refused_where_the_compiler_uses_it():
    x, y = torch.randn(64, 32), torch.zeros(64, 32)
    with executing(86):
        _described[(2,)](x, y, 64, 32, BLOCK=32)
    assert torch.equal(y, 2 * x)
    with pytest.raises(UnsupportedInstructionError, match="tensormap"), executing(120):
        _described[(2,)](x, y, 64, 32, BLOCK=32)


@triton.jit
def _hinted(x, y, N, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < N
    first = tl.load(x + places, mask=mask, eviction_policy="evict_last")
    second = tl.load(x + places, mask=mask, cache_modifier=".cg")
    third = tl.load(x + places, mask=mask, other=7.0, volatile=True)
    tl.store(y + places, first + second + third, mask=mask, cache_modifier=".cs")


@pytest.mark.parametrize("target", [75, 86, 120])
def test_hints_to_caches(target):
    x, y = torch.randn(300), torch.zeros(300)
    with executing(target):
        _hinted[(3,)](x, y, 300, BLOCK=128)
    torch.testing.assert_close(y, 3 * x, rtol=1e-6, atol=0)


@triton.jit
def _ordered(x, y, most, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    a = tl.load(x + places)
    tl.store(y + places, tl.sort(a))
    tl.store(most, tl.argmax(a, 0))


@pytest.mark.parametrize("order", _ORDERS[1:3])
def test_sorting_and_places(order):
    x, y, most = torch.randn(128), torch.zeros(128), torch.zeros(1, dtype=torch.int32)
    with executing(80, **order):
        _ordered[(1,)](x, y, most, BLOCK=128, num_warps=4)
    assert torch.equal(y, x.sort().values)
    assert most == x.argmax()
