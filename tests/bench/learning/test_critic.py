from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from bench.learning.tasks import critic as critic_module
from bench.learning.tasks.base import ClassesTask
from bench.learning.tasks.critic import CLASSES, critic_task
from bench.learning.tasks.problems import Problem, Result, Step

Line = tuple[int, str, int, int]


@pytest.fixture(scope="module")
def task() -> ClassesTask:
    return critic_task(train_size=6000)


def read(line: str) -> Line:
    left, sign, right, equals, result = line.split(" ")
    assert equals == "="
    return int(left), sign, int(right), int(result)


def holds(line: Line) -> bool:
    left, sign, right, result = line
    return {
        "+": left + right == result,
        "-": left - right == result,
        "*": left * right == result,
        "/": right * result == left,
    }[sign]


def test_the_planted_step_is_the_first_wrong_one(task: ClassesTask) -> None:
    for example in (*task.train, *task.held_out):
        head, _, end = example.prompt.partition("\nSolution:\n")
        assert head == f"Question: {example.details['question']}"
        *numbered, last = end.split("\n")
        assert last == "First wrong step:"
        written = []
        for number, line in enumerate(numbered, start=1):
            assert line.startswith(f"{number}. ")
            written.append(read(line.split(". ", maxsplit=1)[1]))
        right = [read(line) for line in example.details["solution"].split("\n")]
        assert len(written) == len(right) == example.details["depth"]
        assert all(map(holds, right))
        assert all(1 <= number <= 999 for line in written for number in line[::2])

        step, mistake = example.details["step"], example.details["mistake"]
        assert example.answer == CLASSES[step]
        if not step:
            assert (written, mistake) == (right, "")
            continue
        assert written[: step - 1] == right[: step - 1]
        wrong, meant = written[step - 1], right[step - 1]
        assert wrong[3] != meant[3]
        same = tuple(wrong[place] == meant[place] for place in range(3))
        assert (
            same
            in {
                "result": [(True, True, True)],
                "operand": [(False, True, True), (True, True, False)],
                "operation": [(True, False, True)],
            }[mistake]
        )
        assert [holds(line) for line in written].count(False) == (mistake == "result")
        assert holds(wrong) != (mistake == "result")
        # What follows is the same calculation, with results in place of what they should be.
        became = {(before[3], after[3]) for before, after in zip(right, written, strict=True)}
        for before, after in zip(right[step:], written[step:], strict=True):
            assert before[1] == after[1]
            for place in (0, 2):
                assert before[place] == after[place] or (before[place], after[place]) in became


def test_another_order_of_steps_is_no_mistake() -> None:
    steps = (Step(left=10, sign="+", right=5), Step(left=Result(0), sign="+", right=8))
    problem = Problem(question="", steps=steps, numbers=(10, 5, 8))
    rng = random.Random(0)
    planted = [critic_module._plant(problem, rng) for _ in range(500)]
    first = {str(found[0][0]) for found in planted if found is not None and found[1] == 1}
    assert "10 + 8 = 18" not in first
    assert {"10 + 10 = 20", "10 + 6 = 16", "10 * 5 = 50"} <= first


def test_half_is_right(task: ClassesTask) -> None:
    for examples in (task.train, task.held_out, task.held_out[:100]):
        assert sum(example.answer == " none" for example in examples) * 2 == len(examples)


def test_right_and_wrong_solutions_are_alike(task: ClassesTask) -> None:
    """The length of a solution must not tell whether it is right."""
    right, wrong = (
        Counter(e.details["depth"] for e in task.train if (e.details["step"] > 0) == wrong)
        for wrong in (False, True)
    )
    for depth in range(2, 7):
        assert right[depth] / 3000 == pytest.approx(depth / 20, abs=0.03)
        assert wrong[depth] / 3000 == pytest.approx(depth / 20, abs=0.03)


def test_any_step_may_be_wrong(task: ClassesTask) -> None:
    wrong = [example.details for example in task.train if example.details["step"]]
    steps = Counter((details["depth"], details["step"]) for details in wrong)
    assert set(steps) == {(d, step) for d in range(2, 7) for step in range(1, d + 1)}
    # A twentieth of all, were every mistake possible at every step.
    assert all(0.03 < count / len(wrong) < 0.075 for count in steps.values())
    mistakes = Counter(details["mistake"] for details in wrong)
    for mistake, share in {"result": 0.5, "operand": 0.25, "operation": 0.25}.items():
        assert mistakes[mistake] / len(wrong) == pytest.approx(share, abs=0.06)


def test_score(task: ClassesTask) -> None:
    example = next(example for example in task.held_out if example.answer == " three")
    for output, right in {" three": 1.0, "three\n": 1.0, " none": 0.0, " 3": 0.0, "": 0.0}.items():
        assert task.score(example, output) == {"accuracy": right}, output


def test_no_problem_is_used_twice(task: ClassesTask) -> None:
    questions = [example.details["question"] for example in (*task.train, *task.held_out)]
    assert len(set(questions)) == len(questions)
    assert not any(re.search(r"[{}]", question) for question in questions)
