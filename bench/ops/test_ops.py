"""Every candidate of every case, as pytest-benchmark has it.

Candidates of a case take turns, which pytest-benchmark does not have: the first of them makes all
be verified and timed, and each hands its own times over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bench.ops.session import Clock

if TYPE_CHECKING:
    from bench.ops.cases import Case
    from bench.ops.session import Session

CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK)
def test_op(
    benchmark: Any, session: Session, case: Case, candidate: str, together: list[str]
) -> None:
    seconds = session.times(case, candidate, together)
    ideal = case.ideal
    benchmark.group = str(case)
    benchmark.extra_info.update(
        op=case.op, model=case.model, shape=case.shape, dtype=case.dtype, candidate=candidate,
        flops=ideal.flops, bytes_moved=ideal.bytes_moved,
    )  # fmt: skip
    CLOCK.record(seconds)
    benchmark.pedantic(CLOCK.advance, rounds=len(seconds))
    if benchmark.enabled:
        session.note(case, candidate, benchmark.stats.stats.data)
