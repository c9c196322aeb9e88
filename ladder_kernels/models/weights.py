"""From named tensors to frozen weights, one tensor at a time."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ladder_kernels.errors import CheckpointError
from ladder_kernels.models.backbone import Quantization
from ladder_kernels.models.calibration import LayerInputs
from ladder_kernels.models.fingerprint import combine, digest_float, digest_nf4
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.nf4.quantize import has_values
from ladder_kernels.nn.linear import FrozenLinear, NF4Linear

__all__ = ["TensorSource", "UnusedTensorsWarning", "WeightReader"]

# Buffers that old checkpoints stored although they follow from the configuration.
_DERIVED = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias)$")


class UnusedTensorsWarning(UserWarning):
    """A checkpoint holds tensors for which the architecture has no use."""


class TensorSource(Protocol):
    """Where a model's tensors come from.

    Attributes:
        where: The file or folder, for messages.
        prequantized: Whether float linear layers are float on purpose and must stay so.
    """

    where: str
    prequantized: bool

    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """Shape of every tensor by name; ``None`` for those that are quantised."""
        ...

    def read(self, name: str) -> torch.Tensor | NF4Weight:
        """One tensor on the CPU. It may be a view of a file: what is kept must be copied."""
        ...


class WeightReader:
    """Reads the weights of one model: quantises, casts, moves, and takes their fingerprint.

    Only the tensor at hand is ever held in float.

    Args:
        source: Where the tensors come from.
        shapes: The tensors that the architecture needs, by name.
        quantization: How to quantise.
        dtype: Compute dtype, for everything that stays float.
        device: Where the weights shall be.
        base_prefix: What a checkpoint of the bare model leaves out of the names (``model``).
        aliases: Beginnings of names that differ: (in ``shapes``, in the source).
        tied: Names that the source may hold but that are the same tensor as another.

    Raises:
        CheckpointError: If tensors are missing or have another shape.
    """

    def __init__(
        self,
        source: TensorSource,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        quantization: Quantization,
        dtype: torch.dtype,
        device: torch.device,
        base_prefix: str = "model",
        aliases: tuple[tuple[str, str], ...] = (),
        tied: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.quantization = quantization
        self.dtype = dtype
        self.device = device
        self._digests: dict[str, bytes] = {}
        self._in_float = False
        found = source.shapes()
        self._names: dict[str, str] = {}
        for name in shapes:
            candidates = [name, name.removeprefix(base_prefix + ".")]
            candidates += [
                theirs + name.removeprefix(ours)
                for ours, theirs in aliases
                if name.startswith(ours)
            ]
            self._names[name] = next((other for other in candidates if other in found), name)
        missing = [name for name in shapes if self._names[name] not in found]
        if missing:
            raise CheckpointError(
                f"{source.where} lacks {len(missing)} of the {len(shapes)} tensors that the model "
                f"needs: {_some(missing)}"
            )
        for name, shape in shapes.items():
            self._check_shape(name, found[self._names[name]], shape)
        self._shapes = shapes
        used = {*self._names.values(), *tied}
        unused = [name for name in found if name not in used and not _DERIVED.search(name)]
        if unused:
            warnings.warn(
                f"{source.where} holds {len(unused)} tensors that the model does not use: "
                f"{_some(unused)}",
                UnusedTensorsWarning,
                stacklevel=2,
            )

    def _check_shape(
        self, name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...]
    ) -> None:
        if found is not None and tuple(found) != tuple(wanted):
            raise CheckpointError(
                f"'{name}' in {self.source.where} has shape {list(found)}, the configuration asks "
                f"for {list(wanted)}"
            )

    def _read(self, name: str) -> torch.Tensor | NF4Weight:
        value = self.source.read(self._names[name])
        return value if isinstance(value, NF4Weight) else value.detach()

    def _keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self._digests[name] = digest_float(tensor)
        return tensor.to(device=self.device, dtype=self.dtype, copy=True).contiguous()

    def _keep_nf4(self, name: str, weight: NF4Weight) -> NF4Weight:
        self._digests[name] = digest_nf4(weight)
        return weight.to(self.device)

    def _quantize(self, name: str, tensor: torch.Tensor, inputs: LayerInputs | None) -> NF4Weight:
        settings = self.quantization
        if not has_values(tensor):
            return NF4Weight.empty(
                tuple(tensor.shape),
                blocksize=settings.blocksize,
                double_quant=settings.double_quant,
                dtype=tensor.dtype,
                device=tensor.device,
            )
        if inputs is None:
            return quantize_nf4(tensor, settings.blocksize, settings.double_quant, name=name)
        tensor = inputs.target(tensor.to(self.device))
        options = (settings.blocksize, settings.double_quant, inputs.moments)
        return quantize_nf4(tensor, *options, name=name)

    def in_float(self) -> WeightReader:
        """A reader of the same weights that quantises none and takes no fingerprint."""
        other = copy.copy(self)
        other._digests = {}
        other._in_float = True
        return other

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that stays float, copied, in the compute dtype and on the device."""
        value = self._read(name)
        if isinstance(value, NF4Weight):
            raise CheckpointError(
                f"'{name}' in {self.source.where} is quantised; only linear layers may be"
            )
        return self._keep(name, value)

    def linear(
        self,
        prefix: str,
        *,
        bias: bool,
        transposed: bool = False,
        inputs: LayerInputs | None = None,
    ) -> NF4Linear | FrozenLinear:
        """A linear layer, quantised unless the source keeps it in float on purpose.

        Args:
            prefix: Name without ``.weight`` and ``.bias``.
            bias: Whether it has one.
            transposed: Whether a float source stores ``[K, N]`` (a ``Conv1D`` of transformers).
            inputs: What it is to be quantised for.
        """
        name = f"{prefix}.weight"
        offset = self.tensor(f"{prefix}.bias") if bias else None
        value = self._read(name)
        if isinstance(value, NF4Weight):
            shape = self._shapes[name]
            self._check_shape(name, value.shape, shape[::-1] if transposed else shape)
            return NF4Linear(self._keep_nf4(name, value), offset)
        value = value.t() if transposed else value
        if self.source.prequantized or self._in_float:
            return FrozenLinear(self._keep(name, value), offset)
        value = self._quantize(name, value.contiguous(), inputs)
        return NF4Linear(self._keep_nf4(name, value), offset)

    def head(
        self,
        name: str,
        *,
        shared_with: str | None,
        quantize: bool,
        inputs: LayerInputs | None = None,
    ) -> torch.Tensor | NF4Weight | None:
        """The output head.

        Args:
            name: Of its tensor.
            shared_with: Name of the embedding when they are tied.
            quantize: Whether a float head shall be quantised.
            inputs: As for :meth:`linear`.

        Returns:
            ``[V, D]``, or ``None`` for a head that is the embedding itself.
        """
        if shared_with is not None and not quantize:
            return None
        source_name = shared_with or name
        value = self._read(source_name)
        if isinstance(value, torch.Tensor):
            if not quantize:
                return self._keep(name, value)
            value = self._quantize(name, value, inputs)
        else:
            self._check_shape(name, value.shape, self._shapes[source_name])
        return self._keep_nf4(name, value)

    def fingerprint(self, fields: Mapping[str, Any]) -> str:
        """The fingerprint of everything read so far and of the given configuration fields."""
        return combine(self._digests, fields)


def _some(names: list[str], most: int = 3) -> str:
    """The first few names, for a message of one line."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
