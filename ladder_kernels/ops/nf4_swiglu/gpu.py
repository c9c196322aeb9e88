"""The gated half of a SwiGLU MLP in Triton; the maths is in ``reference.py``.

Forward, *fused*: one program holds the sums of both products for its tile; a piece of x is read
once and multiplied by a piece of either weight, each decoded in registers (``nf4/gpu.py``); what is
written is ``silu(gate) * up``, rounded once. *Unpacked*: some rows of both weights are dequantised
into one workspace, multiplied by PyTorch, and joined by a second kernel.

Backward: both products again, some rows of x at a time; one kernel turns them into their own
gradients in place; two transposed products follow, the second of which adds the first. Never in
memory: either product as a whole, the dequantised weights, the sigmoid.

Which way and which tiles: ``nf4_linear/configurations.py``, as product "gated".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.gpu import (
    EXACT,
    centroids,
    decode,
    decode_anywhere,
    decoding,
    dequantize_into,
    load_offset,
    tensors,
    weight_tables,
)
from ladder_kernels.ops import _triton
from ladder_kernels.ops._numeric import blocks
from ladder_kernels.ops.nf4_linear import gpu as linear
from ladder_kernels.ops.nf4_linear.configurations import Configuration, choose

__all__ = ["nf4_swiglu", "nf4_swiglu_backward", "unsupported"]

_BACKWARD_NUMBERS = 1 << 24
"""Numbers of each of the backward's [rows of x, N] temporaries."""

_ELEMENTS = 1024


def unsupported(x: Tensor, *_: object) -> str | None:
    """Say why a call cannot run in Triton; ``None`` if it can."""
    return _triton.unsupported(x, products=True)


@triton.jit
def silu(value):
    return value / (1.0 + tl.exp(-value))


@triton.jit
def _nf4_swiglu_forward_kernel(
    x,  # [M, K]
    gate_packed,  # [ceil(N * K / 2)] uint8
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
    x_stride,
    GATE_BLOCKSIZE: tl.constexpr,
    UP_BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PERMUTE: tl.constexpr,
    WHOLE: tl.constexpr,  # K is a multiple of BLOCK_K * PARTS
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # tiles that share their scales
):
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    m_inside = m < M
    n_inside = n < N
    x_row = x + m.to(tl.int64)[:, None] * x_stride + column[None, :]
    w_row = n.to(tl.int64) * K
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    code = centroids()
    gate_offset = load_offset(gate_nested_offset)
    up_offset = load_offset(up_nested_offset)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    STEP: tl.constexpr = BLOCK_K * PARTS
    for k in range(0, K, STEP):
        if ALIGNED:
            gate_table = weight_tables(
                code,
                gate_absmax,
                gate_nested_absmax,
                gate_nested_code,
                gate_offset,
                w_row,
                k,
                n_inside,
                K - k,
                GATE_BLOCKSIZE,
                WHOLE,
                BLOCK_N,
                STEP,
                x.dtype.element_ty,
                PERMUTE,
            )
            up_table = weight_tables(
                code,
                up_absmax,
                up_nested_absmax,
                up_nested_code,
                up_offset,
                w_row,
                k,
                n_inside,
                K - k,
                UP_BLOCKSIZE,
                WHOLE,
                BLOCK_N,
                STEP,
                x.dtype.element_ty,
                PERMUTE,
            )
        for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            left_over = K - k - part * BLOCK_K
            x_inside = m_inside[:, None]
            if not WHOLE:
                x_inside &= (column < left_over)[None, :]
            left = tl.load(x_row + k + part * BLOCK_K, mask=x_inside, other=0.0)
            if ALIGNED:
                right = decode(
                    gate_table,
                    gate_packed,
                    w_row,
                    k,
                    n_inside,
                    left_over,
                    part,
                    WHOLE,
                    BLOCK_N,
                    BLOCK_K,
                    x.dtype.element_ty,
                    PERMUTE,
                )
                other = decode(
                    up_table,
                    up_packed,
                    w_row,
                    k,
                    n_inside,
                    left_over,
                    part,
                    WHOLE,
                    BLOCK_N,
                    BLOCK_K,
                    x.dtype.element_ty,
                    PERMUTE,
                )
            else:
                right = decode_anywhere(
                    code,
                    gate_packed,
                    gate_absmax,
                    gate_nested_absmax,
                    gate_nested_code,
                    gate_offset,
                    w_row,
                    k + part * BLOCK_K,
                    n_inside,
                    left_over,
                    GATE_BLOCKSIZE,
                    BLOCK_N,
                    BLOCK_K,
                    x.dtype.element_ty,
                )
                other = decode_anywhere(
                    code,
                    up_packed,
                    up_absmax,
                    up_nested_absmax,
                    up_nested_code,
                    up_offset,
                    w_row,
                    k + part * BLOCK_K,
                    n_inside,
                    left_over,
                    UP_BLOCKSIZE,
                    BLOCK_N,
                    BLOCK_K,
                    x.dtype.element_ty,
                )
            gate = tl.dot(left, tl.trans(right), gate, input_precision="ieee")
            up = tl.dot(left, tl.trans(other), up, input_precision="ieee")
    value = silu(gate) * up
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = m_inside[:, None] & n_inside[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _nf4_swiglu_join_kernel(
    gate,  # [M, n]
    up,  # [M, n]
    y,  # [M, n], rows y_stride apart
    size,  # M * n
    n,
    y_stride,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = silu(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32))
    value *= tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place // n * y_stride + place % n, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _nf4_swiglu_backward_kernel(
    grad,  # [M, N], rows grad_stride apart
    gate,  # [M, N]: the product, then its gradient
    up,  # [M, N]: likewise
    size,  # M * N
    N,
    grad_stride,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    along = tl.load(grad + place // N * grad_stride + place % N, mask=inside, other=0.0)
    along = along.to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    dgate = along * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    dup = along * g * sigmoid
    tl.store(gate + place, dgate.to(gate.dtype.element_ty), mask=inside)
    tl.store(up + place, dup.to(up.dtype.element_ty), mask=inside)


def nf4_swiglu(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return ``silu(x @ Wg^T) * (x @ Wu^T)``; as the reference's."""
    M, N, K = x.shape[0], *w_gate.shape
    out = x.new_empty((M, N))
    if out.numel() == 0:
        return out
    configuration = choose("gated", x, w_gate)
    if configuration.way != "fused":
        return _unpacked(x, w_gate, w_up, out, configuration)
    x = linear.adjacent(x)
    tiles = triton.cdiv(M, configuration.block_m) * triton.cdiv(N, configuration.block_n)
    parts = min(linear.parts(configuration, weight) for weight in (w_gate, w_up))
    _triton.launch(
        _nf4_swiglu_forward_kernel,
        (tiles,),
        x,
        *tensors(w_gate),
        *tensors(w_up),
        out,
        M,
        N,
        K,
        x.stride(0),
        GATE_BLOCKSIZE=w_gate.blocksize,
        UP_BLOCKSIZE=w_up.blocksize,
        **decoding(x.dtype, w_gate, w_up),
        WHOLE=K % (configuration.block_k * parts) == 0,
        BLOCK_M=configuration.block_m,
        BLOCK_N=configuration.block_n,
        BLOCK_K=configuration.block_k,
        PARTS=parts,
        **configuration.options(),
        **EXACT,
    )
    return out


def _unpacked(
    x: Tensor, w_gate: NF4Weight, w_up: NF4Weight, out: Tensor, configuration: Configuration
) -> Tensor:
    M, N, K = x.shape[0], *w_gate.shape
    numbers = configuration.workspace_bytes // x.element_size()
    # Beside the rows of a weight, both products of them are in memory.
    rows = linear.piece(N, max(1, numbers // max(1, K + 2 * M)))
    workspace = x.new_empty((rows, K))
    products = x.new_empty((2, M * rows))
    for start, stop in blocks(N, rows):
        width = stop - start
        gate, up = products[:, : M * width].view(2, M, width)
        for weight, product in ((w_gate, gate), (w_up, up)):
            dense = workspace[:width]
            dequantize_into(dense, weight, start * K, K)
            torch.mm(x, dense.t(), out=product)
        _triton.launch(
            _nf4_swiglu_join_kernel,
            (triton.cdiv(gate.numel(), _ELEMENTS),),
            gate,
            up,
            out[:, start:stop],
            gate.numel(),
            width,
            N,
            BLOCK=_ELEMENTS,
        )
    return out


def nf4_swiglu_backward(grad: Tensor, x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Return the gradient to ``x`` ``[M, K]`` from ``grad`` ``[M, N]``; as the reference's."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return out.zero_()
    grad = linear.adjacent(grad)
    N = w_gate.shape[0]
    for start, stop in blocks(
        x.shape[0], linear.piece(x.shape[0], max(64, _BACKWARD_NUMBERS // N))
    ):
        rows, along = x[start:stop], grad[start:stop]
        gate = linear.nf4_linear(rows, w_gate)
        up = linear.nf4_linear(rows, w_up)
        _triton.launch(
            _nf4_swiglu_backward_kernel,
            (triton.cdiv(gate.numel(), _ELEMENTS),),
            along,
            gate,
            up,
            gate.numel(),
            N,
            along.stride(0),
            BLOCK=_ELEMENTS,
        )
        through_up = linear.nf4_linear_transposed(up, w_up)
        out[start:stop] = linear.nf4_linear_transposed(gate, w_gate, through_up)
    return out
