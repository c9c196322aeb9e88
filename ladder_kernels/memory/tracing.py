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

Where the size of a result depends on numbers, it is the largest: a mask chooses every row. An
attempt to read a number raises ``torch._subclasses.fake_tensor.DataDependentOutputException``: on a
GPU, the host would wait there. Attention masks, packed documents and sliding windows shorter than
the text do so.
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

from ladder_kernels.errors import BackendError

__all__ = ["fake_cuda"]

_DEVICE_OF = torch.ops.prim.device.default
_META, _GPU = torch.device("meta"), torch.device("cuda", 0)
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
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        torch.autograd.set_multithreading_enabled(False),
        _FakeCuda(),
    ):
        library.impl("scaled_dot_product_attention", _attention, "AutogradCUDA")
        if not torch.cuda._is_compiled():
            for name in _TAKEN_APART:
                library.impl(name, _no_kernel, "CUDA")
        yield _GPU


class _FakeCuda(FakeTensorMode):
    """Fake tensors whose gradients the autograd engine takes without asking a GPU's driver.

    The engine asks the accelerator for its streams when it meets a tensor on one, and a PyTorch
    that was built without CUDA has no accelerator. To the engine, and to nobody else, tensors are
    on the device "meta"; what its gradients want there belongs on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake_tensor_converter = _Forgetful()
        self._no_gpu = not torch.cuda.is_available()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE_OF and self._no_gpu and _asked_by_engine(func):
            return _META
        if kwargs.get("device") == _META and self._no_gpu and _asked_by_engine(func):
            kwargs = {**kwargs, "device": _GPU}
        if func in _IN_PLACE_OF:
            with self:
                return _IN_PLACE_OF[func](*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Forgetful(FakeTensorConverter):
    """Keeps no weak references to fresh tensors: ``Module.to`` refuses parameters with some."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        """Remember nothing; nobody asks for the tensor of a fresh one's shape."""


def _asked_by_engine(func: Any) -> bool:
    """Whether it is the autograd engine, or a gradient of its, that calls an operation from C++.

    Then the first Python beneath the engine is the dispatch of that very call.
    """
    below, frame = None, sys._getframe(1)
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        below, frame = frame, frame.f_back
    if frame is None or below is None:
        return False
    return any(
        value is func or (type(value) is tuple and any(each is func for each in value))
        for value in below.f_locals.values()
    )


def _no_kernel(*_: Any) -> Tensor:
    """Stands for a GPU's kernel; tensors without values never get there."""
    raise BackendError("fake_cuda: found a tensor with values on a GPU; allowed are fake ones")


def _every_place(tensor: Tensor) -> Tensor:
    """``tensor.nonzero()`` where nothing is zero."""
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)


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
) -> Tensor:
    """``F.scaled_dot_product_attention`` on a GPU's kernels, which no GPU is there to choose.

    The order is PyTorch's own: flash, which takes half precision and no mask; the memory-efficient
    kernel; else scores in memory.
    """
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    usual = query.dim() == 4 and key.shape[-1] == value.shape[-1] == width
    half = query.dtype in (torch.float16, torch.bfloat16)
    if usual and half and attn_mask is None and width <= _FLASH_WIDEST:
        missing = -width % _STEP
        if missing:
            query, key, value = (F.pad(each, (0, missing)) for each in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width] if missing else out
    aligned = query.dtype != torch.float64 and width % (8 if half else 4) == 0
    if not usual or not aligned or query.shape[1] != key.shape[1]:
        scores = torch.ops.aten._scaled_dot_product_attention_math
        options = (attn_mask, dropout_p, is_causal)
        return scores(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)[0]
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


# Where no GPU has a kernel of them, PyTorch does not ask a mode but computes them in small steps,
# each of which takes memory.
_TAKEN_APART = ("silu_backward", "mish_backward")

_IN_PLACE_OF = {
    torch.ops.aten.nonzero.default: _every_place,
    # Where there are no gradients; where there are, it is taken apart before a mode sees it.
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}
