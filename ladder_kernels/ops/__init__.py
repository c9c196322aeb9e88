"""Operations on NF4 weights and ladders.

Each is a folder: ``__init__`` (what users call, the ``torch.library`` registration under
``ladder_kernels::``, the shape-only implementation and the gradient), ``reference.py`` (the
mathematics in plain PyTorch) and, where they exist, ``cpu.py`` (native) and ``gpu.py`` (Triton).
"""

from __future__ import annotations

from ladder_kernels.backend import BACKENDS, get_backend, set_backend, use_backend
from ladder_kernels.ops.linear_cross_entropy import linear_cross_entropy
from ladder_kernels.ops.nf4_linear import nf4_linear, nf4_linear_transposed
from ladder_kernels.ops.nf4_linear_int8 import nf4_linear_int8
from ladder_kernels.ops.nf4_swiglu import nf4_swiglu
from ladder_kernels.ops.nf4_swiglu_int8 import nf4_swiglu_int8
from ladder_kernels.ops.ranged_attention import ranged_attention
from ladder_kernels.ops.rms_norm import rms_norm
from ladder_kernels.ops.rotary import rotary, rotary_
from ladder_kernels.ops.rung_merge import rung_merge
from ladder_kernels.ops.side_mlp import side_mlp

__all__ = [
    "BACKENDS",
    "get_backend",
    "linear_cross_entropy",
    "nf4_linear",
    "nf4_linear_int8",
    "nf4_linear_transposed",
    "nf4_swiglu",
    "nf4_swiglu_int8",
    "ranged_attention",
    "rms_norm",
    "rotary",
    "rotary_",
    "rung_merge",
    "set_backend",
    "side_mlp",
    "use_backend",
]
