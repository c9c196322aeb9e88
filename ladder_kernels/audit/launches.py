"""What a launch of a kernel asks Triton to compile, and a way to collect launches, running nothing.

Triton specialises a kernel for each launch: for the types of its arguments, for integers that are
1, and for pointers and integers that 16 divides. A launch here holds all of that, so that what is
audited is exactly what would be compiled on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ladder_kernels.launch import HOST_TARGET, on_host

__all__ = ["Launch", "launch_of", "recording"]

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_DIVISIBLE = [["tt.divisibility", 16]]
_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch.

    Attributes:
        kernel: The ``@triton.jit`` function.
        signature: Types of its arguments by name, in order; ``"constexpr"`` for constants.
        constants: Values of those; ``None`` and integers that are 1 are among them.
        attributes: What is known of arguments, by their place, as Triton writes it.
        options: ``num_warps``, ``num_stages``.
        values: Arguments that are not constants, by name, in order.
        grid: How many programs.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    values: Mapping[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def key(self) -> tuple[Any, ...]:
        """What two launches of the same code have in common."""
        return (
            self.kernel,
            tuple(self.signature.items()),
            tuple((name, str(value)) for name, value in self.constants.items()),
            str(self.attributes),
            tuple(sorted(self.options.items())),
        )


def launch_of(kernel: Any, grid: Any, args: Any, options: Mapping[str, Any]) -> Launch:
    """What ``kernel[grid](*args, **options)`` asks for.

    Args:
        kernel: A ``@triton.jit`` function.
        grid: A tuple, or a function of the arguments that gives one.
        args: Positional arguments.
        options: The rest: arguments by name, and options of Triton's.

    Raises:
        TypeError: An argument is of a kind that kernels do not take.
    """
    names = [parameter.name for parameter in kernel.params]
    given = {name: value for name, value in options.items() if name in names}
    bound = kernel.signature.bind(*args, **given)
    bound.apply_defaults()
    signature, constants, attributes, values = {}, {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        value = bound.arguments[name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", getattr(value, "value", value)
            continue
        signature[name], values[name] = _type(kernel, name, value), value
        if free and _divisible(value):
            attributes[(place,)] = _DIVISIBLE
    sizes: Any = grid(bound.arguments) if callable(grid) else grid
    return Launch(
        kernel=kernel,
        signature=signature,
        constants=constants,
        attributes=attributes,
        options={k: v for k, v in options.items() if k not in names},
        values=values,
        grid=tuple(sizes),
    )


def _type(kernel: Any, name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.dtype in _TYPES:
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if value in _INT32 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"{kernel.__name__}: argument {name} is a {type(value).__name__}")


def _divisible(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0


@contextmanager
def recording(target: str = HOST_TARGET) -> Iterator[list[Launch]]:
    """Within it, launches of Triton kernels are collected and nothing runs.

    Launchers may be given tensors of the device "meta", which have shapes and no memory.

    Args:
        target: The GPU that launchers choose their configurations for.

    Yields:
        The launches so far, in their order.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        launches.append(launch_of(self, grid, args, options))

    before = JITFunction.run
    JITFunction.run = run
    try:
        with on_host("recorder", target):
            yield launches
    finally:
        JITFunction.run = before
