"""Exceptions of ladder_kernels.

Each is also one of Python's own exception types, so that callers who know nothing of this library
still catch what they expect. The command line turns every :class:`LadderKernelsError` into one line
and exit code 2.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BackendFallbackWarning",
    "BaseMismatchError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LadderKernelsError",
    "MissingFileError",
    "NonFiniteError",
    "OutputExistsError",
    "UnsupportedModelError",
]


class LadderKernelsError(Exception):
    """Base class of every error that a user can cause and mend."""


class ConfigError(LadderKernelsError, ValueError):
    """An option, configuration field or combination of them is not allowed."""


class CheckpointError(LadderKernelsError, ValueError):
    """A model file is truncated, corrupt, or lacks something that it must hold."""


class BaseMismatchError(CheckpointError):
    """A saved ladder was asked to run on another base than the one it was trained on."""


class MissingFileError(LadderKernelsError, FileNotFoundError):
    """A file or folder that was named does not exist."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class OutputExistsError(LadderKernelsError, FileExistsError):
    """An output folder exists already and is not empty; nothing in it was touched."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(LadderKernelsError, ValueError):
    """The architecture cannot carry a ladder, or a feature of it is not supported."""


class NonFiniteError(LadderKernelsError, ValueError):
    """A tensor that must be finite holds NaN or infinity."""


class DataError(LadderKernelsError, ValueError):
    """Training or evaluation data is empty, unreadable, or lacks a named column."""


class BackendError(LadderKernelsError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class BackendFallbackWarning(UserWarning):
    """A faster backend exists for an operation but cannot be used; the reference runs instead."""
