"""The calls of the audit's catalogue with real tensors, at full size or small, and what is right.

A case of the catalogue calls a launcher with tensors that have shapes only. :func:`calls` finds out
which launcher, and with what; :meth:`Call.on` makes the same arguments with numbers in them, and
:meth:`Call.verify` compares the launcher with the reference of the same name.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.random_weights import fill_nf4
from bench.timing import verified
from ladder_kernels import nf4, ops
from ladder_kernels.audit.catalogue import Case, cases
from ladder_kernels.launch import HOST_TARGET, on_host
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4 import quantize as nf4_reference
from ladder_kernels.ops import use_backend

__all__ = ["Call", "calls", "shrunk"]

_LABELS = 128
_SCALE = 0.1
# Where small tensors stand for those of the catalogue; blocks of weights stay whole.
_SMALL = {3584: 128, 18944: 192, 152064: 320, 2048: 72, 512: 64, 224: 32, 128: 64, 64: 32}
_LARGEST = 256


def shrunk(size: int) -> int:
    """A small size that stands for a size of the catalogue, the same one everywhere."""
    return _SMALL.get(size, size if size <= _LARGEST else 64 * (1 + size % 3))


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a launcher.

    Attributes:
        name: Of the catalogue's case.
        module: A ``gpu`` module.
        function: Of it.
        arguments: What it is called with.
        case: The catalogue's case.
    """

    name: str
    module: ModuleType
    function: str
    arguments: tuple[Any, ...]
    case: Case

    def on(
        self,
        device: torch.device | str,
        *,
        size: Callable[[int], int] = lambda size: size,
        half: torch.dtype = torch.bfloat16,
    ) -> Call:
        """The same call with numbers: random, the same in every run.

        Args:
            device: Where.
            size: Other sizes for those of the catalogue, such as :func:`shrunk`.
            half: What stands for bfloat16.
        """
        made = _Made(torch.device(device), size, half)
        arguments = tuple(made.value(each) for each in self.arguments)
        if (self.module.__name__, self.function) == (_NF4, "dequantize"):
            weight = arguments[0]
            arguments = (weight, 0, weight.numel, half)
        return replace(self, arguments=arguments)

    def unsupported(self) -> str | None:
        """Why the launcher refuses the call; ``None`` if it does not."""
        if self.module.__name__ == _NF4:
            return None
        return self.module.unsupported(*self.arguments)

    def __call__(self) -> Any:
        """Call the launcher."""
        return getattr(self.module, self.function)(*self.arguments)

    def verify(self) -> float:
        """Compare with the reference, in the same dtype and in float64.

        Returns:
            The largest of all results' errors, as a part of what the tolerance rule allows.

        Raises:
            RuntimeError: A result is less accurate than that.
        """
        ours = _results(getattr(self.module, self.function), self.arguments)
        reference = _reference(self.module, self.function)
        with use_backend("reference"):
            same = _results(reference, self.arguments)
            exact = _results(reference, tuple(_wide(each) for each in self.arguments))
        if not len(ours) == len(same) == len(exact) > 0:
            raise RuntimeError(f"{self.name}: {len(ours)} results; the reference has {len(same)}")
        return max(
            verified_part(self.name, *results) for results in zip(ours, same, exact, strict=True)
        )


def verified_part(name: str, result: Tensor, same: Tensor, exact: Tensor) -> float:
    """The error of a result that :func:`~bench.timing.verified` takes, of what it allows."""
    if result.shape != exact.shape or result.dtype != same.dtype:
        raise RuntimeError(
            f"{name}: {result.dtype} {list(result.shape)} instead of {same.dtype} "
            f"{list(exact.shape)}; not timed"
        )
    if result.numel() == 0:
        return 0.0
    exact = exact.double()
    verified(name, result, same, exact)
    error = (result.double() - exact).abs().max().item()
    allowed = 2 * (same.double() - exact).abs().max().item() + 1e-5 * exact.abs().max().item()
    return error / allowed if allowed else 0.0


def calls(target: str = HOST_TARGET) -> Iterator[Call]:
    """Every call of the catalogue, with tensors that have shapes only. Needs Triton.

    Args:
        target: The GPU that launchers are asked about: what they do not take there is left out.
    """
    for case in cases():
        found: list[Call] = []
        with on_host("recorder", target), _noting(found, case):
            case.call()
        yield from found


_NF4 = f"{nf4.__name__}.gpu"


def _modules() -> list[ModuleType]:
    names = [f"{ops.__name__}.{each.name}.gpu" for each in pkgutil.iter_modules(ops.__path__)]
    found = [name for name in names if _exists(name)]
    return [importlib.import_module(name) for name in (_NF4, *found)]


def _exists(name: str) -> bool:
    package = name.rpartition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return False
    return importlib.util.find_spec(name) is not None


@contextmanager
def _noting(found: list[Call], case: Case) -> Iterator[None]:
    """Within it, launchers note that they are called, and do nothing."""
    before: list[tuple[ModuleType, str, Any]] = []

    def note(module: ModuleType, function: str) -> Callable[..., None]:
        def noted(*arguments: Any) -> None:
            found.append(
                Call(
                    name=case.name, module=module, function=function, arguments=arguments, case=case
                )
            )

        return noted

    for module in _modules():
        for function in _launchers(module):
            before.append((module, function, getattr(module, function)))
            setattr(module, function, note(module, function))
    try:
        yield
    finally:
        for module, function, original in before:
            setattr(module, function, original)


def _launchers(module: ModuleType) -> list[str]:
    """The functions of a ``gpu`` module that a reference has too."""
    if module.__name__ == _NF4:
        return list(_NF4_REFERENCES)
    reference = importlib.import_module(module.__name__.removesuffix("gpu") + "reference")
    return [name for name in reference.__all__ if callable(getattr(module, name, None))]


def _reference(module: ModuleType, function: str) -> Callable[..., Any]:
    if module.__name__ == _NF4:
        return _NF4_REFERENCES[function]
    reference = importlib.import_module(module.__name__.removesuffix("gpu") + "reference")
    return getattr(reference, function)


def _packed(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    # float64 is no dtype of the format, and float32 holds every bfloat16 exactly.
    weight = weight.float() if weight.dtype == torch.float64 else weight
    return nf4_reference.quantize_blocks(weight, blocksize, name="weight")


def _dequantized(weight: NF4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype).view(-1)[start:stop]


_NF4_REFERENCES: Mapping[str, Callable[..., Any]] = {
    "pack_blocks": _packed,
    "dequantize": _dequantized,
}


def _results(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a function returns; of one that returns nothing, what it overwrites."""
    own = tuple(each.clone() if isinstance(each, Tensor) else each for each in arguments)
    out = function(*own)
    return [each for each in tree_leaves(own if out is None else out) if isinstance(each, Tensor)]


def _wide(value: Any) -> Any:
    """An argument in float64; NF4 weights and whole numbers as they are."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list):
        return [_wide(each) for each in value]
    return torch.float64 if isinstance(value, torch.dtype) else value


class _Made:
    """Tensors with numbers for tensors without; the same one for the same one."""

    def __init__(self, device: torch.device, size: Callable[[int], int], half: torch.dtype) -> None:
        self._device = device
        self._size = size
        self._half = half
        self._generator = torch.Generator(device).manual_seed(0)
        self._known: dict[int, Tensor] = {}

    def value(self, value: Any) -> Any:
        """An argument for an argument."""
        if isinstance(value, Tensor):
            if id(value) not in self._known:
                self._known[id(value)] = self._tensor(value)
            return self._known[id(value)]
        if isinstance(value, NF4Weight):
            return self._nf4(value)
        return [self.value(each) for each in value] if isinstance(value, list) else value

    def _tensor(self, like: Tensor) -> Tensor:
        shape = tuple(map(self._size, like.shape))
        if not like.is_floating_point():
            return self._whole(_LABELS, shape, like.dtype)
        numbers = torch.randn(shape, generator=self._generator, device=self._device)
        return (numbers * _SCALE).to(self._half if like.dtype == torch.bfloat16 else like.dtype)

    def _whole(self, below: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(
            below, shape, generator=self._generator, device=self._device, dtype=dtype
        )

    def _nf4(self, like: NF4Weight) -> NF4Weight:
        weight = NF4Weight.empty(
            tuple(map(self._size, like.shape)),
            blocksize=like.blocksize,
            double_quant=like.double_quant,
            dtype=self._half,
            device=self._device,
        )
        fill_nf4(weight, self._generator)
        return weight
