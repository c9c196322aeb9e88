"""From floats to NF4 bits, given what the weight will be multiplied with.

Rounding to nearest spoils ``x W^T`` as if all inputs were alike and independent. Here the error
``tr((W - Q) H (W - Q)^T)`` is made small, ``H = sum x x^T`` over a few real inputs:

1. Each block's scale is chosen among shares of its largest magnitude. An element weighs
   ``1 / inv(H_rest)[k, k]``, what its error costs when the columns that are rounded after it make
   up for as much of it as they can. Then the scales are themselves quantised, so that rounding
   sees the scales that dequantising will.
2. Columns are rounded one by one, those with the largest inputs first, and each one's error is
   taken out of the columns that are left (GPTQ, Frantar et al. 2022, arXiv:2210.17323). Blocks
   stay where the format has them; only the order of rounding changes.
3. A few sweeps of coordinate descent go over all columns again, and put each at the centroid
   that is best given all others.

The format, and so the size and the speed, is that of rounding to nearest. Plain PyTorch, on any
device. The same inputs give the same bits on the same machine and number of threads; elsewhere,
sums in another order may tip a rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4.codebook import nf4_code
from ladder_kernels.nf4.dequantize import dequantize_scales
from ladder_kernels.nf4.quantize import (
    CentroidSearch,
    has_values,
    non_finite,
    pack,
    quantize_absmax,
)

__all__ = ["DAMPING", "SHARES", "SWEEPS", "check_calibration", "quantize_calibrated"]

DAMPING = 0.1
"""Added to the diagonal of the second moments, as a share of its mean: what makes them invertible,
and a guard against inputs that the calibration has not seen. More than GPTQ's 0.01, since texts of
other kinds lose less then."""

SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)
"""Scales that are tried for a block, as shares of its largest magnitude."""

SWEEPS = 2
"""Sweeps of coordinate descent."""

# Columns whose errors are taken out of the rest in one product.
_COLUMNS = 128

# Rows that are worked on at a time: some float copies of them are held.
_ROWS = 2048

# Elements whose scales are tried at a time.
_PIECE = 1 << 22

# What may be lost to rounding when sums are accumulated in float32.
_ASYMMETRY = 1e-3

# Scales below it are taken for zero: their inverses are beyond float32.
_SMALLEST = 1e-38

Nested = tuple[Tensor, Tensor, Tensor]


def check_calibration(weight: Tensor, moments: Tensor, *, name: str) -> None:
    """Refuse second moments that cannot be those of a weight's inputs.

    Args:
        weight: ``[N, K]``.
        moments: See :func:`quantize_calibrated`.
        name: What error messages call the weight.

    Raises:
        ConfigError: Saying what was found and what is allowed. That no number of the matrix is
            negative on its diagonal is asked here; that it is positive semidefinite, once it is
            factorised.
    """
    label = f"calibration of '{name}'"
    if weight.dim() != 2:
        raise ConfigError(
            f"{label}: the weight has shape {list(weight.shape)}; only a matrix [N, K] has inputs"
        )
    size = weight.shape[1]
    if not isinstance(moments, Tensor):
        raise ConfigError(f"{label}: found a {type(moments).__name__}; it must be a torch.Tensor")
    if tuple(moments.shape) != (size, size):
        raise ConfigError(
            f"{label}: found shape {list(moments.shape)}; for a weight of shape "
            f"{list(weight.shape)} it must be [{size}, {size}]"
        )
    if moments.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"{label}: found dtype {str(moments.dtype).removeprefix('torch.')}; it must be float32 "
            "or float64"
        )
    if not has_values(weight) or not has_values(moments):
        raise ConfigError(f"{label}: found tensors without values; rounding depends on them")
    if not moments.numel():
        return
    if not bool(torch.isfinite(moments).all()):
        raise ConfigError(f"{label}: found NaN or infinity; all numbers must be finite")
    diagonal = moments.diagonal()
    lowest, highest = float(diagonal.min()), float(diagonal.max())
    if lowest < 0:
        raise ConfigError(
            f"{label}: found {lowest:g} on the diagonal; a sum of squares is never negative"
        )
    asymmetry = float((moments - moments.t()).abs().max())
    if asymmetry > _ASYMMETRY * highest:
        raise ConfigError(
            f"{label}: found a matrix that differs from its transpose by up to {asymmetry:g}; it "
            "must be symmetric"
        )


def quantize_calibrated(
    weight: Tensor,
    moments: Tensor,
    blocksize: int,
    double_quant: bool,
    *,
    name: str,
    damping: float = DAMPING,
    shares: tuple[float, ...] = SHARES,
    sweeps: int = SWEEPS,
) -> tuple[Tensor, Tensor, Nested | None]:
    """Quantise to NF4 with little error in the products with given inputs.

    ``K`` need not be a multiple of the blocksize: a block that straddles rows has one scale for the
    elements of both, as in the format.

    The matrix is factorised in float64, whatever its dtype: up to three such ``[K, K]`` are held.

    Args:
        weight: ``[N, K]``, any strides; float32, bfloat16 or float16.
        moments: ``sum x x^T`` over the inputs, or any multiple of it; symmetric and positive
            semidefinite, float32 or float64, ``[K, K]``, on any device. Inputs that are always zero
            are allowed.
        blocksize: One of :data:`~ladder_kernels.nf4.quantize.BLOCKSIZES`.
        double_quant: Whether the scales are quantised, too.
        name: What error messages call the weight.
        damping: See :data:`DAMPING`.
        shares: See :data:`SHARES`; ``(1.0,)`` leaves each block its largest magnitude.
        sweeps: See :data:`SWEEPS`.

    Returns:
        ``packed``, uint8 ``[ceil(numel / 2)]``; the scales, float32 ``[ceil(numel / blocksize)]``,
        or uint8 with double quantisation; and then their scales, map and offset, else ``None``. On
        the device of ``weight``.

    Raises:
        ConfigError: As :func:`check_calibration`, and if the moments are not positive semidefinite.
        NonFiniteError: The weight holds NaN or infinity, or its scales' sum is infinite.
    """
    check_calibration(weight, moments, name=name)
    if not bool(torch.isfinite(weight).all()):
        raise non_finite(weight, name)
    device = weight.device
    order, factor, damped = _factorise(moments.to(device), damping, name=name)
    importance = torch.empty(len(order), dtype=torch.float32, device=device)
    importance[order] = factor.diagonal().square().reciprocal()
    rounding = _Rounding(device)
    absmax = _best_scales(weight, importance, blocksize, shares, rounding)
    scales, nested = absmax, None
    if double_quant:
        absmax, *rest = quantize_absmax(absmax, name=name)
        nested = (rest[0], rest[1], rest[2])
        scales = dequantize_scales(absmax, *nested, 0, absmax.numel())

    rows, columns = weight.shape
    index = torch.zeros(rows * columns + rows * columns % 2, dtype=torch.uint8, device=device)
    matrix = index[: rows * columns].view(rows, columns)
    # Indices beyond the last element pack as zero, as the format has it.
    for start in range(0, rows, _ROWS):
        part = weight[start : start + _ROWS].float()
        scale = _by_element(scales, blocksize, start, *part.shape)
        rounded = _feed_back(part.t()[order], scale[order], factor, rounding)
        found = torch.empty_like(rounded)
        found[order] = rounded
        for _ in range(sweeps):
            _descend(found, part, scale, damped, rounding)
        matrix[start : start + _ROWS] = found.t()
    packed = torch.empty(index.numel() // 2, dtype=torch.uint8, device=device)
    pack(index, packed)
    return packed, absmax, nested


def _factorise(moments: Tensor, damping: float, *, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Order of rounding, the upper ``U`` with ``inv(H) = U^T U`` in it, and ``H``, both float32.

    ``H`` is damped and in the weight's own order.
    """
    damped = moments.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    unused = diagonal == 0
    total, used = diagonal.sum(), int((~unused).sum())
    mean = total / used if used else torch.ones_like(total)
    # What is never multiplied with anything has no error to make up for, and rounds to nearest.
    damped[unused] = 0
    damped[:, unused] = 0
    diagonal[unused] = mean
    diagonal += damping * mean
    order = torch.argsort(diagonal, descending=True, stable=True)
    # With the columns turned round, a lower Cholesky factor is an upper one: H = V V^T. Its inverse
    # is the factor of inv(H), which is never made.
    turned = order.flip(0)
    lower, failed = torch.linalg.cholesky_ex(damped[turned][:, turned])
    if int(failed):
        raise ConfigError(
            f"calibration of '{name}': found a matrix that is not positive semidefinite; "
            "it must be a sum of x x^T"
        )
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(len(order), dtype=torch.float64, device=moments.device)
    factor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return order, factor.float(), damped.float()


class _Rounding:
    """Rounds numbers to centroids of given scales."""

    def __init__(self, device: torch.device) -> None:
        self.search = CentroidSearch(device)
        self.code = nf4_code(device)

    def __call__(self, values: Tensor, scales: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 indices and what they stand for; all float32, of one shape ``[n]``."""
        index = self.search((values * inverse).clamp_(-1.0, 1.0))
        return index, self.values(index, scales)

    def values(self, index: Tensor, scales: Tensor) -> Tensor:
        """What indices of any shape stand for."""
        flat = self.code.index_select(0, index.reshape(-1).to(torch.int32))
        return flat.view(index.shape) * scales


def _inverse(scales: Tensor) -> Tensor:
    """``1 / scale``, and 0 for those that are zero: all that they can stand for is zero."""
    return torch.where(scales.abs() < _SMALLEST, 0.0, 1.0 / scales)


def _best_scales(
    weight: Tensor,
    importance: Tensor,
    blocksize: int,
    shares: tuple[float, ...],
    rounding: _Rounding,
) -> Tensor:
    """The scale of each block with the least sum of ``importance * error^2``, float32."""
    flat = weight.reshape(-1)
    numel, columns = flat.numel(), weight.shape[1]
    scales = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=weight.device)
    for start in range(0, numel, _PIECE):
        stop = min(start + _PIECE, numel)
        places = torch.arange(start, stop, device=weight.device) % columns
        ragged = (0, (start - stop) % blocksize)
        pad = torch.nn.functional.pad
        blocks = pad(flat[start:stop].float(), ragged).view(-1, blocksize)
        weighing = pad(importance[places], ragged).view(-1, blocksize)
        largest = blocks.abs().amax(dim=1)
        best, least = largest.clone(), torch.full_like(largest, torch.inf)
        for share in shares:
            tried = largest * share
            scale = tried.view(-1, 1).expand_as(blocks).reshape(-1)
            _, values = rounding(blocks.view(-1), scale, _inverse(scale))
            error = (values.view_as(blocks) - blocks).square_().mul_(weighing).sum(dim=1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, tried, best)
        first = start // blocksize
        scales[first : first + len(best)] = best
    return scales


def _by_element(scales: Tensor, blocksize: int, first_row: int, rows: int, columns: int) -> Tensor:
    """The scales of some rows' elements, ``[columns, rows]``."""
    row = torch.arange(first_row, first_row + rows, device=scales.device)
    column = torch.arange(columns, device=scales.device)
    return scales[(column.view(-1, 1) + row * columns) // blocksize]


def _feed_back(values: Tensor, scales: Tensor, factor: Tensor, rounding: _Rounding) -> Tensor:
    """Round line by line, and take each line's error out of those after it: GPTQ.

    Args:
        values: ``[K, rows]`` in the order of rounding; overwritten.
        scales: Of each element.
        factor: Upper ``U`` with ``inv(H) = U^T U``, ``[K, K]`` in that order.
        rounding: See there.

    Returns:
        uint8 indices ``[K, rows]``.
    """
    index = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    inverse, columns = _inverse(scales), values.shape[0]
    pivots = factor.diagonal().tolist()
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        errors = torch.empty(stop - start, values.shape[1], device=values.device)
        for k in range(start, stop):
            index[k], rounded = rounding(values[k], scales[k], inverse[k])
            error = torch.div(values[k] - rounded, pivots[k], out=errors[k - start])
            values[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
        values[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return index


def _descend(
    index: Tensor, weight: Tensor, scales: Tensor, moments: Tensor, rounding: _Rounding
) -> None:
    """Put each column in turn at the centroids that are best given all other columns.

    Args:
        index: uint8 ``[K, rows]``; overwritten.
        weight: ``[rows, K]``.
        scales: Of each element, ``[K, rows]``.
        moments: ``H``, ``[K, K]``.
        rounding: See there.
    """
    inverse, columns = _inverse(scales), index.shape[0]
    values = rounding.values(index, scales)
    slope = moments @ (weight.t() - values)
    pivots = moments.diagonal().tolist()
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        changes = torch.empty(stop - start, values.shape[1], device=values.device)
        for k in range(start, stop):
            best = values[k] + slope[k] / pivots[k]
            index[k], rounded = rounding(best, scales[k], inverse[k])
            change = torch.sub(values[k], rounded, out=changes[k - start])
            slope[k + 1 : stop].addr_(moments[k, k + 1 : stop], change)
        slope[stop:].addmm_(moments[stop:, start:stop], changes)
