"""A launch's arguments: the parameters' bytes, and the arrays as simulated global memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ladder_kernels.audit.ptx.errors import MemoryAccessError, PTXError
from ladder_kernels.audit.ptx.memory import GLOBAL_BASE, Buffer, GlobalMemory
from ladder_kernels.audit.ptx.parser import Parameter, Program
from ladder_kernels.audit.ptx.types import TYPES, Array, PTXType

__all__ = ["Binding", "bind"]


@dataclass(frozen=True)
class _View:
    """An array or tensor in the host's memory.

    Attributes:
        name: The argument's.
        address: Of its first element.
        shape: As the array's.
        strides: In bytes.
        itemsize: Bytes of an element.
        origin: The address of the memory that it is a view of, which the device would align.
        writeable: Whether a kernel may change it.
    """

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    origin: int
    writeable: bool

    @property
    def span(self) -> tuple[int, int]:
        """The addresses of the first byte and of that after the last."""
        if 0 in self.shape:
            return self.address, self.address
        steps = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(step for step in steps if step < 0)
        high = self.address + sum(step for step in steps if step > 0)
        return low, high + self.itemsize


@dataclass
class _Region:
    """Host memory that one argument spans, or several that overlap."""

    low: int
    high: int
    views: list[_View] = field(default_factory=list)

    def host(self) -> Array:
        """Its bytes, as they are in the host's memory."""
        if self.high == self.low:
            return np.zeros(0, np.uint8)
        memory = (ctypes.c_uint8 * (self.high - self.low)).from_address(self.low)
        return np.ctypeslib.as_array(memory)

    def buffer(self) -> Buffer:
        """A copy of it for the device, in which only the arguments' elements are valid."""
        valid = np.zeros(self.high - self.low, bool)
        names = []
        for view in self.views:
            first, end = view.span
            names.append((view.name, first - self.low, end - first))
            if 0 not in view.shape:
                elements = np.ndarray(
                    (*view.shape, view.itemsize),
                    bool,
                    valid,
                    view.address - self.low,
                    (*view.strides, 1),
                )
                elements[...] = True
        return Buffer(self.host(), valid, (self.low - self.views[0].origin) % 512, names)


@dataclass(frozen=True)
class Binding:
    """Arguments ready for a launch.

    Attributes:
        parameters: The bytes that ``ld.param`` reads.
        memory: Global memory.
        regions: The host's memory, in the order of the memory's buffers after the first, which is
            the module's own.
        keep: The arrays themselves, so that their memory stays.
    """

    parameters: bytes
    memory: GlobalMemory
    regions: Sequence[_Region]
    keep: Sequence[Any]

    def write_back(self) -> None:
        """Bring what the kernel wrote to the arrays.

        Raises:
            MemoryAccessError: It wrote to an array that may not be written.
        """
        for index, region in enumerate(self.regions):
            host = region.host()
            device = self.memory.read_back(1 + index, len(host))
            if np.array_equal(host, device):
                continue
            for view in region.views:
                if not view.writeable:
                    raise MemoryAccessError(
                        f"argument '{view.name}' is read-only and was written", argument=view.name
                    )
            host[...] = device


def bind(program: Program, arguments: Sequence[Any] | Mapping[str, Any]) -> Binding:
    """Place arguments in memory and in the parameters' bytes.

    Args:
        program: Whose parameters they are.
        arguments: As for :func:`~ladder_kernels.audit.ptx.execute`.

    Raises:
        PTXError: Their number or kind does not fit the parameters.
    """
    named = _named(program, arguments)
    views = {name: _view(name, value) for name, value in named if _is_array(value)}
    regions = _regions(list(views.values()))
    module = np.frombuffer(bytes(program.module_data), np.uint8)
    own = Buffer(module, np.ones(len(module), bool), 0, [("(module data)", 0, len(module))])
    memory = GlobalMemory([own, *(region.buffer() for region in regions)])
    parameters = bytearray(program.parameter_bytes)
    for parameter, (name, value) in zip(program.parameters, named, strict=False):
        if name in views:
            if parameter.type.bits != 64:
                raise PTXError(f"argument '{name}' is an array; the kernel takes a number")
            raw = np.uint64(_device_address(views[name], regions, memory)).tobytes()
        else:
            raw = _scalar(name, value, parameter)
        parameters[parameter.offset : parameter.offset + len(raw)] = raw
    return Binding(bytes(parameters), memory, regions, [value for _, value in named])


def _named(program: Program, arguments: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(arguments, Mapping):
        named = list(arguments.items())
    else:
        names = [parameter.name for parameter in program.parameters]
        names += [f"argument {index}" for index in range(len(names), len(arguments))]
        named = list(zip(names, arguments, strict=False))
    missing = program.parameters[len(named) :]
    pointers = all(parameter.type.bits == 64 for parameter in missing)
    if len(named) > len(program.parameters) or not pointers:
        raise PTXError(
            f"{program.name} takes {len(program.parameters)} arguments, not {len(named)}"
        )
    return named


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def _view(name: str, value: Any) -> _View:
    if isinstance(value, np.ndarray):
        owner = value
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return _View(
            name,
            value.__array_interface__["data"][0],
            value.shape,
            value.strides,
            value.itemsize,
            owner.__array_interface__["data"][0],
            value.flags.writeable,
        )
    if value.device.type != "cpu":
        raise PTXError(f"argument '{name}' is on device '{value.device}'; it must be on the CPU")
    itemsize = value.element_size()
    return _View(
        name,
        value.data_ptr(),
        tuple(value.shape),
        tuple(stride * itemsize for stride in value.stride()),
        itemsize,
        value.untyped_storage().data_ptr(),
        True,
    )


def _regions(views: Sequence[_View]) -> list[_Region]:
    """Regions without overlap; an argument of no bytes has one of its own."""
    regions: list[_Region] = []
    for view in sorted(views, key=lambda view: view.span):
        low, high = view.span
        if regions and low < regions[-1].high and high > low:
            regions[-1].high = max(regions[-1].high, high)
            regions[-1].views.append(view)
        else:
            regions.append(_Region(low, high, [view]))
    return regions


def _device_address(view: _View, regions: Sequence[_Region], memory: GlobalMemory) -> int:
    index = next(i for i, region in enumerate(regions) if any(v is view for v in region.views))
    return GLOBAL_BASE + memory.starts[1 + index] + view.address - regions[index].low


def _scalar(name: str, value: Any, parameter: Parameter) -> bytes:
    if value is None:
        return bytes(parameter.nbytes)
    if isinstance(value, (float, np.floating)):
        kind: PTXType = TYPES["f64" if parameter.type.bits == 64 else "f32"]
        if parameter.type.bits not in (32, 64):
            raise PTXError(f"argument '{name}' is a float; the kernel takes {parameter.type.name}")
        return np.array(value, kind.dtype).tobytes()
    if not isinstance(value, (int, np.integer)):
        raise PTXError(f"argument '{name}' is of type {type(value).__name__}, which none can be")
    if parameter.type.name == "f32":
        return np.float32(value).tobytes()
    bits = parameter.type.bits
    if not -(1 << (bits - 1)) <= int(value) < 1 << bits:
        raise PTXError(f"argument '{name}' is {value}, which {bits} bits do not hold")
    return (int(value) & ((1 << bits) - 1)).to_bytes(bits // 8, "little")
