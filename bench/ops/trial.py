"""One case: every candidate verified, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.ops.cases import Case
from bench.ops.definitions import OURS, Fresh, Work, backends, rivals
from bench.timing import turns, verified
from ladder_kernels import ops

__all__ = ["Trial", "candidates", "verify"]

_SAMPLED = 32

Inputs = Mapping[str, Tensor]


def candidates(case: Case, device: torch.device) -> list[str]:
    """Names of what can be measured: our backends, then rivals."""
    ours = backends(case.definition, case.direction, device)
    return ours + rivals(case.definition, case.direction, case.sizes, case.dtype, device)


class Trial:
    """A case with its tensors.

    Args:
        case: What is measured.
        device: Where.

    Attributes:
        tokens: How many.
        work: What is called.
        failures: By candidate: why it was not timed.
        seconds: By candidate: of each call.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.failures: dict[str, Exception] = {}
        self.seconds: dict[str, list[float]] = {}
        self.device = device
        self._dtype: torch.dtype = getattr(torch, case.dtype)
        self.work: Work = case.definition.make(case.sizes, Fresh(self._dtype, device))
        self.tokens: int = case.sizes[case.definition.rows]

    def prepared(self, candidate: str, picked: Tensor | None = None) -> Callable[[], Any]:
        """What one timed call of a candidate is; with ``picked``, one on some tokens only."""
        function = self.work.rivals.get(candidate, self.work.ours)
        backend = candidate if candidate in OURS else "auto"

        def run(**given: Tensor) -> Any:
            with ops.use_backend(backend):
                return function(**given)

        return self.call(run, picked)

    def call(
        self, function: Callable[..., Any], picked: Tensor | None = None, *, wide: bool = False
    ) -> Callable[[], Any]:
        """A call in the case's direction, with tensors of its own.

        Args:
            function: Takes the inputs by name.
            picked: Tokens that inputs are reduced to; ``None`` for all.
            wide: Whether floating inputs are in float64.
        """
        given = {
            name: self._given(each, picked if name in self.work.tokens else None, wide)
            for name, each in self.work.inputs.items()
        }
        if self.case.direction == "forward":
            return lambda: _unrecorded(function, given)
        leaves = [given[name].requires_grad_() for name in self.work.leaves]
        if self.case.direction == "both":
            return lambda: _both(function, given, leaves)
        with torch.enable_grad():
            outputs = [each for each in tree_leaves(function(**given)) if each.requires_grad]
        along = [self._gradient(each, picked) for each in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, along, retain_graph=True)

    @staticmethod
    def _given(value: Tensor, picked: Tensor | None, wide: bool) -> Tensor:
        chosen = value.clone() if picked is None else value[picked]
        return chosen.double() if wide and chosen.is_floating_point() else chosen

    def _gradient(self, output: Tensor, picked: Tensor | None) -> Tensor:
        """A gradient for an output: the same numbers for a token, whichever others are there."""
        torch.manual_seed(1)
        shape = output.shape if picked is None else (self.tokens, *output.shape[1:])
        numbers = torch.randn(shape, device=output.device).to(self._dtype)
        return (numbers if picked is None else numbers[picked]).to(output.dtype)

    def run(self, names: Sequence[str], *, seconds: float, at_least: int = 3) -> None:
        """Verify candidates and time those that are right.

        Args:
            names: Of candidates.
            seconds: How long all of them may take together, more or less.
            at_least: Calls of each, however long they are.
        """
        truths = _Truths(self)
        for name in names:
            try:
                truths.verify(name)
            except Exception as error:  # whatever a library raises: the others are timed
                self.failures[name] = error
        del truths
        calls = {name: self.prepared(name) for name in names if name not in self.failures}
        if self.device.type == "cuda":
            self.seconds = {name: _on_gpu(call, seconds) for name, call in calls.items()}
        elif calls:
            self.seconds = turns(calls, seconds=seconds, at_least=at_least)


def verify(case: Case, device: torch.device, names: Sequence[str]) -> None:
    """Verify candidates of a case without timing them.

    Raises:
        RuntimeError: The first that is wrong.
    """
    truths = _Truths(Trial(case, device))
    for name in names:
        truths.verify(name)


class _Truths:
    """What is right, in the case's dtype and in float64, and whether a candidate gives it."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._work = trial.work
        self._picked: Tensor | None = None
        if self._work.tokens:
            # Everywhere between the first token and the last.
            places = torch.linspace(0, trial.tokens - 1, min(_SAMPLED, trial.tokens))
            self._picked = places.round().long().to(trial.device)
        self._known: dict[bool, list[tuple[Tensor, Tensor]]] = {}

    def verify(self, name: str) -> None:
        """Raise if a candidate is wrong: at full size, and on the tokens that are picked."""
        trial, work = self._trial, self._work
        is_rival = name in work.rivals
        expected = self._expected(is_rival and work.plain_of_rivals is not None)
        full = _numbers(work, trial.prepared(name)())
        if work.same_bits and not is_rival:
            _equal(name, full, _numbers(work, trial.prepared("reference")()))
        if self._picked is None:
            _within(name, full, expected)
            return
        _within(name, _numbers(work, trial.prepared(name, self._picked)()), expected)
        # A mean over all tokens shares a token's gradient among more of them, and cannot be told
        # from some tokens itself.
        share = trial.tokens / len(self._picked) if work.mean else 1
        rows = [(each, pair) for each, pair in zip(full, expected, strict=True) if each.dim()]
        _within(name, [each[self._picked] * share for each, _ in rows], [pair for _, pair in rows])

    def _expected(self, of_rivals: bool) -> list[tuple[Tensor, Tensor]]:
        """Pairs of results: in the case's dtype and in float64."""
        if of_rivals not in self._known:
            plain = self._work.plain_of_rivals if of_rivals else self._work.plain
            assert plain is not None
            same, exact = (
                _numbers(self._work, self._trial.call(plain, self._picked, wide=wide)())
                for wide in (False, True)
            )
            self._known[of_rivals] = list(zip(same, exact, strict=True))
        return self._known[of_rivals]


def _unrecorded(function: Callable[..., Any], given: Inputs) -> Any:
    with torch.inference_mode():
        return function(**given)


def _both(function: Callable[..., Any], given: Inputs, leaves: list[Tensor]) -> Any:
    with torch.enable_grad():
        out = function(**given)
    return out.detach(), *torch.autograd.grad(out, leaves)


def _numbers(work: Work, made: Any) -> list[Tensor]:
    with torch.no_grad():
        return [each.clone() for each in tree_leaves(work.numbers(made))]


def _equal(name: str, ours: list[Tensor], reference: list[Tensor]) -> None:
    for mine, other in zip(ours, reference, strict=True):
        if not torch.equal(mine, other):
            raise RuntimeError(f"{name}: other bits than the reference's; not timed")


def _within(name: str, found: list[Tensor], expected: list[tuple[Tensor, Tensor]]) -> None:
    for result, (same, exact) in zip(found, expected, strict=True):
        # A loss may be wider than PyTorch's.
        if result.shape != exact.shape or result.dtype not in (same.dtype, torch.float32):
            raise RuntimeError(
                f"{name}: {result.dtype} {list(result.shape)} instead of {same.dtype} "
                f"{list(exact.shape)}; not timed"
            )
        verified(name, result, same, exact.double())


def _on_gpu(call: Callable[[], object], seconds: float) -> list[float]:
    from triton.testing import do_bench

    milliseconds: Any = do_bench(call, rep=round(250 * seconds), return_mode="all")
    return [each / 1e3 for each in milliseconds]
