"""Bytes that one call takes beyond its inputs and results.

On a CPU, the growth of the largest resident set in a process of its own, in which no larger call
was made; on a GPU, that of the largest sum of what PyTorch allocated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from bench.memory import bytes_beyond
from bench.ops.cases import Case, cases
from bench.ops.trial import Trial

__all__ = ["bytes_beyond_apart", "bytes_beyond_here"]


def bytes_beyond_apart(case: Case, candidate: str, device: torch.device) -> int:
    """Measure a candidate of a case; on a CPU in a process of its own."""
    if device.type == "cuda":
        return bytes_beyond_here(case, candidate, device)
    small = case == case.shrunk()
    command = [sys.executable, "-m", "bench.ops.memory", str(case), candidate]
    command += ["--small"] if small else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def bytes_beyond_here(case: Case, candidate: str, device: torch.device) -> int:
    """Measure the first call of a candidate in this process."""
    few = Trial(case.shrunk(), device)
    few.prepared(candidate)()  # libraries and threads are there then
    trial = Trial(case, device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    trial.prepared(candidate, one)()  # so are the forms of weights that it takes
    call = trial.prepared(candidate)
    if device.type == "cpu":
        return bytes_beyond(lambda: _results(call()))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    made = _results(call())
    most = torch.cuda.max_memory_allocated(device)
    return most - before - sum(each.nbytes for each in made)


def _results(made: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]


def main() -> None:
    """Measure what the command line names, on the CPU, and print the number."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("case", help="as pytest calls it")
    parser.add_argument("candidate")
    parser.add_argument("--small", action="store_true", help="with small sizes")
    given = parser.parse_args()
    every = (case.shrunk() if given.small else case for case in cases("full"))
    (case,) = {str(case): case for case in every if str(case) == given.case}.values()
    print(bytes_beyond_here(case, given.candidate, torch.device("cpu")))


if __name__ == "__main__":
    main()
