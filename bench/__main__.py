"""Run the default set of benchmarks: ``python -m bench``, or ``make bench``.

On two cores it takes less than half an hour; what measures GPUs is passed over where there is none.
What takes longer is run by itself: ``bench.train_step`` in other dtypes and at other contexts and
shapes, ``bench.tap_cache``, ``bench.planner``, ``bench.smallest``, ``bench.quantization`` and
``python -m bench.learning run``. ``python -m bench.report`` puts the rows into README.md.
"""

from __future__ import annotations

import subprocess
import sys

BENCHES = (
    "bench.ops",
    "bench.train_step",
    "bench.gpu_step",
    "bench.gpu_memory",
    "bench.triton_kernels",
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
