"""From named tensors to frozen weights, one tensor at a time."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch

from ladder_kernels.errors import CheckpointError, ConfigError
from ladder_kernels.memory.placement import ON_DEVICE, Placement
from ladder_kernels.memory.streaming import LayerLayout, LayerStream, PackedWeight
from ladder_kernels.models.backbone import Quantization
from ladder_kernels.models.calibration import LayerInputs
from ladder_kernels.models.fingerprint import combine, digest_float, digest_nf4
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.nf4.quantize import has_values
from ladder_kernels.nn.linear import FrozenLinear, NF4Linear

__all__ = [
    "DigestsTakenWarning",
    "PackedSource",
    "TensorSource",
    "UnusedTensorsWarning",
    "WeightReader",
]

# Buffers that old checkpoints stored although they follow from the configuration.
_DERIVED = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias)$")


class UnusedTensorsWarning(UserWarning):
    """A checkpoint holds tensors for which the architecture has no use."""


class DigestsTakenWarning(UserWarning):
    """Files do not say the digests of their weights, so all of them are read once before training.

    ``ladder-kernels quantize`` writes files that do.
    """


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

    def mapped(self, name: str) -> torch.Tensor | None:
        """A float tensor as it lies in a file, to be kept and not written to; ``None`` without."""
        ...


@runtime_checkable
class PackedSource(Protocol):
    """A source whose tensors lie in files, from which they can be read at any time."""

    def digest(self, name: str) -> bytes:
        """The digest of a float tensor."""
        ...

    def packed(self, name: str) -> PackedWeight:
        """Where a quantised tensor lies."""
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
        placement: What of them shall be elsewhere.
        base_prefix: What a checkpoint of the bare model leaves out of the names (``model``).
        aliases: Beginnings of names that differ: (in ``shapes``, in the source).
        tied: Names that the source may hold but that are the same tensor as another.

    Attributes:
        stream: What brings the layers to the device; see :meth:`stream_layers`.

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
        placement: Placement = ON_DEVICE,
        base_prefix: str = "model",
        aliases: tuple[tuple[str, str], ...] = (),
        tied: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.quantization = quantization
        self.dtype = dtype
        self.device = device
        self.placement = placement
        self.stream: LayerStream | None = None
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

    def stream_layers(self, layers: Sequence[Sequence[str]]) -> None:
        """Let the quantised weights of layers wait outside the device.

        Linear layers that a checkpoint has in float on purpose stay on the device.

        Args:
            layers: Names of the linear layers' weights, for each layer.

        Raises:
            ConfigError: If they shall be read from files, and none of them are quantised there.
        """
        from_files = self.placement.weights == "streamed" and self._has_values()
        found = self.source.shapes()
        there = [[name for name in names if found[self._names[name]] is None] for names in layers]
        if from_files and not (any(there) and isinstance(self.source, PackedSource)):
            raise ConfigError(
                f"weights: found 'streamed', but {self.source.where} holds no NF4 weights in "
                f"safetensors files; 'ladder-kernels quantize {self.source.where} FOLDER' writes "
                "a folder from which they can be streamed"
            )
        chosen = there if from_files or self.source.prequantized else layers
        layouts = [LayerLayout([self._packed(name) for name in names]) for names in chosen]
        if from_files and any(w.digest is None for each in layouts for w in each.weights.values()):
            warnings.warn(
                f"{self.source.where} does not say the digests of its weights, so all of them are "
                "read once to take them; 'ladder-kernels quantize' writes files that do",
                DigestsTakenWarning,
                stacklevel=2,
            )
        self.stream = LayerStream(layouts, self.device, from_files=from_files)

    def _has_values(self) -> bool:
        return has_values(torch.empty(0, device=self.device))

    def _packed(self, name: str) -> PackedWeight:
        own = self._names[name]
        if self.source.shapes()[own] is None:
            if isinstance(self.source, PackedSource):
                return replace(self.source.packed(own), name=name)
            value = self.source.read(own)
        else:
            value = torch.empty(self._shapes[name], device="meta")
        template = value if isinstance(value, NF4Weight) else self._quantize(name, value, None)
        return PackedWeight(name, template, {})

    def _read(self, name: str) -> torch.Tensor | NF4Weight:
        if self.stream is not None and self.stream.from_files and name in self.stream:
            return self.stream.weight(name)
        value = self.source.read(self._names[name])
        return value if isinstance(value, NF4Weight) else value.detach()

    def _keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self._digests[name] = digest_float(tensor)
        return tensor.to(device=self.device, dtype=self.dtype, copy=True).contiguous()

    def _keep_nf4(self, name: str, weight: NF4Weight) -> NF4Weight:
        if self.stream is None or name not in self.stream:
            self._digests[name] = digest_nf4(weight)
            return weight.to(self.device)
        if self.stream.from_files:
            self._digests[name] = self.stream.digest(name)
            return weight
        self._digests[name] = digest_nf4(weight)
        return self.stream.store(name, weight)

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
        return self._keep(name, self._float(name))

    def host_tensor(self, name: str) -> torch.Tensor:
        """A float tensor on the host.

        Returns:
            As it lies in its file, in the file's dtype and not to be written to; a copy in the
            compute dtype if it does not lie in one.
        """
        mapped = self.source.mapped(self._names[name])
        if mapped is not None:
            self._digests[name] = self._digest_of_mapped(name, mapped)
            return mapped
        value = self._float(name)
        self._digests[name] = digest_float(value)
        return value.to(device="cpu", dtype=self.dtype, copy=True).contiguous()

    def _digest_of_mapped(self, name: str, tensor: torch.Tensor) -> bytes:
        if isinstance(self.source, PackedSource):
            return self.source.digest(self._names[name])
        return digest_float(tensor)

    def _float(self, name: str) -> torch.Tensor:
        value = self._read(name)
        if isinstance(value, NF4Weight):
            raise CheckpointError(
                f"'{name}' in {self.source.where} is quantised; only linear layers may be"
            )
        return value

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
                return self._float_head(name, value)
            value = self._quantize(name, value, inputs)
        else:
            self._check_shape(name, value.shape, self._shapes[source_name])
        return self._keep_nf4(name, value)

    def _float_head(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A float head that is not the embeddings: with them on the host, where they are."""
        if self.placement.embeddings == "host" and self.device.type == "cpu":
            mapped = self.source.mapped(self._names[name])
            if mapped is not None and mapped.dtype == self.dtype:
                self._digests[name] = self._digest_of_mapped(name, mapped)
                return mapped
        return self._keep(name, value)

    def fingerprint(self, fields: Mapping[str, Any]) -> str:
        """The fingerprint of everything read so far and of the given configuration fields."""
        return combine(self._digests, fields)


def _some(names: list[str], most: int = 3) -> str:
    """The first few names, for a message of one line."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
