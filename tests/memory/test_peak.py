"""The most memory that was in use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import torch

import ladder_kernels
from ladder_kernels.memory.peak import peak_memory_bytes

MEGABYTE = 1_000_000


def test_it_covers_what_is_in_use_and_does_not_fall():
    before = peak_memory_bytes()
    assert before >= 0.95 * psutil.Process().memory_info().rss
    big = torch.ones(100 * MEGABYTE)
    peak = peak_memory_bytes("cpu")
    assert peak >= before - MEGABYTE
    assert peak >= psutil.Process().memory_info().rss - MEGABYTE
    assert peak >= 4 * big.numel()
    del big
    # The kernel's own figure wavers by a few pages.
    assert peak_memory_bytes(torch.device("cpu")) >= peak - MEGABYTE


def test_a_new_process_does_not_count_its_parents_memory():
    big = torch.ones(300 * MEGABYTE)
    code = "from ladder_kernels.memory.peak import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(ladder_kernels.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(child.stdout) < 4 * big.numel()
