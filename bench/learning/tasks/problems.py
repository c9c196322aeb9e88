"""Word problems of several steps, generated: each has one chain of equations that solves it.

All numbers, those of the steps too, are whole and from 1 to 999.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from bench.learning.tasks.stories import DISTRACTORS, LINKS, NAMES, SCENES, Line, Scene

__all__ = [
    "DEPTHS",
    "LARGEST",
    "OPERATORS",
    "Equation",
    "Problem",
    "Result",
    "Step",
    "make_problem",
    "problems",
    "work_out",
]

DEPTHS = range(2, 7)
"""How many steps a problem can have."""

LARGEST = 999
"""No number is larger."""

OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
"""What the signs mean; only exact divisions are ever made."""

_DISTRACTED = 0.3
_NAMED = 0.4
_TIMES = {2: "twice", 3: "three times", 4: "four times"}
_SHARES = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}


@dataclass(frozen=True)
class Result:
    """What an earlier step came to.

    Attributes:
        step: Its index, from 0.
    """

    step: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A calculation that the story asks for.

    Attributes:
        left: A number, or an earlier result.
        sign: One of :data:`OPERATORS`.
        right: As ``left``.
    """

    left: int | Result
    sign: str
    right: int | Result


@dataclass(frozen=True, kw_only=True)
class Equation:
    """A step as it is written; ``str()`` of it is "12 + 7 = 19". It may be wrong."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question and how to get to its answer.

    Attributes:
        question: Some sentences; the last one ends with a question mark.
        steps: The calculations, the last of which gives the answer.
        numbers: Those that the question shows, the ones that do not matter too.
    """

    question: str
    steps: tuple[Step, ...]
    numbers: tuple[int, ...]

    def equations(self) -> tuple[Equation, ...]:
        """The right solution."""
        equations = work_out(self.steps)
        assert equations is not None
        return equations


def work_out(
    steps: Sequence[Step], *, claimed: Mapping[int, int] | None = None
) -> tuple[Equation, ...] | None:
    """Calculate step by step.

    Args:
        steps: See :class:`Problem`.
        claimed: Wrong results by the step's index; later steps go on with them.

    Returns:
        The equations, or ``None`` if a result is not a whole number from 1 to :data:`LARGEST`.
    """
    results: list[int] = []
    equations = []
    for index, step in enumerate(steps):
        left, right = (
            results[term.step] if isinstance(term, Result) else term
            for term in (step.left, step.right)
        )
        if step.sign == "/" and left % right:
            return None
        result = OPERATORS[step.sign](left, right)
        if claimed and index in claimed:
            result = claimed[index]
        if not 1 <= result <= LARGEST:
            return None
        results.append(result)
        equations.append(Equation(left=left, sign=step.sign, right=right, result=result))
    return tuple(equations)


def problems(
    key: str, depths: Callable[[random.Random], int], *, without: Set[str] = frozenset()
) -> Iterator[Problem]:
    """Problems without end, no two with the same question.

    Args:
        key: The same key gives the same problems.
        depths: Draws the number of steps of the next one.
        without: Questions that shall not be asked.
    """
    rng = random.Random(key)
    seen = set(without)
    while True:
        problem = make_problem(rng, depths(rng))
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def make_problem(rng: random.Random, depth: int) -> Problem:
    """One problem.

    Args:
        rng: Where chance comes from.
        depth: Its number of steps, one of :data:`DEPTHS`.
    """
    while True:
        problem = _Story(rng, rng.choice(SCENES)).tell(depth)
        if problem is not None:
            return problem


# How a story is told --------------------------------------------------------------------------

_Term = int | Literal["v", "it"]
"""In the calculations of a line: a number, the story's number, or the result just before."""


class _Story:
    """A story about one number, ``value``, which ``term`` stands for in later steps."""

    def __init__(self, rng: random.Random, scene: Scene) -> None:
        self.rng = rng
        self.scene = scene
        self.value = 0
        self.term: int | Result = 0
        self.steps: list[Step] = []
        self.sentences: list[str] = []
        self.numbers: list[int] = []
        self.link = ""
        # Whether it is clear whom a pronoun in the next sentence means.
        self.clear = False
        pronoun = rng.choice(list(NAMES))
        name = rng.choice(NAMES[pronoun])
        others = [other for names in NAMES.values() for other in names if other != name]
        possessive = {"she": "her", "he": "his"}[pronoun]
        if scene.places:
            name, pronoun, possessive = rng.choice(scene.places), "it", "its"
        self.words = {
            "name": name,
            "he": pronoun,
            "his": possessive,
            "other": rng.choice(others),
            "items": rng.choice(scene.items),
        }

    def tell(self, depth: int) -> Problem | None:
        """The problem, or ``None`` if chance led to numbers that allow no story of that depth."""
        rng, scene = self.rng, self.scene
        opening, ending = rng.choice(scene.openings), rng.choice(scene.endings)
        left = depth - _cost(opening) - _cost(ending)
        if left < 1 or not self.add(opening):
            return None
        distracted_at = rng.randint(1, 3) if rng.random() < _DISTRACTED else None
        for move in rng.sample(scene.moves, len(scene.moves)):
            if len(self.sentences) == distracted_at:
                self.distract()
            if _cost(move) <= left and self.add(move):
                left -= _cost(move)
            if not left:
                break
        if left or not self.add(ending):
            return None
        return Problem(
            question=" ".join(self.sentences),
            steps=tuple(self.steps),
            numbers=tuple(self.numbers),
        )

    def add(self, line: Line) -> bool:
        """Tell a line, unless the numbers do not allow it."""
        drawn = self.draw(line.operation)
        if drawn is None:
            return False
        shown, calculations = drawn
        steps = list(self.steps)
        for left, sign, right in calculations:
            it = Result(len(steps) - 1)
            terms = [self.term if x == "v" else it if x == "it" else x for x in (left, right)]
            steps.append(Step(left=terms[0], sign=sign, right=terms[1]))
        equations = work_out(steps)
        if equations is None:
            return False
        self.steps = steps
        if calculations:
            self.value, self.term = equations[-1].result, Result(len(steps) - 1)
        elif line.operation == "=":
            self.value = self.term = shown["n"]
        self.say(line.text, shown, linked=line in self.scene.moves)
        return True

    def draw(self, operation: str) -> tuple[dict[str, int], list[tuple[_Term, str, _Term]]] | None:
        """Numbers for a line, by placeholder, and its calculations; ``None`` if there are none."""
        rng, v = self.rng, self.value
        n, a, b = rng.randint(2, 40), rng.randint(2, 6), rng.randint(2, 12)
        match operation:
            case "?":
                return {}, []
            case "=":
                return {"n": n + rng.randint(3, 40)}, []
            case "=+":
                a, b = n + 3, rng.randint(3, 40)
                return {"a": a, "b": b}, [(a, "+", b)]
            case "=*":
                return {"a": a, "b": b}, [(a, "*", b)]
            case "+":
                return {"n": n}, [("v", "+", n)]
            case "-":
                n = rng.randint(2, max(2, min(60, v - 2)))
                return {"n": n}, [("v", "-", n)]
            case "+*" | "-*":
                return {"a": a, "b": b}, [(a, "*", b), ("v", operation[0], "it")]
            case "*":
                k = rng.choice(list(_TIMES))
                return {"k": k}, [("v", "*", k)]
            case "/" | "-/":
                shares = [k for k in _SHARES if v % k == 0]
                if not shares:
                    return None
                k = rng.choice(shares)
                return {"k": k}, [("v", "/", k), ("v", "-", "it")][: len(operation)]
            case "?/":
                sizes = [n for n in range(2, 13) if v % n == 0 and v > n]
                if not sizes:
                    return None
                n = rng.choice(sizes)
                return {"n": n}, [("v", "/", n)]
            case "?*":
                n = rng.randint(2, 9)
                return {"n": n}, [("v", "*", n)]
            case "?-":
                return {"n": v + n}, [(v + n, "-", "v")]
            case "?++":
                return {"n": n}, [("v", "+", n), ("v", "+", "it")]
            case "?+*":
                k = rng.choice(list(_TIMES))
                return {"k": k}, [("v", "*", k), ("v", "+", "it")]
        raise AssertionError(operation)

    def say(self, template: str, shown: Mapping[str, int], *, linked: bool = False) -> None:
        """Write the sentences of a template, perhaps with a word that links it to the last one."""
        rng = self.rng
        named = not self.clear or rng.random() < _NAMED
        words: dict[str, Any] = {**self.words, **shown}
        words["s"] = self.words["name" if named else "he"]
        if "k" in shown:
            words |= {"times": _TIMES.get(shown["k"]), "share": _SHARES[shown["k"]]}
        text = template.format_map(words)
        if linked and template.startswith("{"):
            link = rng.choice(LINKS)
            text = text if link == self.link else link + text
            self.link = link
        self.sentences.append(text[0].upper() + text[1:])
        self.numbers += [value for key, value in shown.items() if key != "k"]
        self.clear = "{other}" not in template

    def distract(self) -> None:
        """Say something that does not matter."""
        self.say(self.rng.choice(DISTRACTORS), {"n": self.rng.randint(2, 12)})
        self.clear = False


def _cost(line: Line) -> int:
    """How many steps a line takes."""
    return len(line.operation.lstrip("=?"))
