"""What pytest is told: options, one item for each candidate of a case, and rows at the end.

Nothing here imports PyTorch before the processor is held to an instruction set, if it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.hold import ISAS, held
from bench.ops import SETS

if TYPE_CHECKING:
    from bench.ops.session import Session

_HERE = Path(__file__).parent
_SESSION = pytest.StashKey["Session"]()
# OpenBLAS's threads sleep soon after a product (log2 of cycles): by default they hold their cores
# for milliseconds of the next candidate's time.
_QUIET_THREADS = {"OPENBLAS_THREAD_TIMEOUT": "16"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operations", "benchmark of operations")
    group.addoption("--cases", choices=SETS, default="default", help="what is measured")
    group.addoption("--isa", choices=ISAS, help="hold every candidate to it")
    group.addoption("--seconds", type=float, default=1.0, help="for each case, more or less")
    group.addoption("--at-least", type=int, default=3, help="calls of each, however long they are")
    group.addoption("--small", action="store_true", help="small sizes: times say nothing")
    group.addoption(
        "--results", type=Path, help="folder for rows (default bench/results; none for --small)"
    )


def pytest_configure(config: pytest.Config) -> None:
    isa = config.getoption("--isa")
    if isa is not None and "torch" in sys.modules:
        raise pytest.UsageError("--isa: PyTorch is loaded already and cannot be held any more")
    os.environ.update({**held(isa), **_QUIET_THREADS})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("timeout"):  # large products take what they take
        for item in items:
            if item.path.is_relative_to(_HERE):
                item.add_marker(pytest.mark.timeout(0))


def pytest_generate_tests(metafunc: Any) -> None:
    if not {"case", "candidate"} <= set(metafunc.fixturenames):
        return
    from bench.ops.cases import cases
    from bench.ops.trial import candidates

    session = _session(metafunc.config)
    chosen = cases(metafunc.config.getoption("--cases"))
    if metafunc.config.getoption("--small"):
        chosen = list({str(small): small for small in (case.shrunk() for case in chosen)}.values())
    pairs = [(case, name) for case in chosen for name in candidates(case, session.device)]
    names = [f"{case}-{name.replace(' ', '_')}" for case, name in pairs]
    metafunc.parametrize(("case", "candidate"), pairs, ids=names)


def _session(config: Any) -> Session:
    from bench.ops.session import Session

    if _SESSION not in config.stash:
        config.stash[_SESSION] = Session.here(
            isa=config.getoption("--isa"),
            seconds=config.getoption("--seconds"),
            at_least=config.getoption("--at-least"),
        )
    return config.stash[_SESSION]


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """The run."""
    return _session(request.config)


@pytest.fixture
def together(request: pytest.FixtureRequest) -> list[str]:
    """The candidates of this case that were chosen to be timed."""
    case = request.node.callspec.params["case"]
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    return [spec.params["candidate"] for spec in specs if spec and spec.params["case"] == case]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash.get(_SESSION, None)
    if session is None or not session.findings:
        return
    session.roofline.measure()
    folder = config.getoption("--results")
    terminalreporter.write_line(f"\n{session.tables()}\n")
    if folder is not None or not config.getoption("--small"):
        terminalreporter.write_line(f"rows in {session.write(folder)}")
