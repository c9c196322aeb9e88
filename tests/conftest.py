"""Settings that hold for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Tiny tensors gain nothing from threads and lose much where cores are busy; processes that tests
# start inherit this. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """Fill `torch.empty` and its kin with NaN (or the integer maximum): no test passes on luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
