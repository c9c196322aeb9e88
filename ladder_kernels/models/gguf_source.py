"""Tensors and configuration of a GGUF file.

Its blocks are dequantised tensor by tensor; names and layouts come from transformers' own tables.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from ladder_kernels.errors import CheckpointError, MissingFileError, UnsupportedModelError
from ladder_kernels.models.gguf_file import KEPT, GGUFFile

__all__ = ["GGUFSource"]


class _Names:
    """A model without its submodules: transformers' function would ask each for its names again."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.state_dict = model.state_dict

    def named_children(self) -> tuple[()]:
        return ()


class GGUFSource:
    """A GGUF file as a source of float tensors.

    Args:
        path: The file.

    Attributes:
        config: The transformers configuration that the file's metadata describe.

    Raises:
        MissingFileError: If there is no such file.
        CheckpointError: If it is truncated or corrupt.
        UnsupportedModelError: If transformers cannot read files of this architecture.
    """

    prequantized = False

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        if not path.is_file():
            raise MissingFileError(f"'{path}' does not exist")
        try:
            self._file = GGUFFile(path)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"'{path}' is truncated or corrupt: {_line(error)}") from None
        self.architecture = str(self._field("general.architecture"))
        self._tensors = self._file.tensors
        self.config = self._configuration(path)
        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        self._processor = processor(config=self.config.to_dict())
        self._names: dict[str, str] = {}

    def _field(self, name: str) -> Any:
        return self._file.fields.get(name)

    def _configuration(self, path: Path) -> Any:
        try:
            fields = self._fields_in_transformers()
            config = AutoConfig.for_model(**fields)
        except Exception as error:
            raise UnsupportedModelError(
                f"'{path}' of architecture '{self.architecture}' cannot be read: {_line(error)}"
            ) from None
        head_dim = self._field(f"{self.architecture}.attention.key_length")
        if head_dim is not None and hasattr(config, "head_dim"):
            config.head_dim = int(head_dim)
        if self.architecture == "gemma2":
            # Not in the metadata: llama.cpp derives it, and knows the 27B model by its layers.
            wide = config.num_hidden_layers == 46
            config.query_pre_attn_scalar = (
                config.hidden_size // config.num_attention_heads if wide else config.head_dim
            )
        scaling = self._rope_scaling(config)
        if scaling:
            config.rope_parameters = {**config.rope_parameters, **scaling}
        return config

    def _fields_in_transformers(self) -> dict[str, Any]:
        """The configuration's fields, by transformers' table of them."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            header = Path(folder) / "header.gguf"
            header.write_bytes(self._file.without_tokenizer())
            fields = load_gguf_checkpoint(str(header), return_tensors=False)["config"]
        # Without a field of its own, transformers counts the tokens: here, those that were kept.
        if fields.get("vocab_size") == KEPT and self._file.vocabulary:
            fields["vocab_size"] = self._file.vocabulary
        return fields

    def _rope_scaling(self, config: Any) -> dict[str, Any]:
        """Rope scalings, which transformers' table of configuration fields leaves out."""
        context = config.max_position_embeddings
        original = self._field(f"{self.architecture}.rope.scaling.original_context_length")
        factors = {
            kind: self._float(f"rope_{name}.weight").tolist()
            for kind, name in (
                ("all", "freqs"),
                ("long", "factors_long"),
                ("short", "factors_short"),
            )
            if f"rope_{name}.weight" in self._tensors
        }
        if "all" in factors:
            # Fixed divisors of the frequencies (llama 3): a longrope that never changes over.
            return {
                "rope_type": "longrope",
                "short_factor": factors["all"],
                "long_factor": factors["all"],
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
            }
        if "long" in factors and "short" in factors:
            scaling = {
                "rope_type": "longrope",
                "short_factor": factors["short"],
                "long_factor": factors["long"],
                "original_max_position_embeddings": int(original or context),
            }
            attention = self._field(f"{self.architecture}.rope.scaling.attn_factor")
            return scaling | ({} if attention is None else {"attention_factor": float(attention)})
        kind = self._field(f"{self.architecture}.rope.scaling.type")
        factor = self._field(f"{self.architecture}.rope.scaling.factor")
        if kind in ("linear", "yarn") and factor is not None:
            scaling = {"rope_type": kind, "factor": float(factor)}
            if original is not None:
                scaling["original_max_position_embeddings"] = int(original)
            return scaling
        return {}

    def _float(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            return tensor.dequantize()
        except NotImplementedError:  # the gguf package's word for a kind that it does not know
            raise UnsupportedModelError(
                f"'{name}' in {self.where} has type {tensor.kind.name}, which cannot be read"
            ) from None

    def _map(self) -> dict[str, str]:
        """For each name in transformers, the name in the file."""
        if not self._names:
            config = copy.deepcopy(self.config)
            with init_empty_weights():
                model = AutoModelForCausalLM.from_config(config)
            theirs = get_gguf_hf_weights_map(_Names(model), self._processor)
            self._names = {ours: name for name, ours in theirs.items() if name in self._tensors}
        return self._names

    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """Shape of every tensor by its name in transformers."""
        return {ours: self._tensors[name].shape for ours, name in self._map().items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised to fp32."""
        theirs = self._map()[name]
        weights = self._processor.process(weights=self._float(theirs), name=theirs).weights
        return torch.from_numpy(np.require(weights, np.float32, ("C", "W")))

    def mapped(self, name: str) -> torch.Tensor | None:
        """Nothing: the blocks of a file are dequantised, and layouts differ."""
        return None


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
