"""Finding and loading the native library: in processes of their own, since it is loaded once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ladder_kernels import __version__, native
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.ops.nf4_linear import cpu

COMPUTE = """
    import torch, warnings
    warnings.simplefilter("always")
    import ladder_kernels as lk
    from ladder_kernels import native
    w = lk.quantize_nf4(torch.ones(8, 64))
    for _ in range(3):
        out = lk.nf4_linear(torch.ones(2, 64), w)
    assert torch.equal(out, torch.full((2, 8), 64.0)), out
    print(native.status().available, native.status().isa)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_status():
    status = native.status()
    assert status.available
    assert status.reason is None
    assert status.version == __version__
    assert status.isa in status.isas
    assert status.path is not None
    assert Path(status.path).is_file()
    openmp = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
    assert status.shares_threads == (openmp and sys.platform == "linux")


def test_import_loads_nothing():
    done = run("import sys, ladder_kernels; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("isa", native.status().isas)
def test_the_environment_forces_a_variant(isa: str):
    done = run(COMPUTE, LADDER_KERNELS_CPU_ISA=isa)
    assert done.stdout.split() == ["True", isa], done.stderr


def test_a_variant_that_there_is_not():
    done = run(COMPUTE, LADDER_KERNELS_CPU_ISA="sse9")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "ladder_kernels.errors.ConfigError: LADDER_KERNELS_CPU_ISA is 'sse9'; this processor and "
        f"library have {', '.join(native.status().isas)}"
    )


def with_library(folder: Path, content: bytes | None) -> str:
    """Code that puts a file in the library's place (or nothing), then computes."""
    place = folder / f"_library{Path(str(native.status().path)).suffix}"
    if content is not None:
        place.write_bytes(content)
    found = (
        "None"
        if content is None
        else f"importlib.machinery.ModuleSpec(name, None, origin={str(place)!r})"
    )
    return f"""
    import importlib.machinery, sys
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "ladder_kernels.native._elsewhere":
                return {found}
    sys.meta_path.insert(0, Finder)
    from ladder_kernels import native
    native.MODULE = "ladder_kernels.native._elsewhere"
    {COMPUTE}"""


def test_missing_is_said_once(tmp_path: Path):
    done = run(with_library(tmp_path, None))
    assert done.stdout.split() == ["False", "None"], done.stderr
    assert done.stderr.count("BackendFallbackWarning") == 1
    assert "the native library is not installed" in done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:5000], "the native library is truncated"),
        (lambda content: content[:-1], "the native library is truncated"),
        (lambda content: bytes(len(content)), "the native library cannot be loaded"),
    ],
)
def test_corrupt_is_said_once(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    content = Path(str(native.status().path)).read_bytes()
    done = run(with_library(tmp_path, damage(content)))
    assert done.stdout.split() == ["False", "None"], done.stderr
    assert done.stderr.count("BackendFallbackWarning") == 1
    assert message in done.stderr


def test_another_release_is_said_once(tmp_path: Path):
    library = Path(str(native.status().path)).read_bytes()
    version = __version__.encode() + b"\0"
    assert version in library
    other = library.replace(version, b"9.9.9\0".ljust(len(version), b"\0")[: len(version)])
    done = run(with_library(tmp_path, other))
    assert done.stdout.split() == ["False", "None"], done.stderr
    assert done.stderr.count("BackendFallbackWarning") == 1
    assert f"the native library is of release 9.9.9 (interface {native.ABI_VERSION})" in done.stderr


@pytest.fixture
def own_threads() -> Iterator[Callable[[], None]]:
    """Has kernels run on threads of their own, for the rest of the test."""
    library = native.library()
    assert library is not None
    yield lambda: library.lk_set_parallel_region(None)
    native.share_threads(library)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("four_threads")
def test_whose_threads_changes_no_bit(own_threads: Callable[[], None]):
    x, weight = torch.randn(300, 192), quantize_nf4(torch.randn(500, 192))
    wanted = cpu.nf4_linear(x, weight)
    own_threads()
    assert torch.equal(cpu.nf4_linear(x, weight), wanted)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("shared", [True, False])
def test_callers_at_once(shared: bool, own_threads: Callable[[], None]):
    """Callers on several Python threads, between PyTorch's own parallel operations."""
    if not shared:
        own_threads()
    weight = quantize_nf4(torch.randn(500, 192))
    inputs = [torch.randn(200, 192) for _ in range(6)]
    wanted = [cpu.nf4_linear(x, weight).relu() for x in inputs]
    with ThreadPoolExecutor(3) as callers:
        for _ in range(20):
            found = callers.map(lambda x: cpu.nf4_linear(x, weight).relu(), inputs)
            assert all(torch.equal(got, one) for got, one in zip(found, wanted, strict=True))


def _in_child(inputs: tuple[torch.Tensor, NF4Weight]) -> list[float]:
    return cpu.nf4_linear(*inputs).flatten().tolist()


@pytest.mark.timeout(60)
def test_after_a_fork():
    """A child has none of its parent's threads, as in a DataLoader's workers."""
    inputs = (torch.randn(40, 64), quantize_nf4(torch.randn(300, 64)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    wanted = _in_child(inputs)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for got in pool.map(_in_child, [inputs, inputs, inputs]):
            assert got == wanted
    assert _in_child(inputs) == wanted
    torch.set_num_threads(threads)
