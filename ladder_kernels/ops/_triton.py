"""What the Triton launchers share: on which tensors they may run, and why they may not.

A kernel runs on tensors of a GPU. Without one, :mod:`ladder_kernels.audit` runs the same launchers
on CPU tensors, in Triton's interpreter or by executing the compiled code; :func:`on_host` is how it
says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from ladder_kernels.ops._numeric import flatten_rows

__all__ = ["DTYPES", "Host", "host", "launch", "missing", "on_host", "rows", "unsupported"]

Host = Literal["interpreter", "executor"]
"""What runs a kernel on a CPU."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What kernels compute with."""

_host: ContextVar[Host | None] = ContextVar("ladder_kernels_host", default=None)


def host() -> Host | None:
    """What runs kernels on CPU tensors here; ``None``: nothing does."""
    return _host.get()


@contextmanager
def on_host(kind: Host) -> Iterator[None]:
    """Let Triton launchers take CPU tensors: ``kind`` runs them, as its caller has arranged."""
    token = _host.set(kind)
    try:
        yield
    finally:
        _host.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Launch a kernel on the device of its first argument, which is a tensor.

    Args:
        kernel: A ``@triton.jit`` function.
        grid: How many programs, up to three numbers.
        args: What the kernel takes, in order, without its constants.
        options: Its constants, and Triton's own, such as ``num_warps``.
    """
    first: Any = args[0]
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*args, **options)


def missing() -> str | None:
    """Why there is no Triton; ``None`` if there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'ladder_kernels[gpu]')"
    return None


def rows(value: Tensor) -> Tensor:
    """View or copy ``[..., D]`` as ``[rows, D]`` with adjacent elements in a row."""
    flat = flatten_rows(value)
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def unsupported(*tensors: Tensor | None, products: bool = False) -> str | None:
    """Say why kernels cannot take these tensors; ``None`` if they can.

    Args:
        tensors: Floating operands; ``None`` is passed over.
        products: Whether the kernel multiplies matrices of them.
    """
    for value in tensors:
        if value is None:
            continue
        if value.dtype not in DTYPES:
            return f"the kernels take float16, bfloat16 and float32, not {value.dtype}"
        if products and value.dtype == torch.bfloat16 and host() == "interpreter":
            return "Triton's interpreter miscomputes matrix products of bfloat16"
    return None
