"""Reasoning: word problems of two to six steps, answered with one equation a step."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from bench.learning.tasks.base import Answers, Example, Metric, Task
from bench.learning.tasks.problems import DEPTHS, OPERATORS, Problem, problems

__all__ = ["MathsTask", "maths_task"]

_EQUATION = re.compile(r"(\d+) ?([-+*/]) ?(\d+) ?= ?(\d+)")
_MARK = "Answer:"
# A number that goes on, as 57.5 or 57,000 do, is not 57.
_NUMBER = re.compile(r"\s*\$?(-?\d+)(?![\d]|[.,]\d)")


@dataclass(frozen=True, kw_only=True)
class MathsTask(Task):
    """Word problems; its metric is whether the final number is right.

    In the details of an example, ``depth`` is the number of steps and ``number`` the final number.
    """

    name: str = "maths"
    metric: Metric = "exact_match"
    answers: Answers = "generated"
    # Six equations of three numbers with three digits each are 84 tokens, the rest is 9.
    max_new_tokens: int = 96

    def score(self, example: Example, output: str) -> dict[str, float]:
        """Judge a chain of equations.

        Args:
            example: The problem.
            output: Lines with one equation each, then "Answer:" and a number.

        Returns:
            ``exact_match``: whether the number behind the last "Answer:" is the right one;
            ``answered``: whether there is a number; ``steps``: lines with an equals sign before it;
            ``steps_right``: whether there are such lines and each is arithmetically right, be it
            the right step or not.
        """
        chain, mark, rest = output.rpartition(_MARK)
        if not mark:
            chain, rest = output, ""
        number = _NUMBER.match(rest)
        steps = [line.strip() for line in chain.splitlines() if "=" in line]
        return {
            "exact_match": float(
                number is not None and int(number[1]) == example.details["number"]
            ),
            "answered": float(number is not None),
            "steps": float(len(steps)),
            "steps_right": float(bool(steps) and all(map(_is_right, steps))),
        }


def maths_task(seed: int = 0, *, train_size: int = 20_000, held_out_size: int = 250) -> MathsTask:
    """The task; each depth is equally frequent.

    Args:
        seed: Of the problems to train on.
        train_size: How many of them.
        held_out_size: How many problems are held out; depths take turns.

    Returns:
        The task. No question is both trained on and held out.
    """
    turns = itertools.cycle(DEPTHS)
    asked = problems("maths, held out", lambda rng: next(turns))
    held_out = list(itertools.islice(asked, held_out_size))
    asked = problems(
        f"maths, train, {seed}",
        lambda rng: rng.choice(DEPTHS),
        without={problem.question for problem in held_out},
    )
    train = itertools.islice(asked, train_size)
    return MathsTask(
        train=tuple(map(_example, train)),
        held_out=tuple(map(_example, held_out)),
    )


def _example(problem: Problem) -> Example:
    equations = problem.equations()
    number = equations[-1].result
    return Example(
        prompt=f"Question: {problem.question}\nSolution:\n",
        answer="\n".join([*map(str, equations), f"{_MARK} {number}"]),
        details={"depth": len(equations), "number": number},
    )


def _is_right(line: str) -> bool:
    found = _EQUATION.fullmatch(line)
    if found is None:
        return False
    left, right, result = int(found[1]), int(found[3]), int(found[4])
    if found[2] == "/":
        return right != 0 and left == right * result
    return OPERATORS[found[2]](left, right) == result
