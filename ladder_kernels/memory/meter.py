"""The live-byte meter: how much memory tensors take at every moment, by what they are for.

It counts each tensor's memory from the operation that makes it to the moment in which the last
reference to it goes, whoever holds that: Python, autograd's graph, a view. So the peak is exact, in
bytes of tensors. What an allocator rounds up or keeps is not in it, nor what kernels take inside
themselves (a few megabytes of scratch in the native ones, cuBLAS' workspace)::

    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with Meter(model, optimizer) as meter:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    print(meter.peak.usage.total, meter.peak)

It does the same within :func:`~ladder_kernels.memory.tracing.fake_cuda`, for a GPU that is not
there: the launchers of Triton kernels then run on tensors without values, so that their workspaces
are counted, and launch nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ladder_kernels.accounts import Category, watched_by
from ladder_kernels.launch import HOST_TARGET, on_host
from ladder_kernels.memory.ledger import Ledger, Moment, Usage

__all__ = ["Meter"]

_OWN = "ladder_kernels"


class Meter(TorchDispatchMode):
    """Counts the bytes of live tensors while it is entered.

    Enter it around a step; within :func:`~ladder_kernels.memory.tracing.fake_cuda`, inside of that.
    What belongs to ``model`` and ``optimizer`` is counted from the start, anything else from when
    an operation makes it or first takes it.

    Args:
        model: See :meth:`watch`.
        optimizer: See :meth:`watch`.
        device: Whose memory counts; default the model's, or the CPU's.
        target: Where there is no GPU: the one whose kernels are taken.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        device: torch.device | str | None = None,
        target: str = HOST_TARGET,
    ) -> None:
        super().__init__()
        if device is None:
            device = "cpu" if model is None else next(_parts(model))[1].device
        self._ledger = Ledger(torch.device(device))
        self._target = target
        self._default: Category = "transients"
        self._depth = 0
        self._open = ExitStack()
        self.watch(model, optimizer)

    # What it knows --------------------------------------------------------------------------------

    def watch(
        self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Count what a model and an optimizer hold now, and the gradients to come.

        Args:
            model: What requires gradients is the ladder (of another model: its adapters). All else
                are weights, those of a backbone beside it included.
            optimizer: Its states; those that it makes in its steps are counted without this.
        """
        for category, tensor in () if model is None else _parts(model):
            self.count(category, tensor)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self._count_gradient)
        for tensor in () if optimizer is None else _tensors(list(optimizer.state.values())):
            self.count("optimizer", tensor)

    def count(self, category: Category, tensor: Tensor) -> None:
        """Count a tensor's memory to ``category`` from here on."""
        self._ledger.add(tensor, category, claim=True)

    @property
    def usage(self) -> Usage:
        """What lives now."""
        return self._ledger.usage

    @property
    def peak(self) -> Moment:
        """When the total was largest."""
        return self._ledger.peak

    @property
    def timeline(self) -> list[Moment]:
        """Usage after every change."""
        return self._ledger.timeline

    def largest(self) -> Usage:
        """The most of each kind, each at its own moment."""
        return Usage(*map(max, zip(*(moment.usage for moment in self.timeline), strict=True)))

    def restart(self) -> None:
        """Forget timeline and peak; what lives stays counted."""
        self._ledger.restart()

    # What it sees ---------------------------------------------------------------------------------

    def __enter__(self) -> Meter:
        """Begin. The library enters it again within operations, whose inside it would not see."""
        if not self._depth:
            self._open.enter_context(watched_by(self))
            for register, hook in (
                (register_optimizer_step_pre_hook, self._optimizer_begins),
                (register_optimizer_step_post_hook, self._optimizer_ends),
            ):
                self._open.callback(register(hook).remove)
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._open.close()
            self._ledger.settle()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation takes and makes."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a shape or a device
            return func(*args, **kwargs)
        ledger = self._ledger
        outer, ledger.operation = ledger.operation, str(func)
        try:
            for tensor in _tensors((args, kwargs)):
                ledger.add(tensor, self._default, claim=False)
            if func.namespace == _OWN and _on_traced_gpu(args):
                out = self._allocate(func, args, kwargs)
            else:
                out = func(*args, **kwargs)
            fresh = func is not torch.ops.aten.from_file.default
            for tensor in _tensors(out):
                ledger.add(tensor, self._default, claim=False, fresh=fresh)
            return out
        finally:
            ledger.settle()
            ledger.operation = outer

    def _allocate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run what launches an operation's kernels, on tensors without values."""
        with on_host("nobody", self._target), self:
            return OPDEFS[f"{_OWN}::{func._opname}"]._init_fn(*args, **kwargs)

    def _count_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None and self._depth:
            self.count("ladder", parameter.grad)

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # An optimizer that steps within the backward pass may come before the hook above.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._count_gradient(parameter)
        self._default = "optimizer"

    def _optimizer_ends(self, *_: Any) -> None:
        self._default = "transients"


def _on_traced_gpu(args: Any) -> bool:
    first = next(_tensors(args), None)
    return isinstance(first, FakeTensor) and first.fake_device.type == "cuda"


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _parts(model: nn.Module) -> Iterator[tuple[Category, Tensor]]:
    """Every tensor that a model holds, and what it is for."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield "ladder", parameter
            if parameter.grad is not None:
                yield "ladder", parameter.grad
    backbone = getattr(model, "backbone", None)
    for module in (model, backbone) if isinstance(backbone, nn.Module) else (model,):
        for parameter in module.parameters():
            if not parameter.requires_grad:
                yield "weights", parameter
                for each in _quantization(parameter):
                    yield "weights", each
        for buffer in module.buffers():
            yield "weights", buffer


def _quantization(holder: Any) -> Iterator[Tensor]:
    """The tensors beside a weight of bitsandbytes: its scales."""
    state = getattr(holder, "quant_state", None)
    while state is not None:
        yield from (each for each in vars(state).values() if isinstance(each, Tensor))
        state = getattr(state, "state2", None)
