"""Small kernels that the tests of the audit compile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product_kernel(
    x,  # [M, K]
    w,  # [N, K]
    y,  # [M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(x + rows[:, None] * K + k + inner[None, :], mask=rows[:, None] < M, other=0.0)
        b = tl.load(
            w + columns[:, None] * K + k + inner[None, :], mask=columns[:, None] < N, other=0.0
        )
        total = tl.dot(a, tl.trans(b), total)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y + rows[:, None] * N + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(
    x,  # [N]
    bias,  # [N] or None
    y,  # [N]
    factor,
    N,
    stride,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places * stride, mask=places < N) * factor
    if bias is not None:
        value += tl.load(bias + places, mask=places < N)
    tl.store(y + places, value, mask=places < N)
