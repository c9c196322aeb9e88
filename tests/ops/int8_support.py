"""What the tests of products in whole numbers share."""

from __future__ import annotations

from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops.nf4_linear_int8 import reference


def exactly(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The reference's whole numbers and float32 scales, summed in float64."""
    q, steps = reference.quantize_rows(x, weight.blocksize)
    codes = reference.codes_of_rows(weight, 0, weight.shape[0])
    sums = reference.block_sums(q, codes, weight.blocksize)
    scales = reference.scales_of_rows(weight, 0, weight.shape[0]).double()
    out = (sums.double() * scales * steps.double()[:, None]).sum(2) / 127
    for addend in (bias, residual):
        out = out if addend is None else out + addend.double()
    return out
