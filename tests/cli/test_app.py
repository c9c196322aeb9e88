"""Help, exit codes and messages."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import typer

import ladder_kernels as lk
from ladder_kernels.cli import app

COMMANDS = ("plan", "train", "generate", "evaluate", "quantize", "info", "audit")

# A command that does what a test wants, in the frame of the real ones.
EXTRA = """
import sys, warnings
from ladder_kernels import errors
from ladder_kernels.cli.app import app, main

@app.command()
def extra():
    {body}

main(["extra"])
"""


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("evaluate", "-h")])
def test_help_imports_nothing_heavy(spawn, arguments):
    code = (
        "import sys\nfrom ladder_kernels.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('imported:', sorted(set(sys.modules) & "
        "{'torch', 'transformers', 'datasets', 'numpy', 'safetensors'}))"
    )
    run = spawn(*arguments, code=code)
    assert run.code == 0
    assert "Usage: ladder-kernels" in run.stdout
    assert "imported: []" in run.stdout


def test_without_a_command_help_is_shown(call):
    run = call()
    assert run.code == 0
    for name in COMMANDS:
        assert name in run.stdout


def test_version(call):
    assert call("--version").stdout == f"ladder_kernels {lk.__version__}\n"


def test_every_option_of_every_command_has_help():
    commands = typer.main.get_command(app).commands
    assert sorted(commands) == sorted(COMMANDS)
    for command in commands.values():
        assert command.help
        for parameter in command.params:
            assert parameter.help, (command.name, parameter.name)


def test_an_unexpected_exception_keeps_its_traceback(spawn):
    run = spawn(code=EXTRA.format(body="raise RuntimeError('a bug')"))
    assert run.code == 1
    assert run.stderr.startswith("Traceback (most recent call last)")
    assert run.stderr.rstrip().endswith("RuntimeError: a bug")


def test_an_error_of_several_lines_becomes_one(spawn):
    run = spawn(code=EXTRA.format(body="raise errors.ConfigError('one\\ntwo\\n\\n  three')"))
    run.assert_refused("one two three")


def test_a_file_that_may_not_be_written_is_no_bug(spawn, tmp_path):
    (tmp_path / "file").touch()
    run = spawn(code=EXTRA.format(body="open('file/below', 'w')"))
    run.assert_refused("Not a directory", "'file/below'")


def test_warnings_are_lines_without_code(spawn):
    body = (
        "warnings.warn('first\\nsecond', errors.BackendFallbackWarning); "
        "warnings.warn('for authors', DeprecationWarning); "
        "warnings.warn('for authors', FutureWarning)"
    )
    run = spawn(code=EXTRA.format(body=body))
    assert (run.code, run.stdout, run.stderr) == (0, "", "warning: first second\n")


def test_verbose_shows_all_warnings(spawn, base):
    code = (
        "import sys, warnings\nfrom ladder_kernels.cli import app, main\n"
        "from ladder_kernels.cli.console import Verbose\n"
        "def extra(verbose: Verbose = False):\n    warnings.warn('for authors', FutureWarning)\n"
        "app.command('extra')(extra)\nmain(sys.argv[1:])"
    )
    assert spawn("extra", code=code).stderr == ""
    assert spawn("extra", "--verbose", code=code).stderr == "warning: for authors\n"


def test_interrupt(base, environment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "ladder_kernels", "generate", "--model", str(base), "-v"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(PYTHONUNBUFFERED="1"),
        text=True,
        # Whoever runs the tests in the background has it ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # It waits for a prompt once it has read this much; more than a pipe holds.
        process.stdin.write("x" * 200_000)
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr == "interrupted\n"


def test_a_reader_that_leaves_is_no_bug(base, environment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "ladder_kernels", "generate", "--model", str(base), "--raw", "hi"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(),
        text=True,
    )
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=60) != 0
    assert "Traceback" not in stderr
