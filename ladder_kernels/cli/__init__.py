"""The command line, ``ladder-kernels``: one module a command.

Nothing heavy is imported before a command runs, so that help comes at once. What a user can get
wrong ends in one line on stderr and exit code 2; see :mod:`ladder_kernels.cli.app`.
"""

from __future__ import annotations

from ladder_kernels.cli.app import app, main

__all__ = ["app", "main"]
