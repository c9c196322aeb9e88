"""Triton kernels, compiled for an NVIDIA GPU and executed here.

Within :func:`executing`, ``kernel[grid](...)`` on CPU tensors compiles the kernel as it would be
for the GPU and runs the PTX on the CPU, in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ladder_kernels.audit.ptx.counters import Counters
from ladder_kernels.audit.ptx.errors import PTXError
from ladder_kernels.audit.ptx.execution import Kernel, execute
from ladder_kernels.audit.ptx.memory import GARBAGE
from ladder_kernels.audit.ptx.state import Schedule
from ladder_kernels.backend import use_backend
from ladder_kernels.errors import BackendError
from ladder_kernels.ops._triton import missing, on_host

__all__ = ["LaunchRecord", "compile_kernel", "executing"]

_TYPES: Mapping[str, str] = {
    "bfloat16": "bf16",
    "bool": "i1",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "int8": "i8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "uint8": "u8",
}
_DIVISIBLE = 16
_OWN_OPTIONS = ("debug", "instrumentation_mode", "fpsan_homomorphic_casts")


@dataclass(frozen=True)
class LaunchRecord:
    """One launch that was executed.

    Attributes:
        name: The kernel's name.
        grid: How many blocks.
        executed: Instructions, counted once for each warp.
        counters: What was counted, or None if nothing was.
        compiled: What Triton compiled: ``compiled.asm["ptx"]``, ``compiled.metadata.shared``.
    """

    name: str
    grid: tuple[int, ...]
    executed: int
    counters: Counters | None
    compiled: Any = field(repr=False)


@dataclass
class _Specialised:
    """Arguments as Triton specialises a kernel to them.

    Attributes:
        signature: Every parameter's type, "constexpr" for those compiled in.
        constants: The values of those.
        divisible: Indices of the parameters known to be divisible by 16.
        arguments: The others' values, in order.
    """

    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    divisible: list[int] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    def key(self) -> tuple[Any, ...]:
        """What tells two specialisations apart."""
        constants = tuple((name, repr(value)) for name, value in self.constants.items())
        return tuple(self.signature.items()), constants, tuple(self.divisible)


@contextmanager
def executing(
    target: int = 86,
    *,
    lockstep: bool = True,
    reverse: bool = False,
    late_copies: bool = True,
    counting: bool = False,
) -> Iterator[list[LaunchRecord]]:
    """Within it, Triton kernels launched on CPU tensors run as PTX of a GPU, here and in place.

    The library's operations on CPU tensors run their Triton kernels, too. An autotuner takes its
    first configuration. Not for several threads at once; may be nested.

    Args:
        target: The GPU's compute capability times ten: 75, 80, 86, 89 or 120.
        lockstep: As in :class:`~ladder_kernels.audit.ptx.Schedule`.
        reverse: As there.
        late_copies: As there.
        counting: Whether launches are counted, which takes time.

    Yields:
        A list to which every launch adds its record.

    Raises:
        BackendError: Triton is not installed.
    """
    reason = missing()
    if reason is not None:
        raise BackendError(reason)
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    records: list[LaunchRecord] = []
    launcher = _Launcher(target, Schedule(lockstep, reverse, late_copies), counting, records)

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        return launcher.run(self, args, options, grid, warmup=warmup)

    def run_first(self: Any, *args: Any, **options: Any) -> Any:
        return self.fn.run(*args, **{**options, **self.configs[0].all_kwargs()})

    before = JITFunction.run, Autotuner.run
    JITFunction.run, Autotuner.run = run, run_first
    try:
        with on_host("executor"), use_backend("triton"):
            yield records
    finally:
        JITFunction.run, Autotuner.run = before


class _Launcher:
    """Compiles and runs launches, and remembers what it compiled."""

    def __init__(
        self, target: int, schedule: Schedule, counting: bool, records: list[LaunchRecord]
    ) -> None:
        self._target = target
        self._schedule = schedule
        self._counting = counting
        self._records = records
        # The function itself is in the key, so that its id is not used again.
        self._compiled: dict[tuple[Any, ...], tuple[Any, Kernel]] = {}

    def run(
        self,
        function: Any,
        args: Sequence[Any],
        options: Mapping[str, Any],
        grid: Any,
        *,
        warmup: bool,
    ) -> Any:
        names = {parameter.name for parameter in function.params}
        bound = function.signature.bind(*args, **{k: options[k] for k in options if k in names})
        bound.apply_defaults()
        specialised = _specialise(function.params, bound.arguments)
        launch_options = {
            k: v for k, v in options.items() if k not in names and k not in _OWN_OPTIONS
        }
        compiled, kernel = self._compile(function, specialised, launch_options)
        if not warmup:
            sizes: Any = grid(dict(bound.arguments)) if callable(grid) else grid
            self._execute(compiled, kernel, specialised, tuple(int(size) for size in sizes))
        return compiled

    def _compile(
        self, function: Any, specialised: _Specialised, options: Mapping[str, Any]
    ) -> tuple[Any, Kernel]:
        key = (function, specialised.key(), tuple(sorted((k, repr(v)) for k, v in options.items())))
        if key not in self._compiled:
            compiled = compile_kernel(
                function,
                specialised.signature,
                specialised.constants,
                self._target,
                divisible=specialised.divisible,
                options=options,
            )
            kernel = Kernel.parse(compiled.asm["ptx"], compiled.metadata.name)
            self._compiled[key] = compiled, kernel
        return self._compiled[key]

    def _execute(
        self, compiled: Any, kernel: Kernel, specialised: _Specialised, grid: tuple[int, ...]
    ) -> None:
        metadata = compiled.metadata
        arguments = dict(specialised.arguments)
        scratch = getattr(metadata, "global_scratch_size", 0) * int(np.prod(grid))
        if scratch:
            arguments["(scratch memory)"] = np.full(scratch, GARBAGE, np.uint8)
        counters = Counters() if self._counting else None
        executed = execute(
            kernel,
            arguments,
            grid,
            warps=metadata.num_warps,
            shared_bytes=metadata.shared,
            schedule=self._schedule,
            counters=counters,
        )
        self._records.append(LaunchRecord(kernel.name, grid, executed, counters, compiled))


def compile_kernel(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: int,
    *,
    divisible: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compile a Triton kernel for an NVIDIA GPU, which need not be there.

    Args:
        function: A ``@triton.jit`` function.
        signature: Every parameter's type, such as "*bf16", "i32" or "constexpr".
        constants: The values of the constant ones.
        target: The GPU's compute capability times ten.
        divisible: Indices of parameters that are known to be divisible by 16.
        options: Triton's own, such as ``num_warps`` and ``num_stages``.

    Returns:
        Triton's compiled kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes: dict[Any, Any] = {(i,): [["tt.divisibility", _DIVISIBLE]] for i in divisible}
    source = ASTSource(function, dict(signature), dict(constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(options or {}))


def _specialise(parameters: Sequence[Any], values: Mapping[str, Any]) -> _Specialised:
    specialised = _Specialised()
    for index, parameter in enumerate(parameters):
        name, value = parameter.name, values[parameter.name]
        # A constexpr object wraps its value.
        value = getattr(value, "value", value) if _is_constexpr(value) else value
        may = not parameter.do_not_specialize
        one = may and isinstance(value, int) and not isinstance(value, bool) and value == 1
        if parameter.is_constexpr or value is None or one:
            specialised.signature[name] = "constexpr"
            specialised.constants[name] = value
            continue
        specialised.signature[name] = _type(name, value)
        specialised.arguments[name] = value
        aligned = may and not getattr(parameter, "do_not_specialize_on_alignment", False)
        if aligned and _divisible(value):
            specialised.divisible.append(index)
    return specialised


def _is_constexpr(value: Any) -> bool:
    from triton.language import constexpr

    return isinstance(value, constexpr)


def _type(name: str, value: Any) -> str:
    if hasattr(value, "data_ptr") and hasattr(value, "dtype"):
        dtype = str(value.dtype).split(".")[-1]
        if dtype not in _TYPES:
            raise PTXError(f"argument '{name}' has dtype {value.dtype}, which is not modelled")
        return f"*{_TYPES[dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return "i32"
        return "i64" if value < 2**63 else "u64"
    if isinstance(value, float):
        return "fp32"
    raise PTXError(f"argument '{name}' is of type {type(value).__name__}, which is not modelled")


def _divisible(value: Any) -> bool:
    if isinstance(value, (bool, float)):
        return False
    if isinstance(value, int):
        return value % _DIVISIBLE == 0
    return value.storage_offset() * value.element_size() % _DIVISIBLE == 0
