"""Which implementation of an operation runs: one rule for all of them.

Every operation is a folder with a ``reference.py`` (plain PyTorch, runs anywhere) and may ship
faster ones beside it: ``cpu.py`` (native kernels, CPU tensors) and ``gpu.py`` (Triton, GPU
tensors). Such a module offers some or all of the reference's functions under the same names, and
one companion ``unsupported(*args) -> str | None`` that takes the same arguments and says why a call
cannot run there, or ``None`` if it can.

``"auto"`` takes the module that the operation ships for the tensors' device, else the reference. A
shipped module that cannot run the call is said aloud, once for each reason, as a
:class:`~ladder_kernels.errors.BackendFallbackWarning`. A backend that was asked for by name never
falls back: :class:`~ladder_kernels.errors.BackendError` says why it cannot run.

float64 serves to check gradients. ``"auto"`` computes it on the reference, which is no fallback: no
backend means to have it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ladder_kernels.accounts import inside_operation
from ladder_kernels.backend import get_backend, say_fallback, use_backend, warn_once
from ladder_kernels.errors import BackendError
from ladder_kernels.ops import _triton

__all__ = ["call", "has_gpu_kernel", "register_autograd", "run"]

_MODULES = {"triton": "gpu", "cpu": "cpu", "reference": "reference"}
_FOR_DEVICE = {"cuda": "triton", "cpu": "cpu"}
_OPS = "ladder_kernels.ops"
# PyTorch's own kernels are the ones to take there, such as flash attention: nothing is missed.
_PYTORCHS = {("ranged_attention", "triton")}


def run(op: str, function: str, *args: Any) -> Any:
    """Call ``function`` of operation ``op`` on the backend in force.

    Autocast is switched off meanwhile: the public functions have cast their inputs already, and an
    operation chooses the precision of its inner steps itself.

    Args:
        op: the operation's folder name.
        function: a function of its ``reference.py``.
        *args: what to call it with; the first is a tensor, whose device decides.

    Raises:
        BackendError: a backend was asked for by name and cannot run this call.
    """
    device: torch.device = args[0].device
    implementation = _select(op, function, device, args)
    with inside_operation():
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return implementation(*args)
        return implementation(*args)


def call(op: Any, *args: Any) -> Any:
    """Call an operator; in inference mode, and if nobody watches, past PyTorch's dispatcher.

    That takes longer than the launch of a kernel, and a frozen pass is made of such calls: a fast
    GPU would wait for it.

    Args:
        op: what ``torch.library.custom_op`` returned.
        *args: what to call it with; the first is a tensor.
    """
    return (getattr(op, "_init_fn", op) if _unwatched(args[0]) else op)(*args)


def _unwatched(x: Tensor) -> bool:
    """Whether an operator's own function is all that would run."""
    internals: Any = torch._C
    return (
        not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
        and type(x) in (Tensor, torch.nn.Parameter)
        and internals._len_torch_dispatch_stack() == 0
        and internals._functorch.peek_interpreter_stack() is None
    )


def has_gpu_kernel(op: str, function: str, x: Tensor, *, by_name_only: bool = False) -> bool:
    """Whether a Triton kernel of an operation would run: for modules with a plain way beside it.

    A compiler cannot follow the question, and a fake tensor is on no GPU that could be asked: there
    the tensor's device is the answer, and the operation itself asks again when it runs.

    Args:
        op: the operation's folder name.
        function: a function of its ``reference.py``.
        x: the function's first argument.
        by_name_only: whether the kernel is wanted only where "triton" is asked for by name.

    Raises:
        BackendError: "triton" was asked for by name and cannot take ``x``.
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return x.device.type == "cuda" and not by_name_only
    chosen = get_backend()
    if chosen == "triton":
        return _forced(op, function, chosen, x.device, (x,)) is not None
    if by_name_only or chosen != "auto" or x.device.type != "cuda":
        return False
    return _best(op, function, x.device, (x,)) is not None


def register_autograd(
    op: Any, backward: Callable[..., Any], *, setup_context: Callable[..., None]
) -> None:
    """Register a gradient that runs on the backend that the forward was given.

    Args:
        op: what ``torch.library.custom_op`` returned.
        backward: ``backward(ctx, *grads)``.
        setup_context: ``setup_context(ctx, inputs, output)``.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = get_backend()
        setup_context(ctx, inputs, output)

    def run_backward(ctx: Any, *grads: Any) -> Any:
        with use_backend(ctx.backend):
            return backward(ctx, *grads)

    op.register_autograd(run_backward, setup_context=setup)


def _select(
    op: str, function: str, device: torch.device, args: tuple[Any, ...]
) -> Callable[..., Any]:
    reference = getattr(_module(op, "reference"), function)
    chosen = get_backend()
    if chosen == "reference":
        return reference
    if chosen == "auto":
        return _best(op, function, device, args) or reference
    return _forced(op, function, chosen, device, args) or reference


def _best(
    op: str, function: str, device: torch.device, args: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """What the operation ships for the device, if it can run; else None, having said why."""
    backend = _FOR_DEVICE.get(device.type)
    missing = _triton.missing() if backend == "triton" else None
    if backend is not None and missing is not None:
        say_fallback(backend, missing)
        return None
    shipped = None if backend is None else _function(op, backend, function)
    if backend is None or shipped is None:
        if device.type != "cpu" and (op, backend) not in _PYTORCHS:
            warn_once(
                f"this release has no kernel of {op} for device type '{device.type}': it runs on "
                "plain PyTorch there (use_backend('reference') silences this)"
            )
        return None
    if args[0].dtype == torch.float64:
        return None
    reason = _module(op, backend).unsupported(*args)
    if reason is None:
        return shipped
    say_fallback(backend, reason)
    return None


def _forced(
    op: str, function: str, backend: str, device: torch.device, args: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """The implementation of a backend asked for by name; None where PyTorch's is the only one."""
    needed = "cuda" if backend == "triton" else "cpu"
    on_host = backend == "triton" and device.type == "cpu" and _triton.host() is not None
    if device.type != needed and not on_host:
        raise BackendError(
            f"{op}: backend '{backend}' needs tensors on device type '{needed}', found "
            f"'{device.type}'; allowed there are 'auto' and 'reference'"
        )
    reason = _triton.missing() if backend == "triton" else None
    if reason is not None:
        raise BackendError(f"{op}: backend '{backend}' cannot run this call: {reason}")
    implementation = _function(op, backend, function)
    if implementation is None:
        return None
    reason = _module(op, backend).unsupported(*args)
    if reason is not None:
        raise BackendError(f"{op}: backend '{backend}' cannot run this call: {reason}")
    return implementation


@functools.cache
def _module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{_OPS}.{op}.{_MODULES[backend]}")


@functools.cache
def _function(op: str, backend: str, function: str) -> Callable[..., Any] | None:
    """The function if the operation ships it for this backend. Presence of the file decides."""
    if importlib.util.find_spec(f"{_OPS}.{op}.{_MODULES[backend]}") is None:
        return None
    return getattr(_module(op, backend), function, None)
