"""Fine-tune large language models without a backward pass through them.

A frozen NF4 model runs forward only; a small side network, the *ladder*, climbs beside it and is
all that is trained (Ladder Side Tuning, Sung et al. 2022, arXiv:2206.06522, and its deeper form
xLadder, arXiv:2512.14237).

Names are imported when they are first used, so ``import ladder_kernels`` is quick and asks for no
GPU, file or network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ladder_kernels.backend import get_backend, set_backend, use_backend
    from ladder_kernels.models.accelerate import accelerate_4bit, restore_4bit
    from ladder_kernels.models.config import LadderConfig
    from ladder_kernels.models.modeling import LadderForCausalLM
    from ladder_kernels.nf4 import NF4Weight, quantize_nf4
    from ladder_kernels.ops import (
        linear_cross_entropy,
        nf4_linear,
        nf4_swiglu,
        rms_norm,
        rung_merge,
    )

__version__ = "0.1.0"

_HOME = {
    "LadderConfig": "ladder_kernels.models.config",
    "LadderForCausalLM": "ladder_kernels.models.modeling",
    "NF4Weight": "ladder_kernels.nf4",
    "accelerate_4bit": "ladder_kernels.models.accelerate",
    "get_backend": "ladder_kernels.backend",
    "linear_cross_entropy": "ladder_kernels.ops",
    "nf4_linear": "ladder_kernels.ops",
    "nf4_swiglu": "ladder_kernels.ops",
    "quantize_nf4": "ladder_kernels.nf4",
    "restore_4bit": "ladder_kernels.models.accelerate",
    "rms_norm": "ladder_kernels.ops",
    "rung_merge": "ladder_kernels.ops",
    "set_backend": "ladder_kernels.backend",
    "use_backend": "ladder_kernels.backend",
}

__all__ = [
    "LadderConfig",
    "LadderForCausalLM",
    "NF4Weight",
    "__version__",
    "accelerate_4bit",
    "get_backend",
    "linear_cross_entropy",
    "nf4_linear",
    "nf4_swiglu",
    "quantize_nf4",
    "restore_4bit",
    "rms_norm",
    "rung_merge",
    "set_backend",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'ladder_kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
