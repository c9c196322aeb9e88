"""Writing a frozen backbone so that transformers with bitsandbytes loads it.

Weights are written one after another, layer by layer: a backbone's, or those that are read and
quantised from any source without a backbone, so that a model needs no more memory than its largest
weight does. Such files can be streamed from (:mod:`ladder_kernels.memory.streaming`).
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ladder_kernels.errors import OutputExistsError
from ladder_kernels.memory.tensor_file import TensorFileWriter
from ladder_kernels.models.architecture import Architecture
from ladder_kernels.models.loading import reader_for
from ladder_kernels.models.sources import SINGLE
from ladder_kernels.nf4 import NF4Weight

if TYPE_CHECKING:
    from ladder_kernels.models.backbone import Backbone, Quantization
    from ladder_kernels.models.weights import TensorSource, WeightReader

__all__ = ["Saved", "Saves", "check_is_new", "new_folder", "quantize_model", "save_backbone"]

_EMBEDDINGS, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

Weights = Iterable[tuple[str, torch.Tensor | NF4Weight]]


class Saves(Protocol):
    """What writes files of its own into a folder: tokenizers, configurations of transformers."""

    def save_pretrained(self, save_directory: Any, /) -> Any:
        """Write the files."""
        ...


def check_is_new(folder: Path) -> None:
    """Refuse a folder that something would be lost or mixed in.

    Raises:
        OutputExistsError: If it is a file or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"'{folder}' exists already and is not an empty folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a folder beside the wanted one, which takes its place when the block ends without an
    error and is removed otherwise.

    Args:
        folder: To be made; an empty folder may exist.

    Raises:
        OutputExistsError: If it is a file or a folder that is not empty.
    """
    check_is_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@dataclass
class Saved:
    """What was written.

    Attributes:
        parameters: Weights of the model; quantised ones count as the matrices they stand for.
        nf4_bytes: Bytes of the quantised ones, scales included.
        double_quant: Whether their scales are quantised, ``None`` if there are none.
        quantized: Names of those in a transformers checkpoint.
        matrices: Names of the matrices that are not.
    """

    parameters: int = 0
    nf4_bytes: int = 0
    double_quant: bool | None = None
    quantized: list[str] = field(default_factory=list)
    matrices: list[str] = field(default_factory=list)

    def add(self, name: str, weight: torch.Tensor | NF4Weight) -> None:
        """Count a weight, by its name in a transformers checkpoint."""
        if isinstance(weight, NF4Weight):
            self.parameters += weight.numel
            self.nf4_bytes += weight.nbytes
            self.double_quant = weight.double_quant
            self.quantized.append(name)
        else:
            self.parameters += weight.numel()
            if weight.dim() == 2:
                self.matrices.append(name)


def save_backbone(backbone: Backbone, folder: Path, *others: Saves) -> Saved:
    """Write ``config.json`` and ``model.safetensors`` into a new folder.

    Args:
        backbone: To be saved.
        folder: To be made; an empty folder may exist.
        others: What else belongs to the model and goes into the folder: its tokenizer and so on.

    Returns:
        What was written.

    Raises:
        OutputExistsError: If the folder exists and is not empty.
    """
    names = [name for name, _ in backbone.described_weights()]
    with new_folder(folder) as beside:
        saved = _write_weights(beside, names, backbone.stored_weights())
        if saved.double_quant is None:
            saved.double_quant = backbone.quantization.double_quant
        _write_config(
            beside,
            backbone.config,
            backbone.dtype,
            double_quant=saved.double_quant,
            nf4_head=isinstance(backbone.head, NF4Weight),
            float_linears=backbone.float_linears(),
        )
        for other in others:
            other.save_pretrained(beside)
    return saved


def quantize_model(
    source: TensorSource,
    config: Any,
    folder: Path,
    *others: Saves,
    quantization: Quantization,
    dtype: torch.dtype,
) -> Saved:
    """Quantise a model weight by weight into a new folder; no more than one weight is held.

    The folder is that which :func:`save_backbone` writes of the same model, loaded.

    Args:
        source: Where its tensors are.
        config: Its transformers configuration, of a model type that runs natively.
        folder: To be made; an empty folder may exist.
        others: As for :func:`save_backbone`.
        quantization: How it is quantised, to the nearest values.
        dtype: Of what is not quantised.

    Returns:
        What was written.

    Raises:
        OutputExistsError: If the folder exists and is not empty.
        CheckpointError: If tensors are missing, or have another shape, or cannot be read.
        NonFiniteError: If a weight holds NaN or infinity.
    """
    architecture = Architecture.of(config)
    device = torch.device("cpu")
    reader = reader_for(config, architecture, source, quantization, dtype=dtype, device=device)
    tied = bool(config.tie_word_embeddings)
    with new_folder(folder) as beside:
        names = architecture.shapes(tied=tied and not quantization.quantize_head)
        saved = _write_weights(
            beside, names, _read_weights(architecture, reader, quantization, tied)
        )
        if saved.double_quant is None:
            saved.double_quant = quantization.double_quant
        nf4_head = _HEAD in saved.quantized
        float_linears = [each for each in saved.matrices if each != _EMBEDDINGS]
        if tied and not nf4_head:
            float_linears.append(_HEAD)
        _write_config(
            beside,
            config,
            dtype,
            double_quant=saved.double_quant,
            nf4_head=nf4_head,
            float_linears=[each.removesuffix(".weight") for each in float_linears],
        )
        for other in others:
            other.save_pretrained(beside)
    return saved


def _read_weights(
    architecture: Architecture, reader: WeightReader, quantization: Quantization, tied: bool
) -> Weights:
    """Every weight once, bottom first, read when it is asked for."""
    yield _EMBEDDINGS, reader.tensor(_EMBEDDINGS)
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}."
        for name, _, bias in architecture.linears().values():
            linear = reader.linear(prefix + name, bias=bias)
            yield f"{prefix}{name}.weight", linear.weight
            if linear.bias is not None:
                yield f"{prefix}{name}.bias", linear.bias
        for name, _ in architecture.norms().values():
            yield f"{prefix}{name}.weight", reader.tensor(f"{prefix}{name}.weight")
    yield _NORM, reader.tensor(_NORM)
    head = reader.head(
        _HEAD, shared_with=_EMBEDDINGS if tied else None, quantize=quantization.quantize_head
    )
    if head is not None:
        yield _HEAD, head


def _write_weights(folder: Path, names: Iterable[str], weights: Weights) -> Saved:
    saved = Saved()
    with TensorFileWriter(folder / SINGLE, names) as writer:
        for name, weight in weights:
            writer.add(name, weight)
            saved.add(name, weight)
    return saved


def _write_config(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    *,
    double_quant: bool,
    nf4_head: bool,
    float_linears: list[str],
) -> None:
    config = copy.deepcopy(config)
    config.dtype = str(dtype).removeprefix("torch.")
    if nf4_head:
        config.tie_word_embeddings = False
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": float_linears,
    }
    config.save_pretrained(folder)
