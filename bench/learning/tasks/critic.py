"""Judging: which step of a written solution is the first wrong one, if any is?

The problems are of the kind of :mod:`.maths`. Half of the solutions are right; in each of the
others one step was made wrong, and the steps after it go on from there without another mistake.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

from bench.learning.tasks.base import ClassesTask, Example
from bench.learning.tasks.problems import (
    DEPTHS,
    OPERATORS,
    Equation,
    Problem,
    Result,
    Step,
    problems,
    work_out,
)

__all__ = ["CLASSES", "critic_task"]

CLASSES = (" none", " one", " two", " three", " four", " five", " six")
"""The answers: no step, or the first wrong one. As words, since the first token of every digit
behind a space is that space."""

# Wrong results are as frequent as right calculations of the wrong thing.
_MISTAKES = ("result", "result", "operand", "operation")
_TRIES = 50


def critic_task(
    seed: int = 0, *, train_size: int = 20_000, held_out_size: int = 500
) -> ClassesTask:
    """The task; half of the answers are " none", the wrong step of the others is any of theirs.

    A solution of d steps is drawn d times as often as one of a single step would be: late steps are
    rarer than early ones, but not rare. In the details, ``step`` is the wrong step, from 1, or 0,
    ``mistake`` is "result", "operand", "operation" or "", and ``solution`` the right solution.

    Args:
        seed: Of the problems to train on.
        train_size: How many of them.
        held_out_size: How many are held out.

    Returns:
        The task. No question is both trained on and held out.
    """
    held_out = list(itertools.islice(_examples("critic, held out", set()), held_out_size))
    asked = {example.details["question"] for example in held_out}
    train = list(itertools.islice(_examples(f"critic, train, {seed}", asked), train_size))
    random.Random(seed).shuffle(train)
    return ClassesTask(name="critic", train=tuple(train), held_out=tuple(held_out), classes=CLASSES)


def _examples(key: str, without: set[str]) -> Iterator[Example]:
    """Right and wrong solutions in turns."""
    rng = random.Random(f"{key}: mistakes")
    wrong = False
    for problem in problems(key, _depth, without=without):
        planted = _plant(problem, rng) if wrong else (problem.equations(), 0, "")
        if planted is not None:
            yield _example(problem, *planted)
            wrong = not wrong


def _depth(rng: random.Random) -> int:
    return rng.choices(DEPTHS, weights=DEPTHS)[0]


def _example(problem: Problem, equations: tuple[Equation, ...], step: int, mistake: str) -> Example:
    lines = (f"{number}. {equation}" for number, equation in enumerate(equations, start=1))
    solution = "\n".join(lines)
    return Example(
        prompt=f"Question: {problem.question}\nSolution:\n{solution}\nFirst wrong step:",
        answer=CLASSES[step],
        details={
            "class": CLASSES[step].strip(),
            "depth": len(equations),
            "step": step,
            "mistake": mistake,
            "question": problem.question,
            "solution": "\n".join(map(str, problem.equations())),
        },
    )


# Mistakes -------------------------------------------------------------------------------------


def _plant(problem: Problem, rng: random.Random) -> tuple[tuple[Equation, ...], int, str] | None:
    """A solution with one mistake, its step from 1, and its kind; ``None`` if it finds none."""
    index = rng.randrange(len(problem.steps))
    right = problem.equations()[index]
    mistake = rng.choice(_MISTAKES)
    for _ in range(_TRIES):
        if mistake == "result":
            wrong = rng.choice(_near(right))
            equations = work_out(problem.steps, claimed={index: wrong})
        else:
            change = _other_operand if mistake == "operand" else _other_operation
            step = change(problem, index, rng)
            steps = (*problem.steps[:index], step, *problem.steps[index + 1 :])
            # What a later step does may as well be done now: that would be another order of steps.
            early = any(_does_same(step, later) for later in problem.steps[index + 1 :])
            equations = None if early else work_out(steps)
        if equations is not None and equations[index].result != right.result:
            return equations, index + 1, mistake
    return None


def _near(equation: Equation) -> list[int]:
    """Results that somebody might come to by mistake."""
    right = equation.result
    near = [right + by for by in (-10, -2, -1, 1, 2, 10)]
    if equation.sign == "*":
        near += [right + by for by in (-equation.left, -equation.right)]
        near += [right + by for by in (equation.left, equation.right)]
    return near


def _other_operand(problem: Problem, index: int, rng: random.Random) -> Step:
    """The step with another number of the question, a misread one, or another step's result."""
    step = problem.steps[index]
    side = rng.choice(("left", "right"))
    term = step.left if side == "left" else step.right
    if isinstance(term, Result):
        return replace(step, **{side: Result(rng.randrange(index))})
    misread = [term + by for by in (-2, -1, 1, 2) if term + by > 1]
    return replace(step, **{side: rng.choice([*problem.numbers, *misread])})


def _other_operation(problem: Problem, index: int, rng: random.Random) -> Step:
    """The step with another sign."""
    return replace(problem.steps[index], sign=rng.choice(list(OPERATORS)))


def _does_same(step: Step, later: Step) -> bool:
    """Whether ``step`` does what ``later`` shall do, with the same numbers, to another result."""
    mine, its = (
        {term for term in (each.left, each.right) if isinstance(term, int)}
        for each in (step, later)
    )
    return step.sign == later.sign and bool(its) and its <= mine
