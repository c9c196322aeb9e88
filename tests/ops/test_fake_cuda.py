"""Every operator on a GPU that is not there has the shapes, dtypes and strides of a real result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ladder_kernels.memory.tracing import fake_cuda
from tests.ops.test_registration import OPERATORS, samples


def described(tree: Any) -> list[Any]:
    return [
        (tuple(value.shape), value.dtype, value.stride(), value.requires_grad)
        for value in tree_leaves(tree)
        if isinstance(value, Tensor)
    ]


def on_gpu(value: Any, device: torch.device) -> Any:
    """A fake tensor of a real one's shape, strides and gradient; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return made.requires_grad_(value.requires_grad)


def gradients(out: Any, arguments: Any) -> list[Any]:
    """Of everything that has one, to what requires one."""
    ends = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    wanted = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    if not ends or not wanted:
        return []
    found = torch.autograd.grad(ends, wanted, [torch.ones_like(end) for end in ends])
    return list(found)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_on_a_cpu(operator, dtype):
    function = getattr(torch.ops.ladder_kernels, operator).default
    for arguments in samples(operator, dtype, True):
        out = function(*arguments)
        expected = described(out), described(gradients(out, arguments))
        with fake_cuda() as device:
            fake = tree_map(lambda value, device=device: on_gpu(value, device), arguments)
            out = function(*fake)
            grads = gradients(out, fake)
            assert (described(out), described(grads)) == expected
            tensors = [t for t in tree_leaves((out, grads)) if isinstance(t, Tensor)]
            assert {t.device for t in tensors} <= {device}
