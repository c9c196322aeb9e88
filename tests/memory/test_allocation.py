"""What a process holds of memory that its tensors have freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import re, sys
import torch
from ladder_kernels.memory.allocation import return_freed_memory

def held():
    status = open("/proc/self/status", encoding="ascii").read()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024

if sys.argv[1] == "returned":
    assert return_freed_memory()
# A freed block makes glibc take blocks of its size from the heap from then on.
for _ in range(2):
    torch.ones(7 << 20)
# Imports leave holes, in some runs large ones; what is kept would go there and part nothing.
plugs = [torch.ones(1 << 14) for _ in range(1000)]
before = held()
kept = []
for _ in range(40):
    freed = [torch.ones(1 << 20) for _ in range(2)]
    kept.append(torch.ones(1 << 14))
    freed.clear()
    kept.append(torch.ones(1 << 18))
kept = kept[::2]
print(held() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is resident")
def test_freed_blocks_between_kept_ones_go_back():
    def held(how: str) -> int:
        command = [sys.executable, "-c", _SCRIPT, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    kept = 40 * 4 * (1 << 14)
    assert held("returned") < kept + (8 << 20)
    assert held("as it is") > kept + (24 << 20)
