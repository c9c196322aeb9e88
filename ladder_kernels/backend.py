"""The user's choice of a backend, and the word that is said when a faster one cannot run.

What a choice means is said by those who follow it: ``ladder_kernels.ops`` for operations,
``ladder_kernels.nf4`` for quantising and dequantising.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ladder_kernels.errors import BackendFallbackWarning, ConfigError

__all__ = [
    "BACKENDS",
    "get_backend",
    "say_fallback",
    "set_backend",
    "use_backend",
    "warn_once",
]

BACKENDS = ("auto", "triton", "cpu", "reference")
"""The names that :func:`set_backend` and :func:`use_backend` accept."""


class _Default:
    """The backend of the whole process, below any :func:`use_backend` block."""

    name = "auto"


_chosen: ContextVar[str | None] = ContextVar("ladder_kernels_backend", default=None)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        allowed = ", ".join(f"'{known}'" for known in BACKENDS)
        raise ConfigError(f"backend {name!r} is not known; allowed are {allowed}")
    return name


def set_backend(name: str) -> None:
    """Choose the backend of every operation, for the whole process.

    Args:
        name: ``"auto"`` (the default): what an operation ships for the tensors' device, else its
            reference, with one :class:`~ladder_kernels.errors.BackendFallbackWarning` where a
            shipped one cannot run. ``"reference"``: plain PyTorch everywhere. ``"cpu"`` and
            ``"triton"``: the native CPU kernels and the GPU kernels, and an error instead of a
            fallback; operations that have no such kernel run on PyTorch's, as under "auto".

    Raises:
        ConfigError: ``name`` is none of these. (Whether a backend can run is asked at each call,
            since it depends on the tensors; a forced one that cannot raises
            :class:`~ladder_kernels.errors.BackendError` there.)
    """
    _Default.name = _checked(name)


def get_backend() -> str:
    """Return the backend in force here: the innermost :func:`use_backend`, else the default."""
    return _chosen.get() or _Default.name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block (or a decorated function), as `set_backend` does.

    The choice holds for the current thread or asynchronous task only. The backward pass of an
    operation runs on the backend that its forward was given, wherever ``backward()`` is called.

    Args:
        name: one of :data:`BACKENDS`.

    Raises:
        ConfigError: ``name`` is not one of them.
    """
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def say_fallback(backend: str, reason: str) -> None:
    """Warn, once for each reason, that plain PyTorch runs instead of a backend's kernels."""
    warn_once(
        f"operations run on plain PyTorch instead of their '{backend}' kernels: {reason} "
        "(use_backend('reference') silences this)"
    )


@functools.cache
def warn_once(message: str) -> None:
    """Issue a :class:`~ladder_kernels.errors.BackendFallbackWarning`, the first time only."""
    warnings.warn(message, BackendFallbackWarning, stacklevel=2)
