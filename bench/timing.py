"""Timing that compares: candidates take turns within one run, so that drift hits all alike."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Quantiles", "alternate", "check_losses", "each", "turns", "verified"]


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Seconds of one candidate's calls: 20 %, 50 % and 80 % quantiles.

    Attributes:
        low: 20 % quantile.
        median: 50 %.
        high: 80 %.
        calls: How many calls were timed.
    """

    low: float
    median: float
    high: float
    calls: int


def alternate(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, at_least: int = 7
) -> dict[str, Quantiles]:
    """Time candidates in turn.

    Args:
        candidates: What to call, by name. Each is called once beforehand, untimed.
        seconds: How long all turns together may take, more or less.
        at_least: Turns to take however long they are.

    Returns:
        Quantiles by name.
    """
    for call in candidates.values():
        call()
    spent = turns(candidates, seconds=seconds, at_least=at_least)
    return {name: _quantiles(times) for name, times in spent.items()}


def turns(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float, at_least: int
) -> dict[str, list[float]]:
    """As :func:`alternate`, without calls beforehand; returns the seconds of each call, by name."""
    spent: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < at_least or time.perf_counter() < end:
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
        turn += 1
    return spent


def each(call: Callable[[], object], device: torch.device, *, calls: int) -> Quantiles:
    """Time calls one by one; on a GPU by events, from the end of one to the end of the next.

    Args:
        call: Called once more beforehand, untimed.
        device: Where it works.
        calls: How many.
    """
    call()
    if device.type != "cuda":
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return _quantiles(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    pairs = itertools.pairwise(marks)
    return _quantiles([start.elapsed_time(end) / 1e3 for start, end in pairs])


def _quantiles(seconds: list[float]) -> Quantiles:
    low, median, high = np.quantile(seconds, (0.2, 0.5, 0.8))
    return Quantiles(low=low, median=median, high=high, calls=len(seconds))


def check_losses(losses: Sequence[float], *further: Sequence[float]) -> None:
    """Refuse a method that does not learn: its steps are not to be timed.

    Args:
        losses: Of its steps, in order.
        further: Of steps on other labels that go on with what those have trained.

    Raises:
        RuntimeError: A loss is not finite, or the first ones do not fall.
    """
    finite = all(map(math.isfinite, itertools.chain(losses, *further)))
    if not finite or not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}; not timed")


def verified(
    name: str, result: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor
) -> torch.Tensor:
    """Return ``result`` if it is as accurate as the tolerance rule asks.

    A timing counts only then.

    Args:
        name: Of the candidate.
        result: What it computed.
        same_dtype: The plain PyTorch expression in the same dtype.
        exact: The same in float64.

    Raises:
        RuntimeError: If its error exceeds twice that of ``same_dtype`` plus 1e-5 of the scale.
    """
    error = (result.double() - exact).abs().max().item()
    allowed = 2 * (same_dtype.double() - exact).abs().max().item()
    allowed += 1e-5 * exact.abs().max().item()
    if not error <= allowed:
        raise RuntimeError(f"{name}: error {error:.3g} exceeds {allowed:.3g}; not timed")
    return result
