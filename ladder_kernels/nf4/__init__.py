"""The NF4 format: quantise, dequantise, bitsandbytes interchange, checkpoint files."""

from __future__ import annotations

from ladder_kernels.nf4.codebook import NF4_VALUES
from ladder_kernels.nf4.quantize import BLOCKSIZES, NESTED_BLOCKSIZE
from ladder_kernels.nf4.weight import NF4Weight, quantize_nf4

__all__ = ["BLOCKSIZES", "NESTED_BLOCKSIZE", "NF4_VALUES", "NF4Weight", "quantize_nf4"]
