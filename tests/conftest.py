"""Settings that hold for every test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Tiny tensors gain nothing from threads and lose much where cores are busy; processes that tests
# start inherit this. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when datasets is imported, which some test module does before a command could ask for it.
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

from ladder_kernels import native


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


def _use_isa(name: str) -> None:
    library = native.library()
    assert library is not None, native.status().reason
    assert library.lk_set_isa(name.encode()) == 0


@pytest.fixture
def use_isa() -> Iterator[Callable[[str], None]]:
    """``use_isa(name)`` runs the native kernels in that variant, until the test ends."""
    threads = torch.get_num_threads()
    yield _use_isa
    _use_isa(native.status().isas[0])
    torch.set_num_threads(threads)
