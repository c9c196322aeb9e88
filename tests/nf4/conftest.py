"""What the tests of the format share: bitsandbytes' own results, and comparison by bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ladder_kernels.backend import use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Equal dtype, shape and bits; a NaN equals any NaN."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if ours.is_floating_point() and bool(ours.isnan().any()):
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = ours.nan_to_num(nan=0.0), theirs.nan_to_num(nan=0.0)
    assert torch.equal(_bits(ours), _bits(theirs))


def _quantize(
    weight: Tensor,
    blocksize: int = 64,
    double_quant: bool = True,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type="nf4",
        quant_storage=quant_storage,
    )


def _dequantize(packed: Tensor, state: bnb.QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """As one row: bitsandbytes' CPU kernel misreads scales where rows are no whole blocks."""
    assert state.shape is not None
    row = copy.copy(state)
    numel = state.shape.numel()
    row.shape = torch.Size((1, numel) if numel else (0, 1))
    row.dtype = state.dtype if dtype is None else dtype
    # Its fallback for odd sizes is compiled anew for each shape, which takes seconds.
    with torch.compiler.set_stance("force_eager"):
        values = bnb.dequantize_4bit(packed, row)
        if row.dtype == torch.bfloat16:
            # With AVX512-BF16 its conversion to bfloat16 makes subnormal numbers zero.
            row.dtype = torch.float32
            wide = bnb.dequantize_4bit(packed, row)
            subnormal = wide.abs() < torch.finfo(torch.bfloat16).tiny
            values = torch.where(subnormal, wide.bfloat16(), values)
    return values.reshape(state.shape)


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[Tensor, Tensor], None]:
    return _assert_same_bits


@pytest.fixture(scope="session")
def quantize() -> Callable[..., tuple[Tensor, Any]]:
    """``quantize(weight, blocksize, double_quant, quant_storage)`` by bitsandbytes."""
    return _quantize


@pytest.fixture(scope="session")
def dequantize() -> Callable[..., Tensor]:
    """``dequantize(packed, state, dtype)`` by bitsandbytes, right on every shape."""
    return _dequantize


@st.composite
def _weights(draw: st.DrawFn, most: int = 5000) -> Tensor:
    """Tensors of every dtype, of shapes that rarely fit their blocks, and of every scale."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.one_of(
            st.lists(st.integers(0, 40), min_size=0, max_size=2),
            st.tuples(st.integers(1, 12), st.integers(1, most // 12)),
            st.tuples(st.integers(0, most)),
            st.lists(st.integers(1, 12), min_size=3, max_size=3),
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["normal", "wide", "subnormal", "zeros", "centroids", "huge"]))
    if kind == "wide":
        values *= 10.0 ** (70 * torch.rand(values.shape, generator=generator) - 40)
    elif kind == "subnormal":
        values *= torch.finfo(dtype).tiny / 8
    elif kind == "zeros":
        values *= torch.rand(values.shape, generator=generator) < 0.1
    elif kind == "centroids":
        # Where ties between centroids are likely.
        values = (8 * values).round() / 8
    elif kind == "huge":
        values *= torch.finfo(dtype).max / 1e4
    largest = torch.finfo(dtype).max / 1e3
    return values.clamp(-largest, largest).to(dtype)


@pytest.fixture(scope="session")
def weights() -> Callable[..., st.SearchStrategy[Tensor]]:
    return _weights


@pytest.fixture(scope="module", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a module's tests on plain PyTorch, then on the native kernels."""
    with use_backend(request.param):
        yield request.param
