"""Every operation and backend against its rivals: our times, theirs, and what is possible.

    python -m bench.ops                     the default set: minutes on two cores
    python -m bench.ops --quick             a model of 135M parameters only
    python -m bench.ops --full              large products, too: most of an hour
    python -m bench.ops --isa avx2          every candidate's kernels held to AVX2
    python -m bench.ops -k "rms_norm and bfloat16"
    python -m bench.ops --dry-run           no numbers: the calls that a GPU would get, traced

On a machine with a GPU the same commands measure the GPU. Each result is verified, in float64 too,
before it is timed. The candidates of a case take turns on a CPU; on a GPU, Triton's do_bench times
them one by one. It is pytest-benchmark underneath: ``pytest bench/ops --benchmark-only`` takes its
options and ours (``--cases``, ``--isa``, ``--seconds``). Rows go to ``bench/results/ops.csv``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.hold import ISAS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 0 if no candidate was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", dest="cases", action="store_const", const="quick")
    chosen.add_argument("--full", dest="cases", action="store_const", const="full")
    parser.add_argument("-k", metavar="WORDS", help="candidates and cases, as pytest's -k")
    parser.add_argument("--isa", choices=ISAS, help="hold every candidate to it")
    parser.add_argument("--seconds", type=float, help="for each case, more or less")
    parser.add_argument("--json", metavar="FILE", help="pytest-benchmark's own results")
    parser.add_argument("--dry-run", action="store_true", help="trace the calls of a GPU")
    parser.set_defaults(cases="default")
    given = parser.parse_args(arguments)
    if given.dry_run:
        from bench.ops.tracing import trace

        return trace(given.cases)
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "--benchmark-only"]
    command += ["--benchmark-quiet", "--quiet", "--cases", given.cases]
    for option, value in (
        *(("-k", given.k), ("--isa", given.isa), ("--seconds", given.seconds)),
        ("--benchmark-json", given.json),
    ):
        command += [] if value is None else [option, str(value)]
    failed = subprocess.run(command, check=False).returncode
    if (given.cases, given.k, given.isa) == ("default", None, None):
        # Products in whole numbers are rounded, which no time tells.
        errors = [sys.executable, "-m", "bench.ops.int8_error"]
        failed += subprocess.run(errors, check=False).returncode
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
