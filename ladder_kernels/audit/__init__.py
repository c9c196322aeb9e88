"""Proof of the Triton kernels without a GPU.

Three layers: numerics in Triton's interpreter (:func:`interpreting`, any shape, no bfloat16); the
compiled code executed on the CPU (:func:`executing`: bfloat16, tensor-core instructions, barriers,
every access checked); and what the compilers made for every GPU (``ladder-kernels audit``).
"""

from __future__ import annotations

from ladder_kernels.audit.interpreter import interpreting
from ladder_kernels.audit.ptx import executing

__all__ = ["executing", "interpreting"]
