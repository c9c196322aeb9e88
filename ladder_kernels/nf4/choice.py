"""Which kernels quantise and dequantise a tensor: native, Triton, or none (plain PyTorch)."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from ladder_kernels.accounts import others_watch
from ladder_kernels.backend import get_backend, say_fallback
from ladder_kernels.errors import BackendError
from ladder_kernels.launch import host, missing
from ladder_kernels.nf4 import cpu
from ladder_kernels.nf4.quantize import QUANTIZABLE, has_values

__all__ = ["kernels"]


def kernels(tensor: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """Return ``cpu`` or ``gpu`` of this package; ``None`` for the reference.

    Args:
        tensor: What is read.
        dtype: Of the floats that are read or made.

    Raises:
        BackendError: A backend was asked for by name, has kernels for the tensor's device, and
            cannot run them.
    """
    # Compilers and dispatch modes cannot see into a kernel.
    if torch.compiler.is_compiling():
        return None
    if host() == "nobody" and tensor.device.type == "cuda" and dtype in QUANTIZABLE:
        return importlib.import_module("ladder_kernels.nf4.gpu")
    if others_watch():
        return None
    if cpu.is_chosen(tensor, dtype):
        return cpu
    return importlib.import_module("ladder_kernels.nf4.gpu") if _on_gpu(tensor, dtype) else None


def _on_gpu(tensor: Tensor, dtype: torch.dtype) -> bool:
    backend = get_backend()
    on_host = backend == "triton" and host() is not None and tensor.device.type == "cpu"
    if (tensor.device.type != "cuda" and not on_host) or backend not in ("auto", "triton"):
        return False
    if dtype not in QUANTIZABLE or not has_values(tensor):
        return False
    reason = missing()
    if reason is None:
        return True
    if backend == "triton":
        raise BackendError(f"nf4: backend 'triton' cannot run this call: {reason}")
    say_fallback("triton", reason)
    return False
