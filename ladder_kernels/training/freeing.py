"""Gradients that are applied and freed one by one, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["GradientFreeing"]


class GradientFreeing:
    """Steps each parameter of an optimizer as soon as its gradient is whole, then frees that.

    The optimizer is an ordinary one: its groups, its state and its ``state_dict`` stay as they are,
    and the weights get the same bits as by its own ``step()`` after the backward pass, as long as a
    parameter's step depends on its own gradient alone. That ``step()`` finds no gradients left.

    Args:
        optimizer: Any that passes over parameters without a gradient, as those of PyTorch,
            bitsandbytes and transformers do.
        whole: Asked at each gradient that a backward pass adds up: whether it is the last before
            the step, or more are to be accumulated.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, whole: Callable[[], bool]) -> None:
        self._optimizer = optimizer
        self._whole = whole
        self._group_of = {
            parameter: index
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._norms: dict[torch.Tensor, torch.Tensor] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._apply)
            for parameter in self._group_of
        ]

    def _apply(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or not self._whole():
            return
        self._norms[parameter] = torch.linalg.vector_norm(gradient)
        groups = self._optimizer.param_groups
        # Other parameters may hold gradients that are not whole yet.
        own = {**groups[self._group_of[parameter]], "params": [parameter]}
        self._optimizer.param_groups = [own]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def take_norm(self) -> torch.Tensor | None:
        """The norm of all gradients applied since the last call; ``None`` if there were none."""
        norms = [self._norms[each] for each in self._group_of if each in self._norms]
        self._norms.clear()
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None

    def close(self) -> None:
        """Leave the optimizer to step by itself again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
