"""Every Triton kernel on a GPU, where there is one: uneven sizes, every dtype, the same bits twice.

The calls are those of the audit; ``python -m bench.triton_kernels`` verifies them at full size.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench import kernel_calls
from bench.kernel_calls import calls, shrunk
from ladder_kernels.audit.catalogue import cases
from ladder_kernels.launch import architecture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# No whole tiles, and rows of weights that are no whole number of blocks.
_UNEVEN = {3584: 200, 18944: 296, 152064: 331, 2048: 77, 512: 72, 224: 36, 128: 40, 64: 20}


# Products in int8 take whole blocks.
_UNEVEN_OF_BLOCKS = {**_UNEVEN, 3584: 192, 18944: 320}


def uneven(size):
    return _UNEVEN.get(size, shrunk(size))


def uneven_of_blocks(size):
    return _UNEVEN_OF_BLOCKS.get(size, shrunk(size))


@pytest.mark.parametrize("name", [case.name for case in cases()])
@pytest.mark.parametrize(
    ("size", "half"),
    [(uneven, torch.bfloat16), (uneven, torch.float32), (shrunk, torch.float16)],
    ids=["uneven bfloat16", "uneven float32", "whole float16"],
)
def test_right_and_the_same_twice(name, size, half):
    device = torch.device("cuda", torch.cuda.current_device())
    if "int8" in name and size is uneven:
        size = uneven_of_blocks
    for call in calls(architecture(device)):
        if call.name != name:
            continue
        made = call.on(device, size=size, half=half)
        assert made.unsupported() is None
        made.verify()
        first, second = (_results(call.on(device, size=size, half=half)) for _ in range(2))
        assert all(map(torch.equal, first, second))


def _results(call):
    return kernel_calls._results(getattr(call.module, call.function), call.arguments)
