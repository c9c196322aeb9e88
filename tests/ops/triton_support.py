"""What the tests of Triton launchers share: memory with poison around it, wrong kernels."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from ladder_kernels.audit import interpreting
from ladder_kernels.ops import _triton


def take_kernels(patch, module, part):
    """Let the launchers of a module launch the kernels of another one, where it has them."""
    for name in [name for name in vars(module) if name.endswith("_kernel") and name in vars(part)]:
        patch.setattr(module, name, getattr(part, name))


@contextmanager
def interpreting_amid_poison():
    """Kernels get copies with NaN all around, and may not change it; yields a monkeypatch."""
    launch, margin = _triton.launch, 512

    def bytes_of(storage):
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def guarded(kernel, grid, *args, **options):
        spaces = {}

        def move(value):
            if not isinstance(value, torch.Tensor):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in spaces:
                space = torch.full((storage.nbytes() + 2 * margin,), 255, dtype=torch.uint8)
                space[margin:-margin] = bytes_of(storage)
                spaces[storage.data_ptr()] = storage, space
            space = spaces[storage.data_ptr()][1]
            offset = margin // value.element_size() + value.storage_offset()
            moved = torch.empty(0, dtype=value.dtype)
            return moved.set_(space.untyped_storage(), offset, value.shape, value.stride())

        launch(kernel, grid, *map(move, args), **options)
        for storage, space in spaces.values():
            assert (space[:margin] == 255).all()
            assert (space[-margin:] == 255).all()
            bytes_of(storage).copy_(space[margin:-margin])

    with interpreting(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "launch", guarded)
        yield patch
