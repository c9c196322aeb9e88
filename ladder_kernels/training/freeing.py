"""Gradients that are applied and freed one by one, while the backward pass goes on."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch

__all__ = ["GradientFreeing"]


class GradientFreeing:
    """Steps each parameter of an optimizer as soon as its gradient is whole, then frees that.

    The optimizer is an ordinary one: its groups, its state and its ``state_dict`` stay as they are,
    and the weights get the same bits as by its own ``step()`` after the backward pass, as long as a
    parameter's step depends on its own gradient alone. That ``step()`` finds no gradients left.

    It goes on as long as somebody keeps the optimizer or this.

    Args:
        optimizer: Any that passes over parameters without a gradient, as those of PyTorch,
            bitsandbytes and transformers do.
        whole: Asked at each gradient that a backward pass adds up: whether it is the last before
            the step, or more are to be accumulated.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, whole: Callable[[], bool]) -> None:
        self._optimizer = optimizer
        self._norms: dict[int, torch.Tensor] = {}
        self._order = [id(each) for group in optimizer.param_groups for each in group["params"]]
        # Parameters hold their hooks: if those held parameters, or what does, none of them would
        # ever be freed.
        known = weakref.ref(optimizer)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(
                functools.partial(_apply, known, index, whole, self._norms)
            )
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ]

    def take_norm(self) -> torch.Tensor | None:
        """The norm of all gradients applied since the last call; ``None`` if there were none."""
        norms = [self._norms[each] for each in self._order if each in self._norms]
        self._norms.clear()
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None

    def close(self) -> None:
        """Leave the optimizer to step by itself again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _apply(
    known: weakref.ref[torch.optim.Optimizer],
    index: int,
    whole: Callable[[], bool],
    norms: dict[int, torch.Tensor],
    parameter: torch.Tensor,
) -> None:
    """Step a parameter of the group ``index``, if its gradient is whole; note its norm."""
    gradient, optimizer = parameter.grad, known()
    if gradient is None or optimizer is None or not whole():
        return
    norms[id(parameter)] = torch.linalg.vector_norm(gradient)
    groups = optimizer.param_groups
    # Other parameters may hold gradients that are not whole yet.
    optimizer.param_groups = [{**groups[index], "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    parameter.grad = None
