from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from ladder_kernels import ops
from ladder_kernels.audit import executing, interpreting
from ladder_kernels.backend import get_backend
from ladder_kernels.errors import BackendError
from ladder_kernels.ops import _triton


@triton.jit
def _doubled(x):
    return x * 2


@triton.jit
def _double_kernel(
    x,  # [N]
    y,  # [N]
    N,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places, mask=places < N)
    tl.store(y + places, _doubled(value), mask=places < N)


def test_kernels_and_what_they_call_run_on_cpu_tensors():
    x, y = torch.randn(37), torch.full((40,), torch.nan)
    with interpreting():
        _double_kernel[(3,)](x, y, 37, BLOCK=16)
    assert torch.equal(y[:37], 2 * x)
    assert y[37:].isnan().all()


@triton.jit
def _sum_kernel(
    x,  # [N]
    y,  # [1]
    N,
    BLOCK: tl.constexpr,
):
    places = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + places, mask=places < N, other=0.0)))


def test_kernels_compile_after_they_were_interpreted():
    x, y = torch.ones(9), torch.zeros(1)
    with interpreting():
        _sum_kernel[(1,)](x, y, 9, BLOCK=16)
    assert y.item() == 9
    x[0] = 3
    with executing():
        _sum_kernel[(1,)](x, y, 9, BLOCK=16)
    assert y.item() == 11


def test_everything_is_as_before_afterwards():
    run, call = triton.JITFunction.run, triton.JITFunction.__call__
    with interpreting():
        assert get_backend() == "triton"
        assert _triton.host() == "interpreter"
    with pytest.raises(ZeroDivisionError), interpreting():
        raise ZeroDivisionError
    assert (triton.JITFunction.run, triton.JITFunction.__call__) == (run, call)
    assert get_backend() == "auto"
    assert _triton.host() is None
    with ops.use_backend("triton"), pytest.raises(BackendError, match="needs tensors on device"):
        ops.rms_norm(torch.ones(2, 3), None, 1e-6)


def test_products_of_bfloat16_are_refused():
    x = torch.ones(2, dtype=torch.bfloat16)
    assert _triton.unsupported(x, products=True) is None
    with interpreting():
        assert "miscomputes matrix products" in str(_triton.unsupported(None, x, products=True))
        assert _triton.unsupported(x) is None
        assert _triton.unsupported(x.half(), products=True) is None
