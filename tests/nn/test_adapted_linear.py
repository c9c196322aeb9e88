from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ladder_kernels as lk
from ladder_kernels.nn import adapted_linear as module
from ladder_kernels.nn.adapted_linear import adapted_linear


def _arguments(dtype: torch.dtype, tokens: int, n: int, k: int, rank: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, tokens, k).to(dtype).requires_grad_(),
        torch.randn(2, tokens, k).requires_grad_(),
        (torch.randn(rank, k) * k**-0.5).requires_grad_(),
        torch.randn(n, rank).requires_grad_(),
        torch.randn(n).to(dtype).requires_grad_(),
    ]


def _plain(given: list[Any], weight: torch.Tensor) -> Any:
    """As PEFT writes it, the base in x's dtype."""
    x, seen, a, b, bias = given
    base = x @ weight.to(x.dtype).t() + bias
    read = x.to(a.dtype) if seen is None else seen
    return base + (0.5 * (read @ a.t() @ b.t())).to(x.dtype)


def _gradients(out: torch.Tensor, arguments: list[Any]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(out.dtype))
    found = [out.detach()]
    for argument in arguments:
        if argument is not None and argument.grad is not None:
            found.append(argument.grad)
            argument.grad = None
    return found


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 3).map(lambda blocks: 64 * blocks),
    rank=st.integers(1, 9),
    dropped=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    backend=st.sampled_from(["cpu", "reference"]),
)
def test_the_rule(
    tokens: int, n: int, k: int, rank: int, dropped: bool, dtype: torch.dtype, backend: str
) -> None:
    x, seen, a, b, bias = _arguments(dtype, tokens, n, k, rank)
    weight = lk.quantize_nf4(torch.randn(n, k) * k**-0.5)
    given = [x, seen if dropped else None, a, b, bias]
    with pytest.MonkeyPatch.context() as patch, lk.use_backend(backend):
        patch.setattr(module, "_BLOCK", 7 * max(n, k))  # several blocks, the last one ragged
        ours = _gradients(adapted_linear(x, weight, bias, a, b, 0.5, seen=given[1]), given)
    dense = weight.dequantize(dtype)
    theirs = _gradients(_plain(given, dense), given)
    wide = [None if g is None else g.detach().double().requires_grad_() for g in given]
    exact = _gradients(_plain(wide, dense.double()), wide)
    assert len(ours) == len(theirs) == len(exact) == (6 if dropped else 5)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        error, allowed = ((found.double() - right).norm() for found in (mine, other))
        assert error <= 2 * allowed + 1e-5 * right.norm()


@pytest.mark.parametrize("dropped", [False, True])
def test_only_what_is_needed(dropped: bool) -> None:
    given = _arguments(torch.bfloat16, 20, 24, 64, 3)
    weight = lk.quantize_nf4(torch.randn(24, 64) * 0.125)

    def gradients(needed: list[int]) -> list[torch.Tensor]:
        x, seen, a, b, bias = given
        for i, each in enumerate(given):
            each.requires_grad_(i in needed)
        return _gradients(
            adapted_linear(x, weight, bias, a, b, 0.5, seen=seen if dropped else None), given
        )[1:]

    every = [0, 1, 2, 3, 4] if dropped else [0, 2, 3, 4]
    wanted = dict(zip(every, gradients(every), strict=True))
    for needed in ([2], [3], [4], [0], [2, 3], *([[1], [0, 3]] if dropped else [])):
        found = gradients(needed)
        assert len(found) == len(needed)
        assert all(torch.equal(g, wanted[i]) for i, g in zip(needed, found, strict=True))


def test_a_single_row_and_none() -> None:
    x, _, a, b, bias = _arguments(torch.bfloat16, 3, 24, 64, 3)
    weight = lk.quantize_nf4(torch.randn(24, 64) * 0.125)
    whole = adapted_linear(x, weight, bias, a, b, 0.5)
    row = adapted_linear(x[1, 2], weight, bias, a, b, 0.5)
    assert row.shape == (24,)
    torch.testing.assert_close(row, whole[1, 2], rtol=2**-7, atol=1e-2)
    nothing = adapted_linear(x[:, :0], weight, bias, a, b, 0.5)
    assert nothing.shape == (2, 0, 24)
    nothing.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert not a.grad.any()
    assert not b.grad.any()


@pytest.mark.parametrize(
    ("backend", "adapter", "wide_products"),
    [
        ("auto", torch.float32, 0),
        ("cpu", torch.float32, 0),
        ("reference", torch.float32, 6),
        ("auto", torch.bfloat16, 6),
    ],
)
def test_native_kernels_do_the_products_of_float32_adapters(
    backend: str, adapter: torch.dtype, wide_products: int
) -> None:
    x, _, a, b, _ = _arguments(torch.bfloat16, 20, 24, 64, 3)
    a, b = (each.detach().to(adapter).requires_grad_() for each in (a, b))
    weight = lk.quantize_nf4(torch.randn(24, 64) * 0.125)
    with torch.profiler.profile() as profile, lk.use_backend(backend):
        out = adapted_linear(x, weight, None, a, b, 0.5)
    with torch.profiler.profile() as backward:  # on the backend that the forward was given
        out.backward(torch.ones_like(out))
    names = [event.name for event in (*(profile.events() or ()), *(backward.events() or ()))]
    frozen = 2 if backend == "reference" else 0
    products = sum(name in ("aten::mm", "aten::addmm_") for name in names)
    assert products == wide_products + frozen


def test_gradient_of_the_gradient() -> None:
    x, seen, a, b, bias = (
        each.detach().double() for each in _arguments(torch.float64, 3, 5, 64, 2)
    )
    weight = lk.quantize_nf4(torch.randn(5, 64))
    inputs = [each.requires_grad_() for each in (x[:1, :, :], a, b, bias)]

    def function(x: Any, a: Any, b: Any, bias: Any) -> torch.Tensor:
        return adapted_linear(x, weight, bias, a, b, 0.5)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    dropped = seen[:1].requires_grad_()

    def with_dropout(seen: Any, a: Any, b: Any) -> torch.Tensor:
        return adapted_linear(x[:1].detach(), weight, None, a, b, 0.5, seen=seen)

    assert torch.autograd.gradcheck(with_dropout, (dropped, a, b))
    assert torch.autograd.gradgradcheck(with_dropout, (dropped, a, b))


def test_keeps_no_wide_copy_of_the_input() -> None:
    x, _, a, b, _ = _arguments(torch.bfloat16, 20, 64, 64, 2)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted_linear(x, lk.quantize_nf4(torch.randn(64, 64)), None, a, b, 1.0)
    assert max(t.nbytes for t in kept) == x.nbytes
    assert sum(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept) == 1
