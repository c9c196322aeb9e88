"""Parts of a network that are run again in the backward pass, instead of being remembered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from ladder_kernels.backend import get_backend, use_backend

__all__ = ["keep_inputs"]


def keep_inputs(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Run a function of which autograd keeps the inputs alone.

    The backward pass runs it again, on the backend of operations that is in force now, just before
    its gradients are computed, and they are the same by bits. So it has to give the same result
    twice: it must not write to a cache nor draw random numbers. What it reads besides ``inputs`` is
    read again too.

    Args:
        function: Called with ``inputs``; trained tensors that it reads by itself get gradients too.
        inputs: Its differentiable arguments.

    Returns:
        ``function(*inputs)``.
    """
    backend = get_backend()

    def run(*values: torch.Tensor) -> torch.Tensor:
        with use_backend(backend):
            return function(*values)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
