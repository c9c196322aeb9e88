"""The calls that a GPU would get, where there is none: shapes and dtypes of what they return."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils._pytree import tree_leaves

from bench.ops.cases import Case, cases
from bench.ops.definitions import BITSANDBYTES, LIGER
from bench.ops.trial import Trial, candidates
from ladder_kernels.memory.tracing import fake_cuda

__all__ = ["trace", "traced"]

# They are not traced: their kernels need numbers, or the driver.
_NEED_A_GPU = (BITSANDBYTES, LIGER)


def trace(chosen: str) -> int:
    """Trace every candidate of a set of cases and print what was traced; returns the failures."""
    wrong = done = 0
    for case in cases(chosen):
        for name, problem in traced(case):
            done += 1
            if problem is not None:
                wrong += 1
                print(f"wrong: {case}, {name}: {problem}", flush=True)
    print(f"{done} calls traced on a GPU that is not there, {wrong} wrong; no times")
    return min(wrong, 1)


def traced(case: Case) -> Iterator[tuple[str, str | None]]:
    """Names of a case's candidates on a GPU, and what is wrong with their results, if anything."""
    with fake_cuda() as device:
        trial = Trial(case, device)
        wanted = _described(trial.call(trial.work.plain)())
        for name in candidates(case, device):
            if name in _NEED_A_GPU:
                continue
            found = _described(trial.prepared(name)())
            yield name, None if found == wanted else f"{found} instead of {wanted}"


def _described(made: object) -> list[tuple[int, ...]]:
    tensors = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
    return [tuple(each.shape) for each in tensors if each.device.type == "cuda"]
