"""The products of low-rank adapters against float64, in every variant that runs here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.native import low_rank

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """Random arguments of all products; wide rows are further apart than they are long."""

    def __init__(self, dtype: torch.dtype, M: int, K: int, rank: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(M, K + 3, generator=generator).to(dtype)[:, 1 : K + 1]
        self.p = torch.randn(rank, K, generator=generator)
        self.values = torch.randn(M, rank, generator=generator)

    def products(self) -> Iterator[Tensor]:
        onto = self.x.contiguous().clone()
        low_rank.widen_onto(onto, self.values, self.p)
        yield low_rank.narrow(self.x, self.p)
        yield low_rank.widen(self.values, self.p, self.x.dtype)
        yield onto
        yield low_rank.gradient(self.values, self.x)

    def expected(self, inside: torch.dtype) -> Iterator[Tensor]:
        """The same of PyTorch's operations in a dtype; rounded as they are, but not float64."""
        x, p, values = (each.to(inside) for each in (self.x, self.p, self.values))
        wide = inside if inside == torch.float64 else self.x.dtype
        yield x @ p.t()
        yield (values @ p).to(wide)
        yield (x + values @ p).to(wide)
        yield values.t() @ x


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    M=st.integers(1, 80),
    K=st.integers(1, 200),
    rank=st.integers(1, 64),
    seed=st.integers(0, 2**31),
)
def test_values(
    use_isa: Any, isa: str, dtype: torch.dtype, M: int, K: int, rank: int, seed: int
) -> None:
    use_isa(isa)
    _check(Case(dtype, M, K, rank, seed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "rank"), [(700, 45, 8), (30, 1300, 11), (2, 600, 64)])
def test_more_than_one_slice(
    use_isa: Any, isa: str, dtype: torch.dtype, M: int, K: int, rank: int
) -> None:
    use_isa(isa)
    _check(Case(dtype, M, K, rank))


def _check(case: Case) -> None:
    """At most twice the error of PyTorch's operations in the same dtype."""
    results = zip(
        case.products(), case.expected(torch.float32), case.expected(torch.float64), strict=True
    )
    for ours, theirs, exact in results:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        error, allowed = ((found.double() - exact).norm() for found in (ours, theirs))
        assert error <= 2 * allowed + 1e-5 * exact.norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 5, 1000])
def test_any_number_of_threads_gives_the_same_bits(
    use_isa: Any, isa: str, dtype: torch.dtype, M: int
) -> None:
    use_isa(isa)
    case = Case(dtype, M, 576, 13)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(list(case.products()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(use_isa: Any, isa: str, bad: float) -> None:
    use_isa(isa)
    case = Case(torch.bfloat16, 20, 90, 6)
    case.x[3, 7] = bad
    narrow, wide, onto, gradient = case.products()
    assert (~narrow.isfinite()).all(1).nonzero().flatten().tolist() == [3]
    assert narrow.isfinite().sum() == 19 * 6
    assert wide.isfinite().all()
    assert (~onto.isfinite()).nonzero().tolist() == [[3, 7]]
    assert (~gradient.isfinite()).nonzero()[:, 1].tolist() == [7] * 6


@pytest.mark.parametrize(("M", "K", "rank"), [(0, 8, 2), (4, 0, 2), (4, 8, 0)])
def test_nothing_to_sum(M: int, K: int, rank: int) -> None:
    case = Case(torch.bfloat16, M, K, rank)
    for ours, theirs in zip(case.products(), case.expected(torch.float32), strict=True):
        assert torch.equal(ours, theirs)


def test_arguments_in_any_order_of_memory() -> None:
    case = Case(torch.bfloat16, 30, 40, 5)
    wanted = list(case.products())
    for name in ("x", "p", "values"):
        setattr(case, name, getattr(case, name).t().contiguous().t())
    assert all(torch.equal(a, b) for a, b in zip(wanted, case.products(), strict=True))
