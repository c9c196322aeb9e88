"""An NF4 tensor: the bits, their scales, and what is needed to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import quantize as reference
from ladder_kernels.nf4.calibrate import quantize_calibrated
from ladder_kernels.nf4.choice import kernels
from ladder_kernels.nf4.dequantize import dequantize_range, dequantize_scales
from ladder_kernels.nf4.quantize import NESTED_BLOCKSIZE, QUANTIZABLE, check_blocksize

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["NF4Weight", "quantize_nf4"]

_OUTPUTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_SCALES = ("absmax", "nested_absmax", "nested_code", "nested_offset")

# Elements that are dequantised at a time: beside the result, a few MB are held.
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A tensor in NF4, bit for bit as bitsandbytes stores it.

    Attributes:
        packed: uint8 ``[ceil(numel / 2)]``: two 4-bit indices a byte, row-major, the even element
            in the high nibble.
        absmax: The scale of each block, float32 ``[blocks]``; with double quantisation, uint8.
        shape: Logical shape, ``[N, K]`` for a linear layer.
        blocksize: Elements that share a scale: 32, 64, ..., 4096.
        dtype: Dtype of the tensor that was quantised.
        nested_absmax: Double quantisation only: float32 ``[ceil(blocks / 256)]``.
        nested_code: Double quantisation only: the 8-bit map, float32 ``[256]``.
        nested_offset: Double quantisation only: the mean of the scales, float32 ``[]``.

    Raises:
        ConfigError: The tensors do not fit the shape, the blocksize or each other.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        check_blocksize(self.blocksize)
        blocks = -(-self.numel // self.blocksize)
        _check("packed", self.packed, torch.uint8, ((self.numel + 1) // 2,))
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        if all(tensor is None for tensor in nested):
            _check("absmax", self.absmax, torch.float32, (blocks,))
        else:
            groups = -(-blocks // NESTED_BLOCKSIZE)
            _check("absmax", self.absmax, torch.uint8, (blocks,))
            _check("nested_absmax", self.nested_absmax, torch.float32, (groups,))
            _check("nested_code", self.nested_code, torch.float32, (256,))
            _check("nested_offset", self.nested_offset, torch.float32, ())
        for name in _SCALES:
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and tensor.device != self.packed.device:
                raise ConfigError(
                    f"{name} is on device {tensor.device}; it must be on {self.packed.device}, "
                    "as packed"
                )

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> NF4Weight:
        """Return a weight whose tensors are allocated and not filled.

        Args:
            shape: Logical shape.
            blocksize: Elements that share a scale: 32, 64, ..., 4096.
            double_quant: Whether the scales are themselves quantised.
            dtype: What it dequantises to by default.
            device: Where the tensors are; default PyTorch's.

        Raises:
            ConfigError: A blocksize that the format does not have.
        """
        check_blocksize(blocksize)
        numel = math.prod(shape)
        blocks = -(-numel // blocksize)

        def tensor(*sizes: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=of, device=device)

        packed = tensor((numel + 1) // 2, of=torch.uint8)
        if not double_quant:
            return cls(packed, tensor(blocks), shape, blocksize, dtype)
        nested = tensor(-(-blocks // NESTED_BLOCKSIZE)), tensor(256), tensor()
        return cls(packed, tensor(blocks, of=torch.uint8), shape, blocksize, dtype, *nested)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantised."""
        return self.nested_absmax is not None

    @property
    def numel(self) -> int:
        """Number of elements of the logical tensor."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are set, by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str | int) -> NF4Weight:
        """Return this weight with its tensors on ``device``; those already there are shared."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the logical tensor.

        Args:
            dtype: float16, bfloat16, float32 or float64 (the float32 result, widened); that of the
                quantised tensor if ``None``.

        Returns:
            ``shape``, a new contiguous tensor without gradient.
        """
        return self._elements(0, self.numel, dtype).view(self.shape)

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` (exclusive), reading only the bytes that hold them.

        Args:
            start: First row, ``0 <= start``.
            stop: One past the last row, ``start <= stop <= shape[0]``.
            dtype: As for :meth:`dequantize`.

        Returns:
            ``[stop - start, *shape[1:]]``, a new contiguous tensor without gradient. Its bits are
            those of ``dequantize(dtype)[start:stop]``, wherever the blocks begin.

        Raises:
            ConfigError: The tensor has no rows, or not those.
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise ConfigError(
                f"rows {start} to {stop} were asked of a tensor of shape {list(self.shape)}; "
                "0 <= start <= stop <= rows must hold"
            )
        width = 1
        for length in self.shape[1:]:
            width *= length
        values = self._elements(start * width, stop * width, dtype)
        return values.view(stop - start, *self.shape[1:])

    def _elements(self, start: int, stop: int, dtype: torch.dtype | None) -> Tensor:
        dtype = self.dtype if dtype is None else dtype
        if dtype not in _OUTPUTS:
            allowed = ", ".join(str(each).removeprefix("torch.") for each in _OUTPUTS)
            raise ConfigError(f"NF4 cannot be dequantised to {dtype}; it must be one of {allowed}")
        chosen = kernels(self.packed, dtype)
        if chosen is not None:
            return chosen.dequantize(self, start, stop, dtype)
        # One piece when traced: a compiler fuses it, and would unroll a loop.
        if stop - start <= _PIECE or torch.compiler.is_compiling():
            return self._piece(start, stop).to(dtype)
        out = torch.empty(stop - start, dtype=dtype, device=self.device)
        for first in range(start, stop, _PIECE):
            last = min(first + _PIECE, stop)
            out[first - start : last - start] = self._piece(first, last)
        return out

    def _piece(self, start: int, stop: int) -> Tensor:
        first = start // self.blocksize
        last = -(-stop // self.blocksize)
        if self.nested_absmax is None or self.nested_code is None or self.nested_offset is None:
            scales = self.absmax[first:last]
        else:
            nested = (self.nested_absmax, self.nested_code, self.nested_offset)
            scales = dequantize_scales(self.absmax, *nested, first, last)
        return dequantize_range(self.packed, scales, self.blocksize, start, stop, first_block=first)

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, quant_state: QuantState) -> NF4Weight:
        """Take over what ``bitsandbytes.functional.quantize_4bit`` returned, sharing its memory.

        Args:
            packed: The bytes in any ``quant_storage`` dtype, ``[n, 1]``, ``[1, n]`` or ``[n]``.
            quant_state: Its state; ``quant_type`` must be nf4.

        Raises:
            ConfigError: The state is not NF4, or does not fit the bytes.
        """
        from ladder_kernels.nf4.bitsandbytes import from_bitsandbytes

        return from_bitsandbytes(packed, quant_state)

    def to_bitsandbytes(
        self, quant_storage: torch.dtype = torch.uint8
    ) -> tuple[Tensor, QuantState]:
        """Return the bytes ``[n, 1]`` and the state that bitsandbytes' functions take.

        Args:
            quant_storage: Dtype that the bytes are viewed as.

        Raises:
            ConfigError: The bytes are not a whole number of ``quant_storage``, or bitsandbytes has
                no such dtype of weights.
        """
        from ladder_kernels.nf4.bitsandbytes import to_bitsandbytes

        return to_bitsandbytes(self, quant_storage)


def quantize_nf4(
    weight: Tensor,
    blocksize: int = 64,
    double_quant: bool = True,
    calibration: Tensor | None = None,
    *,
    name: str | None = None,
) -> NF4Weight:
    """Quantise a tensor to NF4, to the bits of ``bitsandbytes.functional.quantize_4bit`` on a CPU.

    Runs on the native kernels for a tensor on the CPU and on the Triton kernels for one on a GPU,
    unless ``use_backend`` says otherwise; they give the same bits.

    With ``calibration``, the format is the same and the bits are others: those with little error in
    ``x W^T`` for inputs ``x`` like those that the calibration comes from, by GPTQ (Frantar et al.
    2022, arXiv:2210.17323); see :mod:`ladder_kernels.nf4.calibrate`. That runs in PyTorch.

    Args:
        weight: Any shape, ``[N, K]`` for a linear layer; float32, bfloat16 or float16; finite.
        blocksize: Elements that share a scale: 32, 64, ..., 4096.
        double_quant: Quantise the scales too: 4.13 bits a parameter instead of 4.5, at blocksize
            64.
        calibration: Second moments of the layer's inputs, ``sum x x^T`` (of ``x`` as columns; for
            inputs ``[T, K]``, ``x.T @ x``) or any multiple of it: ``[K, K]``, float32 or float64,
            symmetric, positive semidefinite, undamped. ``None`` rounds to nearest.
        name: What error messages call the tensor.

    Returns:
        The quantised tensor, on the device of ``weight``, without gradient.

    Raises:
        NonFiniteError: The tensor holds NaN or infinity, or numbers so large that the sum of their
            scales does (with double quantisation).
        ConfigError: A dtype or blocksize that the format does not have; or ``weight`` is no matrix
            or ``calibration`` not what it must be.
        BackendError: The backend is "cpu" and there is no native library, or "triton" and there is
            no Triton.
    """
    name = "weight" if name is None else name
    if not isinstance(weight, Tensor):
        raise ConfigError(f"'{name}' is a {type(weight).__name__}; it must be a torch.Tensor")
    check_blocksize(blocksize)
    if weight.dtype not in QUANTIZABLE:
        allowed = ", ".join(str(each).removeprefix("torch.") for each in QUANTIZABLE)
        raise ConfigError(f"'{name}' has dtype {weight.dtype}; it must be one of {allowed}")
    shape = tuple(weight.shape)
    if calibration is not None:
        packed, absmax, nested = quantize_calibrated(
            weight.detach(), calibration, blocksize, double_quant, name=name
        )
        return NF4Weight(packed, absmax, shape, blocksize, weight.dtype, *(nested or ()))
    chosen = kernels(weight, weight.dtype) or reference
    packed, absmax = chosen.quantize_blocks(weight.detach(), blocksize, name=name)
    if not double_quant:
        return NF4Weight(packed, absmax, shape, blocksize, weight.dtype)
    absmax, *nested = chosen.quantize_absmax(absmax, name=name)
    return NF4Weight(packed, absmax, shape, blocksize, weight.dtype, *nested)


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that is not a contiguous one of this dtype and shape."""
    if tensor is None:
        raise ConfigError(f"{name} is missing; double quantisation needs all three nested tensors")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        contiguous = "" if tensor.is_contiguous() else "non-contiguous "
        raise ConfigError(
            f"{name} is {contiguous}{tensor.dtype} {list(tensor.shape)}; "
            f"it must be contiguous {dtype} {list(shape)}"
        )
