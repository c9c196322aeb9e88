"""Run every benchmark: ``python -m bench``, or ``make bench``.

What takes longer is run by itself: ``python -m bench.quantization``, ``bench.smallest`` and
``python -m bench.learning run``.
"""

from __future__ import annotations

import subprocess
import sys

BENCHES = (
    "bench.ops",
    "bench.train_step",
    "bench.tap_cache",
    "bench.gpu_step",
    "bench.gpu_memory",
    "bench.triton_kernels",
    "bench.planner",
)
"""Each runs in a process of its own."""


def main() -> int:
    """Run them one after another; returns the number of those that failed."""
    failed = 0
    for bench in BENCHES:
        print(f"== {bench}", flush=True)
        failed += subprocess.run([sys.executable, "-m", bench], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
