"""The tasks of the study, each deterministic from a seed and made without a hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.learning.tasks.base import ClassesTask, Example, Task
from bench.learning.tasks.critic import critic_task
from bench.learning.tasks.docstrings import docstrings_task
from bench.learning.tasks.maths import maths_task
from bench.learning.tasks.nlu import nlu_task
from ladder_kernels.errors import ConfigError

__all__ = ["TASKS", "ClassesTask", "Example", "Task", "load_task"]

TASKS: Mapping[str, Callable[..., Task]] = {
    "nlu": nlu_task,
    "maths": maths_task,
    "critic": critic_task,
    "docstrings": docstrings_task,
}
"""What makes each task, by name; each takes a seed and options of its own."""


def load_task(name: str, seed: int = 0, **options: Any) -> Task:
    """Make a task.

    Args:
        name: One of :data:`TASKS`.
        seed: Of what is trained on and its order; what is held out is always the same.
        options: Of the task, such as ``train_size``.

    Raises:
        ConfigError: If there is no such task.
        MissingFileError: If the task's data is not to be had.
        DataError: If it cannot be read.
    """
    if name not in TASKS:
        raise ConfigError(f"task '{name}': found no such task; there are {', '.join(TASKS)}")
    return TASKS[name](seed, **options)
