"""Whole steps of models on a GPU, without a GPU and without memory.

Within :func:`fake_cuda`, tensors are PyTorch's fake ones: they have shapes, dtypes, strides and
devices, and no numbers. There is a device "cuda", whether or not this machine has one and whether
or not this PyTorch was built for one. What runs is what would run on a GPU, each operation by its
shape-only form::

    with fake_cuda() as device:
        backbone = backbone_from_config(config, device=device, dtype=torch.bfloat16)
        model = LadderForCausalLM.from_backbone(backbone).train()
        ids = torch.zeros(1, 2048, dtype=torch.int64, device=device)
        model(ids, labels=ids).loss.backward()

Where a GPU's result would depend on numbers, the largest is taken: a mask chooses every row. An
attempt to read a number raises ``torch._subclasses.fake_tensor.DataDependentOutputException``: on a
GPU, the host would wait there.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from ladder_kernels.errors import BackendError

__all__ = ["fake_cuda"]

_DEVICE_OF = torch.ops.prim.device.default
_FLASH_WIDEST = 256
_STEP = 8

# PyTorch's numbers of types of devices, and the name of its table of guards by them.
_CUDA, _LAZY = 1, 17
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Within it, tensors are fake and the device "cuda" exists.

    Everything is made inside: models, inputs, losses; the backward pass runs inside, too. Dispatch
    modes of the caller's own, entered inside, see every operation. Attention takes the kernels that
    PyTorch has on a GPU of sm_80 or newer. Entered once a thread at a time.

    Yields:
        The device, ``cuda:0``.

    Raises:
        BackendError: This PyTorch was built without CUDA and does not show its device guards, so
            that none can be registered.
    """
    if not _register_device_guard():
        raise BackendError(
            "fake_cuda: this PyTorch was built without CUDA and its library c10 does not show its "
            "device guards; allowed are builds for CUDA, which need no GPU here, and for Linux and "
            "macOS"
        )
    with _FakeCuda(), _GPUAttention(), torch.autograd.set_multithreading_enabled(False):
        yield torch.device("cuda", 0)


class _FakeCuda(FakeTensorMode):
    """Fake tensors whose gradients the autograd engine takes without asking a GPU's driver.

    The engine asks the accelerator for its streams when it meets a tensor on one, and a PyTorch
    that was built without CUDA has no accelerator. To the engine, and to nobody else, tensors are
    on the device "meta".
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake_tensor_converter = _Forgetful()
        self._no_gpu = not torch.cuda.is_available()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE_OF and self._no_gpu and _engine_asks():
            return torch.device("meta")
        if func is torch.ops.aten.nonzero.default:
            with self:
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Forgetful(FakeTensorConverter):
    """Keeps no weak references to fresh tensors: ``Module.to`` refuses parameters that have some."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        """Remember nothing; nobody asks for the tensor of a fresh one's shape."""


def _engine_asks() -> bool:
    """Whether it is the autograd engine, in C++, that asks for a tensor's device.

    Then the first Python beneath the engine is the dispatch of that very question.
    """
    below, frame = None, sys._getframe(1)
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        below, frame = frame, frame.f_back
    if frame is None or below is None:
        return False
    return any(
        value is _DEVICE_OF or (type(value) is tuple and any(each is _DEVICE_OF for each in value))
        for value in below.f_locals.values()
    )


def _register_device_guard() -> bool:
    """Give the device "cuda" PyTorch's guard that does nothing; returns whether it has a guard.

    PyTorch does so itself in a build for CUDA that finds no GPU, which it knows by a guard that
    counts no devices. A build without CUDA has no such guard. That of the device "lazy" counts none
    either.
    """
    if torch.cuda._is_compiled():
        return True
    guards = _guards()
    if guards is None:
        return False
    if not guards[_CUDA]:
        guards[_CUDA] = lazy = guards[_LAZY]
        torch._C._ensureCUDADeviceGuardSet()
        if guards[_CUDA] == lazy:
            guards[_CUDA] = None
    return bool(guards[_CUDA])


def _guards() -> Any:
    """PyTorch's table of device guards, addresses by type of device; ``None`` if not to be had."""
    for name in ("libc10.so", "libc10.dylib"):
        path = Path(str(torch.__file__)).parent / "lib" / name
        if path.is_file():
            try:
                return (ctypes.c_void_p * (_LAZY + 1)).in_dll(ctypes.CDLL(str(path)), _GUARDS)
            except (OSError, ValueError):
                return None
    return None


class _GPUAttention(TorchFunctionMode):
    """Attention on a GPU's kernels, which PyTorch without a GPU would not choose.

    The order is PyTorch's own: flash, which takes half precision and no mask; the memory-efficient
    kernel; else scores in memory.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            found = _attention(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``F.scaled_dot_product_attention`` on a GPU; ``None`` where it has no kernel of its own."""
    width = query.shape[-1]
    one_width = key.shape[-1] == value.shape[-1] == width
    if query.device.type != "cuda" or query.dim() != 4 or not one_width:
        return None
    scale = width**-0.5 if scale is None else scale
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and width <= _FLASH_WIDEST:
        missing = -width % _STEP
        if missing:
            query, key, value = (F.pad(each, (0, missing)) for each in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width] if missing else out
    if query.dtype == torch.float64 or query.shape[1] != key.shape[1] or width % (8 if half else 4):
        return None
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    return efficient(query, key, value, bias, trained, dropout_p, is_causal, scale=scale)[0]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as what is added to scores, rows a multiple of 8 apart, as the kernel reads it."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    length = mask.shape[-1]
    mask = F.pad(mask, (0, -length % _STEP))[..., :length]
    return mask.expand(*query.shape[:3], key.shape[2])
