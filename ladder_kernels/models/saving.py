"""Writing a frozen backbone so that transformers with bitsandbytes loads it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ladder_kernels.errors import OutputExistsError
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.checkpoint import to_state_dict

if TYPE_CHECKING:
    from ladder_kernels.models.backbone import Backbone

__all__ = ["Saves", "check_is_new", "new_folder", "save_backbone"]


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


def save_backbone(backbone: Backbone, folder: Path, *others: Saves) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a new folder.

    Args:
        backbone: To be saved.
        folder: To be made; an empty folder may exist.
        others: What else belongs to the model and goes into the folder: its tokenizer and so on.

    Raises:
        OutputExistsError: If the folder exists and is not empty.
    """
    tensors: dict[str, torch.Tensor] = {}
    double_quant = backbone.quantization.double_quant
    for name, weight in backbone.stored_weights():
        if isinstance(weight, NF4Weight):
            tensors |= to_state_dict(name, weight)
            double_quant = weight.double_quant
        else:
            tensors[name] = weight
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    config = copy.deepcopy(backbone.config)
    dtype = str(backbone.dtype).removeprefix("torch.")
    config.dtype = dtype
    if isinstance(backbone.head, NF4Weight):
        config.tie_word_embeddings = False
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": backbone.float_linears(),
    }
    with new_folder(folder) as beside:
        config.save_pretrained(beside)
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        for other in others:
            other.save_pretrained(beside)
