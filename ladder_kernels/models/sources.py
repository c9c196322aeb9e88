"""Where tensors come from: safetensors files, float or of bitsandbytes, and models in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ladder_kernels.errors import CheckpointError, MissingFileError, UnsupportedModelError
from ladder_kernels.memory.streaming import Extent, PackedWeight
from ladder_kernels.memory.tensor_file import TensorFile
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.checkpoint import (
    from_state_dict,
    is_quantized,
    state_keys,
    tensor_keys,
)

__all__ = ["EmptySource", "ModuleSource", "SafetensorsSource", "read_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A json file with an object in it.

    Raises:
        MissingFileError: If there is no such file.
        CheckpointError: If it is not valid json, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"'{path}' does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not valid json: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{path}' must hold a json object, it holds a {type(content).__name__}"
        )
    return content


class SafetensorsSource:
    """The safetensors files of a model folder.

    Args:
        folder: With ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.
        prequantized: Whether the checkpoint is quantised, so that its float layers stay float.

    Raises:
        MissingFileError: If the folder holds no safetensors, or lacks a shard.
        CheckpointError: If a file is truncated or corrupt.
    """

    def __init__(self, folder: Path, *, prequantized: bool = False) -> None:
        self.where = str(folder)
        self.prequantized = prequantized
        self._files: dict[str, TensorFile] = {}
        self._shapes: dict[str, tuple[int, ...] | None] = {}
        self._last: TensorFile | None = None
        shapes: dict[str, tuple[int, ...]] = {}
        for path in _model_files(folder):
            file = TensorFile(path)
            for name, entry in file.entries.items():
                self._files[name] = file
                shapes[name] = entry.shape
        belongs_to_another: set[str] = set()
        for name in shapes:
            if is_quantized(name, shapes):
                belongs_to_another |= set(state_keys(name, shapes)) - {name}
                self._shapes[name] = None
        for name, shape in shapes.items():
            if name not in belongs_to_another:
                self._shapes.setdefault(name, shape)

    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """Shape of every tensor by name; ``None`` for those that are quantised."""
        return self._shapes

    def read(self, name: str) -> torch.Tensor | NF4Weight:
        """One tensor; a view of the file unless it is quantised."""
        if self._shapes[name] is not None:
            return self._tensor(name)
        # Copied out of the mapped file, or each would keep the whole file mapped.
        tensors = {key: self._tensor(key).clone() for key in state_keys(name, self._files)}
        return from_state_dict(name, tensors)

    def mapped(self, name: str) -> torch.Tensor | None:
        """A float tensor as it lies in its file: pages of the file, not to be written to."""
        return self._files[name].mapped(name)

    def digest(self, name: str) -> bytes:
        """The digest of a float tensor, for which its file is read and not mapped."""
        return self._files[name].digest(name)

    def packed(self, name: str) -> PackedWeight:
        """Where a quantised tensor lies in its files.

        Raises:
            CheckpointError: If a part of it is missing or does not fit the others.
        """
        views = {key: self._files[key].mapped(key) for key in state_keys(name, self._files)}
        template = from_state_dict(name, views)
        extents = {}
        for field, key in tensor_keys(name, template).items():
            file = self._files[key]
            extents[field] = Extent(file.path, file.entries[key].offset)
        return PackedWeight(name, template, extents, self._files[name].digests.get(name))

    def _tensor(self, name: str) -> torch.Tensor:
        file = self._files[name]
        # One file at a time: its pages are given back when the next one is read.
        if self._last is not None and self._last is not file:
            self._last.unmap()
        self._last = file
        return file.mapped(name)


def _model_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in an order that reads each once."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"'{folder / INDEX}' has no weight_map")
        return [folder / name for name in sorted(set(shards.values()))]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    others = [
        p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.gguf"))
    ]
    hint = f"; it has {', '.join(sorted(others)[:3])}, which must be converted" if others else ""
    if others and others[0].endswith(".gguf"):
        hint = f"; it has {others[0]}: name that file, or give it as gguf_file"
    raise MissingFileError(f"'{folder}' holds neither {SINGLE} nor {INDEX}{hint}")


class ModuleSource:
    """A transformers model in memory, float or quantised by bitsandbytes.

    Args:
        model: A ``...ForCausalLM``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.where = f"the given {type(model).__name__}"
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self.prequantized = any(
            hasattr(parameter, "quant_state") for parameter in self._parameters.values()
        )
        for name, parameter in self._parameters.items():
            if type(parameter).__name__ == "Int8Params":
                raise UnsupportedModelError(
                    f"'{name}' is quantised to 8 bits by bitsandbytes; only its nf4 can be used"
                )

    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """Shape of every tensor by name; ``None`` for those that are quantised."""
        return {
            name: None if getattr(parameter, "quant_state", None) is not None else parameter.shape
            for name, parameter in self._parameters.items()
        }

    def read(self, name: str) -> torch.Tensor | NF4Weight:
        """One tensor of the model; quantised ones are copied."""
        parameter = self._parameters[name]
        state = getattr(parameter, "quant_state", None)
        if state is None:
            return parameter.detach().cpu()
        weight = NF4Weight.from_bitsandbytes(parameter.detach(), state).to("cpu")
        return replace(weight, **{key: value.clone() for key, value in weight.tensors().items()})

    def mapped(self, name: str) -> torch.Tensor | None:
        """Nothing: no tensor lies in a file."""
        return None


class EmptySource:
    """Tensors without values, for a model that is only traced.

    Args:
        shapes: Of every tensor, by name.
        device: Where they are: "meta", or any device within ``FakeTensorMode``.
        dtype: Of all of them.
    """

    prequantized = False

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.where = "a configuration"
        self._shapes = shapes
        self._device = device
        self._dtype = dtype

    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """Shape of every tensor by name."""
        return self._shapes

    def read(self, name: str) -> torch.Tensor | NF4Weight:
        """One tensor."""
        return torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)

    def mapped(self, name: str) -> torch.Tensor | None:
        """One tensor on the host; where nothing has a place, in no place."""
        place = self._device if self._device.type == "meta" else torch.device("cpu")
        return torch.empty(self._shapes[name], dtype=self._dtype, device=place)
