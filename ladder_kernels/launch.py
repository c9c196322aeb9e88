"""Launching Triton kernels, on a GPU or on what stands in for one.

A kernel runs on tensors of a GPU. Without one, :mod:`ladder_kernels.audit` runs the same launchers
on CPU tensors; :func:`on_host` is how it says so. Nothing here imports Triton.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch

__all__ = [
    "HOST_TARGET",
    "Host",
    "architecture",
    "host",
    "host_target",
    "launch",
    "missing",
    "on_host",
]

Host = Literal["interpreter", "executor", "recorder", "nobody"]
"""What takes a kernel in place of a GPU. "nobody": launchers run on tensors of a GPU that have no
values, allocate what they would, and launch nothing."""

HOST_TARGET = "sm_86"
"""The GPU whose configurations are taken for tensors on a CPU, unless another one is named."""

_host: ContextVar[tuple[Host, str] | None] = ContextVar("ladder_kernels_host", default=None)


def host() -> Host | None:
    """What runs kernels on CPU tensors here; ``None``: nothing does."""
    chosen = _host.get()
    return None if chosen is None else chosen[0]


def host_target() -> str:
    """The GPU whose configurations are taken for tensors on a CPU, such as ``"sm_86"``."""
    chosen = _host.get()
    return HOST_TARGET if chosen is None else chosen[1]


@contextmanager
def on_host(kind: Host, target: str = HOST_TARGET) -> Iterator[None]:
    """Let Triton launchers take tensors that are on no GPU.

    Args:
        kind: What runs their kernels, as the caller has arranged.
        target: The GPU that they take the tensors to be on.
    """
    token = _host.set((kind, target))
    try:
        yield
    finally:
        _host.reset(token)


def architecture(device: torch.device) -> str:
    """The architecture of a device: ``"sm_86"``, ``"gfx942"``; of none, the host's target."""
    there = device.type == "cuda" and host() != "nobody"
    return _architecture(device) if there else host_target()


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Launch a kernel on the device of its first argument, which is a tensor.

    Args:
        kernel: A ``@triton.jit`` function.
        grid: How many programs, up to three numbers.
        args: What the kernel takes, in order, without its constants.
        options: Its constants, and Triton's own, such as ``num_warps``.
    """
    if host() == "nobody":
        return
    first: Any = args[0]
    # Multiply and add in one rounding: Triton's default until 3.9, and asked for explicitly since.
    options = {"enable_fp_fusion": True, **options}
    # Triton launches on the current device, whatever device the tensors are on.
    if not first.is_cuda or first.device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(first.device):
        kernel[grid](*args, **options)


def missing() -> str | None:
    """Why there is no Triton; ``None`` if there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'ladder_kernels[gpu]')"
    return None
