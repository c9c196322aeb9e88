"""What the tests of operations share: the tolerance rule, a memory recorder, backend hygiene."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ladder_kernels import ops


def _error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


def _assert_as_accurate(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """Design section 10: at most 2x the error of PyTorch in the same dtype, plus 1e-5 of scale."""
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape == same_dtype.shape
    if exact.numel() == 0:
        return
    allowed = 2 * _error(same_dtype, exact) + 1e-5 * exact.abs().max().item()
    assert _error(actual, exact) <= allowed


@pytest.fixture(scope="session")
def assert_as_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """``assert_as_accurate(actual, same_dtype_expression, float64_reference)``."""
    return _assert_as_accurate


class Recorder(TorchDispatchMode):
    """Watches the memory that PyTorch takes while it is entered; what was there does not count.

    ``largest`` is the size of the largest tensor made, in numbers; ``peak`` the most bytes that
    were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.peak = 0
        self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in _tensors((args, kwargs)):
            self._known.add(value.untyped_storage().data_ptr())
        out = func(*args, **kwargs)
        for value in _tensors(out):
            self._watch(value)
        return out

    def _watch(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or key in self._known:
            return
        self._known.add(key)
        self.largest = max(self.largest, value.numel())
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, Tensor)]


@pytest.fixture
def recorder() -> Recorder:
    """A mode to run a reference function under (operations hide their inside from modes)."""
    return Recorder()


@pytest.fixture
def reference_backend() -> Iterator[None]:
    """Run a test on the references, whatever native kernels there are."""
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``broken(module, right, wrong)`` is a module with one for the other in its source."""

    def load(right_module: ModuleType, right: str, wrong: str) -> Any:
        source = Path(str(right_module.__file__)).read_text()
        assert right in source
        path = tmp_path / "broken_gpu.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location("broken_gpu", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "broken_gpu", module)
        spec.loader.exec_module(module)
        return module

    return load
