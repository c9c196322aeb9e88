"""The commands, and what happens when one of them fails.

Exit codes: 0 done; 2 something that the user can mend, said in one line on stderr (every
:class:`~ladder_kernels.errors.LadderKernelsError`, wrong usage, files that may not be read or
written); 130 interrupted; 1 anything else, with its traceback, for it is a bug.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated, Any, NoReturn

import typer

from ladder_kernels import __version__
from ladder_kernels.cli import audit, evaluate, generate, info, plan, quantize, train
from ladder_kernels.cli.console import one_line, say, show_warnings_as_lines
from ladder_kernels.errors import LadderKernelsError

__all__ = ["app", "main"]

USER_ERROR = 2
INTERRUPTED = 130

# Where click's exceptions live has changed between releases of typer; their names have not.
_UsageError: Any = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

# What the system refuses because of how the machine or the call is set up, not because of a bug.
_REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.EFBIG,
)  # fmt: skip

app = typer.Typer(
    name="ladder-kernels",
    help="Fine-tune large language models without a backward pass through them.",
    epilog="Exit codes: 0 done, 2 wrong input (one line says what), 130 interrupted, 1 a bug.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (plan, train, generate, evaluate, quantize, info, audit):
    app.command(command.__name__.rpartition(".")[2])(command.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ladder_kernels {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: Without the program's name; default those of the process.

    Raises:
        SystemExit: Always; see the module for its codes.
    """
    show_warnings_as_lines()
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="ladder-kernels", standalone_mode=False)
    except LadderKernelsError as error:
        return _refuse(error)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context is not None else ""
        return _refuse(one_line(error.format_message()).rstrip(".") + hint)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = "" if error.filename is None else f": '{error.filename}'"
        return _refuse(f"{error.strerror}{where}")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        say("interrupted")
    return code or 0


def _refuse(message: object) -> int:
    say(f"error: {one_line(message)}")
    return USER_ERROR
