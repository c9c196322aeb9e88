from __future__ import annotations

import itertools
import re
from collections import Counter
from fractions import Fraction
from string import Formatter

import pytest

from bench.learning.tasks.base import Example
from bench.learning.tasks.maths import MathsTask, maths_task
from bench.learning.tasks.problems import problems
from bench.learning.tasks.stories import SCENES

WORDS = {
    "twice": 2, "three times": 3, "four times": 4,
    "half": 2, "a third": 3, "a quarter": 4, "a fifth": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def task() -> MathsTask:
    return maths_task(train_size=3000)


def calculate(left: int, sign: str, right: int) -> Fraction:
    a, b = Fraction(left), Fraction(right)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]


def test_every_chain_is_right(task: MathsTask) -> None:
    for example in (*task.train, *task.held_out):
        *lines, last = example.answer.split("\n")
        question = example.prompt.removeprefix("Question: ").removesuffix("\nSolution:\n")
        known = {int(number) for number in re.findall(r"\d+", question)}
        known |= {number for word, number in WORDS.items() if word in question.lower()}
        unused: list[int] = []
        for line in lines:
            left, sign, right, equals, result = line.split(" ")
            assert equals == "="
            assert calculate(int(left), sign, int(right)) == int(result), line
            assert {int(left), int(right)} <= known, example
            assert all(1 <= int(number) <= 999 for number in (left, right, result))
            unused = [each for each in unused if each not in (int(left), int(right))]
            unused.append(int(result))
            known.add(int(result))
        # Every result is used by a later step, except the last, which is the answer.
        assert last == f"Answer: {unused.pop()}"
        assert not unused, example
        assert example.details == {"depth": len(lines), "number": int(last.split()[1])}


def test_questions_read_well(task: MathsTask) -> None:
    for example in (*task.train, *task.held_out):
        assert example.prompt.startswith("Question: ")
        assert example.prompt.endswith("?\nSolution:\n")
        question = example.prompt.removeprefix("Question: ").removesuffix("\nSolution:\n")
        assert question.count("?") == 1
        assert not re.search(r"[{}\n]|  |\.\.|None|(^|[.] )[a-z]|\b1 [a-z]+s\b", question), question


def test_questions_that_were_asked_are_not_asked_again() -> None:
    first = [problem.question for problem in itertools.islice(problems("key", lambda _: 2), 20)]
    without = set(first[::2])
    rest = itertools.islice(problems("key", lambda _: 2, without=without), 10)
    assert [problem.question for problem in rest] == first[1::2]


def test_depths_are_equally_frequent(task: MathsTask) -> None:
    depths = Counter(example.details["depth"] for example in task.held_out)
    assert depths == dict.fromkeys(range(2, 7), 50)
    assert [example.details["depth"] for example in task.held_out[:5]] == [2, 3, 4, 5, 6]
    depths = Counter(example.details["depth"] for example in task.train)
    assert set(depths) == set(range(2, 7))
    assert all(500 < count < 700 for count in depths.values())


def test_every_scene_and_operation_occurs(task: MathsTask) -> None:
    signs = Counter(
        sign for example in task.train for sign in re.findall(r" ([-+*/]) ", example.answer)
    )
    assert min(signs[sign] for sign in "+-*/") > 1000
    for scene in SCENES:
        assert any(re.search(rf"\b({'|'.join(scene.items)})\b", e.prompt) for e in task.train)


def test_lines_show_the_numbers_of_their_operations() -> None:
    shown = {
        "=": {"n"}, "=+": {"a", "b"}, "=*": {"a", "b"},
        "+": {"n"}, "-": {"n"}, "+*": {"a", "b"}, "-*": {"a", "b"},
        "*": {"times"}, "/": {"share"}, "-/": {"share"},
        "?": set(), "?/": {"n"}, "?*": {"n"}, "?-": {"n"}, "?++": {"n"}, "?+*": {"times"},
    }  # fmt: skip
    for scene in SCENES:
        assert {line.operation for line in scene.openings} <= {"=", "=+", "=*"}
        assert len(scene.openings) >= 3
        assert len(scene.moves) >= 8
        assert len(scene.endings) >= 4
        for line in (*scene.openings, *scene.moves, *scene.endings):
            fields = [name for _, name, _, _ in Formatter().parse(line.text) if name]
            counted = {"n", "a", "b", "times", "share"}.intersection(fields)
            assert counted == shown[line.operation], line
            assert all(fields.count(name) == 1 for name in counted)
            assert line.text[-1] == ("?" if line.operation[0] == "?" else "."), line


@pytest.mark.parametrize(
    ("output", "exact_match", "answered", "steps", "steps_right"),
    [
        ("12 + 7 = 19\n19 * 3 = 57\nAnswer: 57", 1, 1, 2, 1),
        ("12 + 7 = 19\n19 * 3 = 57\nAnswer: 57.", 1, 1, 2, 1),
        ("Answer: 57", 1, 1, 0, 0),
        ("12 + 7 = 20\n20 * 3 = 60\nAnswer: 57", 1, 1, 2, 0),
        ("12 + 7 = 19\n19 * 2 = 38\nAnswer: 38", 0, 1, 2, 1),
        ("Answer: 12\n19 * 3 = 57\nAnswer: 57", 1, 1, 1, 1),
        ("19 * 3 = 57\nAnswer: 57\nAnswer: 12", 0, 1, 1, 1),
        ("19 * 3 = 57\nAnswer: 57\nAnswer:", 0, 0, 1, 1),
        ("19 * 3 = 57", 0, 0, 1, 1),
        ("19 * 3 = 57\nAnswer: 571", 0, 1, 1, 1),
        ("19 * 3 = 57\nAnswer: 57.5", 0, 0, 1, 1),
        ("19 * 3 = 57\nAnswer: 57,000", 0, 0, 1, 1),
        ("19 * 3 = 57\nAnswer: -57", 0, 1, 1, 1),
        ("114 / 2 = 57\nAnswer: 57", 1, 1, 1, 1),
        ("115 / 2 = 57\nAnswer: 57", 1, 1, 1, 0),
        ("57 / 0 = 57\nAnswer: 57", 1, 1, 1, 0),
        ("12 + 7 + 38 = 57\nAnswer: 57", 1, 1, 1, 0),
        ("12 + = 57\nAnswer: 57", 1, 1, 1, 0),
        ("no idea", 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_score(
    task: MathsTask,
    output: str,
    exact_match: int,
    answered: int,
    steps: int,
    steps_right: int,
) -> None:
    example = Example(prompt="", answer="", details={"depth": 2, "number": 57})
    assert task.score(example, output) == {
        "exact_match": exact_match,
        "answered": answered,
        "steps": steps,
        "steps_right": steps_right,
    }


def test_the_right_answers_score_full(task: MathsTask) -> None:
    for example in task.held_out:
        assert task.score(example, example.answer) == {
            "exact_match": 1.0,
            "answered": 1.0,
            "steps": example.details["depth"],
            "steps_right": 1.0,
        }


def test_the_default_has_enough_to_train_on() -> None:
    task = maths_task()
    assert len({example.prompt for example in task.train}) == len(task.train) == 20_000
