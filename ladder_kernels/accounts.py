"""Who watches the memory that tensors take, and what the library tells them.

A watcher is a dispatch mode that counts tensors
(:class:`ladder_kernels.memory.meter.Meter`). It sees what PyTorch's operations make. What it cannot
see by itself is said here: what a tensor is for (:func:`count_as`), and that an operation of this
library begins, whose inside a dispatch mode does not see otherwise (:func:`inside_operation`).
Without watchers nothing of this costs anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "Category",
    "Watcher",
    "count_as",
    "inside_operation",
    "others_watch",
    "watched_by",
]

Category = Literal["weights", "taps", "transients", "ladder", "optimizer"]
"""What device memory is for: the frozen model; what the frozen pass keeps for the side pass;
whatever lives for a part of a step only; the trained parameters and their gradients; the
optimizer's states and temporaries."""


class Watcher(Protocol):
    """A dispatch mode that counts tensors."""

    def count(self, category: Category, tensor: torch.Tensor) -> None:
        """Count a tensor's memory to ``category`` from here on; also one never seen before."""

    def __enter__(self) -> Any:
        """See operations from here on."""

    def __exit__(self, *error: Any) -> Any:
        """See no more of them."""


_watchers: list[Watcher] = []
_NOBODY: AbstractContextManager[None] = nullcontext()
Counted = TypeVar("Counted", bound=torch.Tensor)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` what is said here, in all threads."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def count_as(category: Category, tensor: Counted) -> Counted:
    """Say what a tensor's memory is for, wherever the tensor was made.

    Args:
        category: What for.
        tensor: Any; views count the memory that they share once.

    Returns:
        ``tensor``.
    """
    for watcher in _watchers:
        watcher.count(category, tensor)
    return tensor


def inside_operation() -> AbstractContextManager[None]:
    """Let watchers see what an operation does inside."""
    return _entered() if _watchers else _NOBODY


@contextmanager
def _entered() -> Iterator[None]:
    stack = _get_current_dispatch_mode_stack()
    with contextlib.ExitStack() as entered:
        for watcher in _watchers:
            if not any(mode is watcher for mode in stack):
                entered.enter_context(watcher)
        yield


def others_watch() -> bool:
    """Whether a dispatch mode is active that is no watcher, and so may need to see everything."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(
        all(mode is not watcher for watcher in _watchers)
        for mode in _get_current_dispatch_mode_stack()
    )
