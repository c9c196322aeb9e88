"""The gated half of a SwiGLU MLP in whole numbers, in Triton; the maths is in ``reference.py``.

One program holds the sums of both products for its tile, as those of one product with a weight
whose rows are those of the two in turns, which ``nf4_linear_int8/gpu.py`` says how to compute: a
piece of rounded x is read once, and sums that belong together are in the same thread. What is
written is ``silu(gate) * up``, rounded once. Never in memory: either product, either weight in any
other form than packed.

Which tiles: ``nf4_linear/configurations.py``, as product "gated_int8".
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.gpu import EXACT, load_offset, tensors
from ladder_kernels.ops import _triton
from ladder_kernels.ops.nf4_linear.configurations import choose
from ladder_kernels.ops.nf4_linear_int8 import gpu as linear
from ladder_kernels.ops.nf4_linear_int8.gpu import (
    INVERSE,
    add_product,
    decode,
    next_scales,
    next_steps,
    weight_bytes,
)
from ladder_kernels.ops.nf4_swiglu.gpu import silu

__all__ = ["nf4_swiglu_int8", "unsupported"]


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call with ``x`` cannot run in Triton; ``None`` if it can."""
    return linear.unsupported(x)


@triton.jit
def _in_turns(
    gate,  # [ROWS, COLUMNS]
    up,  # [ROWS, COLUMNS]
) -> tl.tensor:
    """Return the rows of both in turns: [2 * ROWS, COLUMNS]."""
    ROWS: tl.constexpr = 2 * gate.shape[0]
    COLUMNS: tl.constexpr = gate.shape[1]
    return tl.join(gate, up).permute(0, 2, 1).reshape(ROWS, COLUMNS)


@triton.jit
def _next_scales(
    gate_absmax,  # [blocks] float32, or uint8 with double quantisation
    gate_nested_absmax,  # [ceil(blocks / 256)] float32 or None
    gate_nested_code,  # [256] float32 or None
    gate_offset,  # [] float32, of load_offset
    up_absmax,  # as those of the gate
    up_nested_absmax,
    up_nested_code,
    up_offset,
    row,  # [ROWS] int64: the block that each row begins with
    inside,  # [ROWS]: which rows are there
    block,  # of each row
    blocks,  # of each row, how many
) -> tl.tensor:
    """Return the next_scales of both weights: [2 * ROWS, 2]."""
    gate = next_scales(
        gate_absmax,
        gate_nested_absmax,
        gate_nested_code,
        gate_offset,
        row,
        inside,
        block,
        blocks,
    )
    up = next_scales(
        up_absmax, up_nested_absmax, up_nested_code, up_offset, row, inside, block, blocks
    )
    return _in_turns(gate, up)


@triton.jit
def _nf4_swiglu_int8_forward_kernel(
    q,  # [M, K] int8
    steps,  # [M, K / BLOCKSIZE] float32
    gate_packed,  # [N * K / 2] uint8
    gate_absmax,  # [blocks] float32, or uint8 with double quantisation
    gate_nested_absmax,  # [ceil(blocks / 256)] float32 or None
    gate_nested_code,  # [256] float32 or None
    gate_nested_offset,  # [] float32 or None
    up_packed,  # as those of the gate
    up_absmax,
    up_nested_absmax,
    up_nested_code,
    up_nested_offset,
    y,  # [M, N]
    M,
    N,
    K,
    BLOCKSIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a share of BLOCKSIZE
    PTX: tl.constexpr,  # decode by prmt
):
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_inside = m < M
    n_inside = n < N
    blocks = K // BLOCKSIZE
    q_row = q + m.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    w_row = n.to(tl.int64) * K
    step_row = m.to(tl.int64) * blocks
    scale_row = n.to(tl.int64) * blocks
    gate_offset = load_offset(gate_nested_offset)
    up_offset = load_offset(up_nested_offset)
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    step = next_steps(steps, step_row, m_inside, 0, blocks)
    scale = _next_scales(
        gate_absmax,
        gate_nested_absmax,
        gate_nested_code,
        gate_offset,
        up_absmax,
        up_nested_absmax,
        up_nested_code,
        up_offset,
        scale_row,
        n_inside,
        0,
        blocks,
    )
    for k in range(0, K, BLOCK_K):
        after = (k + BLOCK_K) // BLOCKSIZE
        step_after = next_steps(steps, step_row, m_inside, after, blocks)
        scale_after = _next_scales(
            gate_absmax,
            gate_nested_absmax,
            gate_nested_code,
            gate_offset,
            up_absmax,
            up_nested_absmax,
            up_nested_code,
            up_offset,
            scale_row,
            n_inside,
            after,
            blocks,
        )
        left = tl.load(q_row + k, mask=m_inside[:, None], other=0)
        gate = weight_bytes(gate_packed, w_row, k, n_inside, BLOCK_K)
        up = weight_bytes(up_packed, w_row, k, n_inside, BLOCK_K)
        right = decode(_in_turns(gate, up), PTX)
        acc = add_product(acc, left, right, step, scale, k // BLOCKSIZE)
        step = step_after
        scale = scale_after
    gate, up = tl.split((acc * INVERSE).reshape(BLOCK_M, BLOCK_N, 2))
    value = silu(gate) * up
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = m_inside[:, None] & n_inside[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def nf4_swiglu_int8(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return about ``silu(x @ Wg^T) * (x @ Wu^T)``; as the reference's."""
    M, N, K = x.shape[0], *w_gate.shape
    out = x.new_empty((M, N))
    if out.numel() == 0:
        return out
    configuration = choose("gated_int8", x, w_gate)
    columns = linear.columns_at_once(configuration, w_gate)
    q, steps = linear.quantize_rows(x, w_gate.blocksize, columns)
    tiles = triton.cdiv(M, configuration.block_m) * triton.cdiv(N, configuration.block_n)
    _triton.launch(
        _nf4_swiglu_int8_forward_kernel,
        (tiles,),
        q,
        steps,
        *tensors(w_gate),
        *tensors(w_up),
        out,
        M,
        N,
        K,
        BLOCKSIZE=w_gate.blocksize,
        BLOCK_M=configuration.block_m,
        BLOCK_N=configuration.block_n,
        BLOCK_K=columns,
        PTX=linear.takes_ptx(x.device),
        **configuration.options(),
        **EXACT,
    )
    return out
