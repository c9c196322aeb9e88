"""Launching Triton kernels, on a GPU or on what stands in for one.

A kernel runs on tensors of a GPU. Without one, :mod:`ladder_kernels.audit` runs the same launchers
on CPU tensors; :func:`on_host` is how it says so. Nothing here imports Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch

__all__ = ["Host", "host", "launch", "missing", "on_host"]

Host = Literal["interpreter", "executor", "recorder"]
"""What takes a kernel in place of a GPU."""

_host: ContextVar[Host | None] = ContextVar("ladder_kernels_host", default=None)


def host() -> Host | None:
    """What runs kernels on CPU tensors here; ``None``: nothing does."""
    return _host.get()


@contextmanager
def on_host(kind: Host) -> Iterator[None]:
    """Let Triton launchers take CPU tensors: ``kind`` runs them, as its caller has arranged."""
    token = _host.set(kind)
    try:
        yield
    finally:
        _host.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Launch a kernel on the device of its first argument, which is a tensor.

    Args:
        kernel: A ``@triton.jit`` function.
        grid: How many programs, up to three numbers.
        args: What the kernel takes, in order, without its constants.
        options: Its constants, and Triton's own, such as ``num_warps``.
    """
    first: Any = args[0]
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*args, **options)


def missing() -> str | None:
    """Why there is no Triton; ``None`` if there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'ladder_kernels[gpu]')"
    return None
