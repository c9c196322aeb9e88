"""Products with an NF4 weight in Triton; the maths is in ``reference.py``.

Three ways, chosen by the table in ``configurations.py``:

* *fused*: a tile of the weight is decoded in registers (``nf4/gpu.py`` says how), put into shared
  memory and multiplied on the tensor cores. Decoding is repeated for each tile of rows of x, so
  tiles are tall. With few rows, several programs share one sum: each writes a partial sum, float32
  ``[splits, M, N]``, and a second kernel adds them up in a fixed order.
* *rows*: one program multiplies one row of x by a few rows of the weight, without tensor cores.
* *unpacked*: as much of the weight as fits a budget is dequantised into a workspace, which PyTorch
  multiplies. The transposed product takes columns instead of rows, so that no sums are left over.

Sums are float32, and tensor cores are not asked for TF32. *fused* and *rows* add bias and residual
before the only rounding. Programs of one tile of the weight follow each other, so that it is read
from memory once. Never in memory: the dequantised weight (but for the workspace of *unpacked*) and
scales in float32. No atomics: results are the same bits in every run.

Layout: x, residual and gradient have adjacent columns, rows any distance apart. A weight whose rows
do not begin with a block (then pairs of nibbles may straddle rows, too) takes a slower decoder.
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
    weight_tile,
)
from ladder_kernels.ops import _triton
from ladder_kernels.ops._numeric import blocks
from ladder_kernels.ops.nf4_linear.configurations import PIECE_TILE, Configuration, choose, piece

__all__ = [
    "add_splits",
    "adjacent",
    "nf4_linear",
    "nf4_linear_transposed",
    "parts",
    "piece",
    "unsupported",
]

_SUM_ELEMENTS = 1024


def unsupported(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> str | None:
    """Say why a call cannot run in Triton; ``None`` if it can."""
    return _triton.unsupported(x, products=True)


@triton.jit
def _nf4_linear_forward_kernel(
    x,  # [M, K]
    packed,  # [ceil(N * K / 2)] uint8
    absmax,  # [blocks] float32, or uint8 with double quantisation
    nested_absmax,  # [ceil(blocks / 256)] float32 or None
    nested_code,  # [256] float32 or None
    nested_offset,  # [] float32 or None
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N]; with several splits [splits, M, N] float32
    M,
    N,
    K,
    x_stride,
    residual_stride,
    share,  # how many columns of x a split sums over
    BLOCKSIZE: tl.constexpr,
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
    split = tl.program_id(1)
    column = tl.arange(0, BLOCK_K)
    m_inside = m < M
    n_inside = n < N
    x_row = x + m.to(tl.int64)[:, None] * x_stride + column[None, :]
    w_row = n.to(tl.int64) * K
    code = centroids()
    offset = load_offset(nested_offset)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    STEP: tl.constexpr = BLOCK_K * PARTS
    for k in range(split * share, min(K, (split + 1) * share), STEP):
        if ALIGNED:
            table = weight_tables(
                code,
                absmax,
                nested_absmax,
                nested_code,
                offset,
                w_row,
                k,
                n_inside,
                K - k,
                BLOCKSIZE,
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
                    table,
                    packed,
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
                    packed,
                    absmax,
                    nested_absmax,
                    nested_code,
                    offset,
                    w_row,
                    k + part * BLOCK_K,
                    n_inside,
                    left_over,
                    BLOCKSIZE,
                    BLOCK_N,
                    BLOCK_K,
                    x.dtype.element_ty,
                )
            acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    inside = m_inside[:, None] & n_inside[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        place = m.to(tl.int64)[:, None] * residual_stride + n[None, :]
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    place = (split.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _nf4_linear_transposed_kernel(
    grad,  # [M, N]
    packed,  # [ceil(N * K / 2)] uint8
    absmax,  # [blocks] float32, or uint8 with double quantisation
    nested_absmax,  # [ceil(blocks / 256)] float32 or None
    nested_code,  # [256] float32 or None
    nested_offset,  # [] float32 or None
    residual,  # [M, K] or None
    dx,  # [M, K]; with several splits [splits, M, K] float32
    M,
    N,
    K,
    grad_stride,
    residual_stride,
    share,  # how many columns of grad a split sums over
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PERMUTE: tl.constexpr,
    WHOLE: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // tiles * BLOCK_K
    split = tl.program_id(1)
    row = tl.arange(0, BLOCK_N)
    m_inside = m < M
    grad_row = grad + m.to(tl.int64)[:, None] * grad_stride + row[None, :]
    code = centroids()
    offset = load_offset(nested_offset)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in range(split * share, min(N, (split + 1) * share), BLOCK_N):
        n_inside = row < N - n
        left = tl.load(grad_row + n, mask=m_inside[:, None] & n_inside[None, :], other=0.0)
        right = weight_tile(
            code,
            packed,
            absmax,
            nested_absmax,
            nested_code,
            offset,
            (n + row).to(tl.int64) * K,
            first,
            n_inside,
            K - first,
            BLOCKSIZE,
            ALIGNED,
            WHOLE,
            BLOCK_N,
            BLOCK_K,
            grad.dtype.element_ty,
            PERMUTE,
        )
        acc = tl.dot(left, right, acc, input_precision="ieee")
    k = first + tl.arange(0, BLOCK_K)
    inside = m_inside[:, None] & (k < K)[None, :]
    if residual is not None:
        place = m.to(tl.int64)[:, None] * residual_stride + k[None, :]
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    place = (split.to(tl.int64) * M + m)[:, None] * K + k[None, :]
    tl.store(dx + place, acc.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _nf4_linear_rows_kernel(
    x,  # [M, K]
    packed,  # [N * K / 2] uint8
    absmax,  # [blocks] float32, or uint8 with double quantisation
    nested_absmax,  # [ceil(blocks / 256)] float32 or None
    nested_code,  # [256] float32 or None
    nested_offset,  # [] float32 or None
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N]
    M,
    N,
    K,
    x_stride,
    residual_stride,
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PERMUTE: tl.constexpr,
    WHOLE: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The programs of one tile of the weight follow each other.
    m = (tl.program_id(0) % M).to(tl.int64)
    n = tl.program_id(0) // M * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    n_inside = n < N
    w_row = n.to(tl.int64) * K
    code = centroids()
    offset = load_offset(nested_offset)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = tl.load(x + m * x_stride + k + column, mask=column < K - k, other=0.0)
        right = weight_tile(
            code,
            packed,
            absmax,
            nested_absmax,
            nested_code,
            offset,
            w_row,
            k,
            n_inside,
            K - k,
            BLOCKSIZE,
            ALIGNED,
            WHOLE,
            BLOCK_N,
            BLOCK_K,
            x.dtype.element_ty,
            PERMUTE,
        )
        left = tl.broadcast_to(left.to(tl.float32)[None, :], (BLOCK_N, BLOCK_K))
        # Said outright: contraction is off.
        acc = tl.fma(left, right.to(tl.float32), acc)
    value = tl.sum(acc, 1)
    if bias is not None:
        value += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + m * residual_stride + n
        value += tl.load(place, mask=n_inside, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, value.to(y.dtype.element_ty), mask=n_inside)


@triton.jit
def _nf4_linear_sum_kernel(
    partial,  # [splits, M, N] float32
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N]
    splits,
    size,  # M * N
    N,
    residual_stride,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        value += tl.load(partial + place, mask=inside, other=0.0)
        partial += size
    if bias is not None:
        value += tl.load(bias + place % N, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        added = residual + place // N * residual_stride + place % N
        value += tl.load(added, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def adjacent(value: Tensor) -> Tensor:
    """Return ``[rows, columns]`` with adjacent columns; a copy only if they are not."""
    return value if value.stride(1) == 1 or value.shape[1] == 1 else value.contiguous()


def parts(configuration: Configuration, weight: NF4Weight) -> int:
    """Return how many tiles share their scales: as many as lie in one block, or one."""
    inside = configuration.block_k * configuration.parts <= weight.blocksize
    return configuration.parts if inside else 1


def nf4_linear(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return ``x @ W^T (+ bias) (+ residual)``; as the reference's."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    if out.numel() == 0:
        return out
    configuration = choose("forward", x, weight)
    if configuration.way == "unpacked":
        return _unpacked_forward(x, weight, bias, residual, out, configuration)
    x = adjacent(x)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else adjacent(residual)
    if configuration.way == "rows":
        _run_rows(x, weight, bias, residual, out, configuration)
    else:
        _run_fused(x, weight, bias, residual, out, configuration, transposed=False)
    return out


def nf4_linear_transposed(
    grad: Tensor, weight: NF4Weight, residual: Tensor | None = None
) -> Tensor:
    """Return ``grad @ W (+ residual)``; as the reference's, which knows no residual."""
    out = grad.new_empty((grad.shape[0], weight.shape[1]))
    if out.numel() == 0:
        return out
    configuration = choose("transposed", grad, weight)
    if configuration.way == "unpacked":
        return _unpacked_transposed(grad, weight, residual, out, configuration)
    residual = None if residual is None else adjacent(residual)
    _run_fused(adjacent(grad), weight, None, residual, out, configuration, transposed=True)
    return out


def _run_fused(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    configuration: Configuration,
    *,
    transposed: bool,
) -> None:
    """Launch a fused kernel, and the sum of its splits."""
    N, K = weight.shape
    M, width = out.shape
    # What a program walks along, and what its tile of the result is as wide as.
    length, step, block = K, configuration.block_k, configuration.block_n
    if transposed:
        length, step, block = N, configuration.block_n, configuration.block_k
    own: dict[str, int] = {}
    if not transposed:
        own["PARTS"] = parts(configuration, weight)
        step *= own["PARTS"]
    share = max(step, triton.cdiv(triton.cdiv(length, configuration.splits), step) * step)
    splits = max(1, triton.cdiv(length, share))
    target = out
    if splits > 1:
        target = torch.empty((splits, M, width), dtype=torch.float32, device=out.device)
    stride = 0 if residual is None else residual.stride(0)
    addends = (residual,) if transposed else (bias, residual)
    kernel = _nf4_linear_transposed_kernel if transposed else _nf4_linear_forward_kernel
    _triton.launch(
        kernel,
        (triton.cdiv(M, configuration.block_m) * triton.cdiv(width, block), splits),
        x,
        *tensors(weight),
        *(addends if splits == 1 else [None] * len(addends)),
        target,
        M,
        N,
        K,
        x.stride(0),
        stride,
        share,
        BLOCKSIZE=weight.blocksize,
        **decoding(x.dtype, weight),
        WHOLE=K % (configuration.block_k * own.get("PARTS", 1)) == 0,
        BLOCK_M=configuration.block_m,
        BLOCK_N=configuration.block_n,
        BLOCK_K=configuration.block_k,
        **own,
        **configuration.options(),
        **EXACT,
    )
    if splits > 1:
        add_splits(target, bias, residual, out)


def add_splits(partial: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """Write the sum of partial sums ``[splits, M, N]``, and of what is added, to ``[M, N]``."""
    _triton.launch(
        _nf4_linear_sum_kernel,
        (triton.cdiv(out.numel(), _SUM_ELEMENTS),),
        partial,
        bias,
        residual,
        out,
        partial.shape[0],
        out.numel(),
        out.shape[1],
        0 if residual is None else residual.stride(0),
        BLOCK=_SUM_ELEMENTS,
    )


def _run_rows(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    configuration: Configuration,
) -> None:
    N, K = weight.shape
    M = x.shape[0]
    _triton.launch(
        _nf4_linear_rows_kernel,
        (M * triton.cdiv(N, configuration.block_n),),
        x,
        *tensors(weight),
        bias,
        residual,
        out,
        M,
        N,
        K,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        BLOCKSIZE=weight.blocksize,
        **decoding(x.dtype, weight),
        WHOLE=K % configuration.block_k == 0,
        BLOCK_N=configuration.block_n,
        BLOCK_K=configuration.block_k,
        **configuration.options(),
        **EXACT,
    )


def _unpacked_forward(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    configuration: Configuration,
) -> Tensor:
    N, K = weight.shape
    numbers = configuration.workspace_bytes // x.element_size()
    rows = piece(N, max(1, numbers // max(1, K)))
    workspace = x.new_empty((rows, K))
    for start, stop in blocks(N, rows):
        dense = workspace[: stop - start]
        dequantize_into(dense, weight, start * K, K)
        if bias is None:
            torch.mm(x, dense.t(), out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, dense.t(), out=out[:, start:stop])
    return out if residual is None else out.add_(residual)


def _unpacked_transposed(
    grad: Tensor,
    weight: NF4Weight,
    residual: Tensor | None,
    out: Tensor,
    configuration: Configuration,
) -> Tensor:
    N, K = weight.shape
    numbers = configuration.workspace_bytes // grad.element_size()
    # Whole blocks, or the slower decoder would run.
    columns = max(1, numbers // max(1, N) // weight.blocksize) * weight.blocksize
    if weight.blocksize <= PIECE_TILE:
        columns = piece(K, columns)
    workspace = grad.new_empty(N * min(K, columns))
    for start, stop in blocks(K, columns):
        dense = workspace[: N * (stop - start)].view(N, stop - start)
        dequantize_into(dense, weight, start, K)
        torch.mm(grad, dense, out=out[:, start:stop])
    return out if residual is None else out.add_(residual)
