"""From floats to NF4 bits: flat tensors in, flat tensors out. In plain PyTorch, on any device.

A tensor is flattened row-major and cut into blocks. Each block stores its largest magnitude
(``absmax``, float32) and, for each element, the index of the centroid nearest to
``element / absmax``, two indices a byte, the even element in the high nibble. Double quantisation
stores ``absmax - mean(absmax)`` in 8 bits, in blocks of 256, by the dynamic map.

All of it gives the bits that ``bitsandbytes.functional.quantize_4bit`` gives on a CPU, whatever the
device here, so that a model has one set of bits. (On a GPU, bitsandbytes itself rounds some 8-bit
scales differently: there it searches the map, on the CPU it looks a 16-bit grid up.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError, NonFiniteError
from ladder_kernels.nf4.codebook import dynamic_code, nf4_code

__all__ = [
    "BLOCKSIZES",
    "GRID_POINTS",
    "NESTED_BLOCKSIZE",
    "QUANTIZABLE",
    "SMALLEST_DIVISOR",
    "CentroidSearch",
    "check_blocksize",
    "has_values",
    "mean_of_scales",
    "nearest_code",
    "non_finite",
    "pack",
    "quantize_absmax",
    "quantize_blocks",
]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Blocksizes of the format."""

NESTED_BLOCKSIZE = 256
"""Scales that share one second-level scale in double quantisation."""

QUANTIZABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that can be quantised."""

GRID_POINTS = 65536
"""Points of [-1, 1] to which scales are rounded on their way to the dynamic map."""

# Multiples of every blocksize. On a CPU the temporaries of one piece stay in the cache.
_CPU_PIECE = 1 << 18
_DEVICE_PIECE = 1 << 24

SMALLEST_DIVISOR = 1e-38
"""bitsandbytes divides by no less than this, and stores it as the scale of an all-zero last block
that is shorter than the blocksize; a full all-zero block stores 0."""

_CELLS = 64


def check_blocksize(blocksize: int) -> None:
    """Refuse a blocksize that the format does not have with :class:`ConfigError`."""
    if blocksize not in BLOCKSIZES:
        allowed = ", ".join(map(str, BLOCKSIZES))
        raise ConfigError(f"blocksize is {blocksize}; it must be one of {allowed}")


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor holds numbers, not only a shape (meta device, ``FakeTensorMode``)."""
    return not (tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor))


def quantize_blocks(weight: Tensor, blocksize: int, *, name: str) -> tuple[Tensor, Tensor]:
    """Quantise to NF4, a piece at a time: the workspace does not grow with the tensor.

    Args:
        weight: Any shape and strides; float32, bfloat16 or float16.
        blocksize: One of :data:`BLOCKSIZES`.
        name: What error messages call the tensor.

    Returns:
        ``packed``, uint8 ``[ceil(numel / 2)]`` (a missing last element is zero), and ``absmax``,
        float32 ``[ceil(numel / blocksize)]``.

    Raises:
        NonFiniteError: The tensor holds NaN or infinity.
    """
    flat = weight.reshape(-1)
    numel = flat.numel()
    blocks = -(-numel // blocksize)
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    search = CentroidSearch(flat.device)

    full = numel - numel % blocksize
    size = _CPU_PIECE if flat.device.type == "cpu" else _DEVICE_PIECE
    for start in range(0, full, size):
        stop = min(start + size, full)
        values = flat[start:stop].float().view(-1, blocksize)
        largest = values.abs().amax(dim=1)
        _check_finite(largest, weight, name)
        absmax[start // blocksize : stop // blocksize] = largest
        inverse = 1.0 / largest.clamp(min=SMALLEST_DIVISOR)
        index = search((values * inverse.view(-1, 1)).view(-1))
        pack(index, packed[start // 2 : stop // 2])
    if full < numel:
        # The short last block is divided by its scale, the full ones multiplied by its inverse:
        # bitsandbytes does so, and the last bit decides between centroids.
        values = flat[full:].float()
        largest = values.abs().amax().clamp(min=SMALLEST_DIVISOR)
        _check_finite(largest, weight, name)
        absmax[-1] = largest
        values = values / largest
        index = search(torch.nn.functional.pad(values, (0, numel % 2)))
        pack(index, packed[full // 2 :])
    return packed, absmax


def quantize_absmax(absmax: Tensor, *, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise first-level scales to 8 bits (double quantisation).

    Args:
        absmax: float32 ``[blocks]``, finite.
        name: What error messages call the tensor that they scale.

    Returns:
        The 8-bit scales, uint8 ``[blocks]``; their scales, float32 ``[ceil(blocks / 256)]``; the
        map, float32 ``[256]``; and the offset ``mean(absmax)``, float32 ``[]``. On the device of
        ``absmax``. The mean of no scales is NaN, as in bitsandbytes.

    Raises:
        NonFiniteError: The sum of the scales is beyond float32, so that they have no mean.
    """
    device = absmax.device
    scales = absmax if absmax.is_meta else absmax.cpu()
    offset = mean_of_scales(scales, name)
    centred = scales - offset
    blocks = centred.numel()
    rows = -(-blocks // NESTED_BLOCKSIZE)
    padded = torch.nn.functional.pad(centred, (0, rows * NESTED_BLOCKSIZE - blocks))
    padded = padded.view(rows, NESTED_BLOCKSIZE)
    largest = padded.abs().amax(dim=1)

    # bitsandbytes rounds to one of 65,536 points in [-1, 1] and stores the map's value nearest to
    # that point. A block of zeros gives 0 * inf = NaN, which its conversion to integer makes 0.
    unit = (padded * (1.0 / largest).view(-1, 1)).nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    point = (unit + 1.0).mul_(0.5).mul_(float(GRID_POINTS - 1)).add_(0.5).to(torch.int32)
    code = dynamic_code(scales.device)
    quantised = nearest_code(point, code).view(-1)[:blocks].clone()
    return quantised.to(device), largest.to(device), code.to(device), offset.to(device)


def mean_of_scales(scales: Tensor, name: str) -> Tensor:
    """Return the offset of double quantisation, float32 ``[]``.

    The sum is in PyTorch's order on one thread, that of bitsandbytes there. On several threads its
    last bit depends on how many there are: one base would have other bits on another machine.

    Args:
        scales: float32 ``[blocks]``, on the CPU: a sum in another order has other last bits.
        name: What error messages call the tensor that they scale.

    Raises:
        NonFiniteError: As :func:`quantize_absmax`.
    """
    with _one_thread():
        offset = scales.mean()
    if scales.numel() and has_values(offset) and not bool(torch.isfinite(offset)):
        raise NonFiniteError(
            f"'{name}' is too large for double quantisation: the sum of its {scales.numel()} "
            "scales is infinite in float32; use double_quant=False"
        )
    return offset


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def nearest_code(point: Tensor, code: Tensor) -> Tensor:
    """Return the indices of the map's values nearest to points of the grid.

    Args:
        point: int32, any shape, 0 for -1 up to ``GRID_POINTS - 1`` for 1.
        code: The map, float32 ``[256]``.

    Returns:
        uint8, the shape of ``point``.
    """
    middles = (code[:-1].double() + code[1:].double()) / 2
    value = point.double() / (GRID_POINTS - 1) * 2 - 1
    return torch.bucketize(value, middles, out_int32=True).to(torch.uint8)


class CentroidSearch:
    """Finds the nearest centroid of each number; a tie goes to the lower one.

    The answer is how many of the 15 midpoints are smaller than the number. [-1, 1] is cut into
    cells so small that none holds two midpoints: a table tells how many lie in the cells before,
    and the one in the number's own cell is compared. That is exact, since a number's cell is a
    monotonic function of it, and midpoints get their cells from the same function.
    """

    def __init__(self, device: torch.device) -> None:
        code = nf4_code("cpu" if device.type == "meta" else device)
        middles = ((code[:-1] + code[1:]) / 2).to(device)
        cells = torch.arange(_CELLS + 1, dtype=torch.int32, device=device).view(-1, 1)
        cell_of_middle = self._cell(middles)
        self.before = (cell_of_middle < cells).sum(dim=1).to(torch.uint8)
        inside = torch.where(cell_of_middle == cells, middles, torch.inf)
        self.middle = inside.amin(dim=1)

    @staticmethod
    def _cell(values: Tensor) -> Tensor:
        return (values + 1.0).mul_(_CELLS / 2).to(torch.int32)

    def __call__(self, values: Tensor) -> Tensor:
        """Return uint8 indices of float32 ``values`` ``[n]`` in [-1, 1] up to rounding."""
        cell = self._cell(values)
        above = values > self.middle.index_select(0, cell)
        return self.before.index_select(0, cell).add_(above)


def pack(index: Tensor, out: Tensor) -> None:
    """Write pairs of uint8 indices into bytes, the even one in the high nibble."""
    torch.add(index[1::2], index[::2], alpha=16, out=out)


def _check_finite(largest: Tensor, weight: Tensor, name: str) -> None:
    """Refuse a weight if one of these largest magnitudes is NaN or infinite.

    Asked before a centroid is looked up: NaN has no place in the search's table.
    """
    if has_values(largest) and not bool(torch.isfinite(largest).all()):
        raise non_finite(weight, name)


def non_finite(weight: Tensor, name: str) -> NonFiniteError:
    """Count the values that are not finite, name the first, build the error."""
    flat, size = weight.reshape(-1), _CPU_PIECE
    nans, infinities, first = 0, 0, -1
    for start in range(0, flat.numel(), size):
        piece = flat[start : start + size]
        bad = ~torch.isfinite(piece)
        if first < 0 and bool(bad.any()):
            first = start + int(bad.to(torch.uint8).argmax())
        nan = int(piece.isnan().sum())
        nans += nan
        infinities += int(bad.sum()) - nan
    position = []
    rest = first
    for length in reversed(weight.shape):
        position.insert(0, rest % length)
        rest //= length
    counts = [f"{n} {what}" for n, what in ((nans, "NaN"), (infinities, "infinite")) if n]
    return NonFiniteError(
        f"'{name}' cannot be quantised: {' and '.join(counts)} of {flat.numel()} values "
        f"in shape {list(weight.shape)}, the first at {position}; all must be finite"
    )
