"""The files of a saved ladder.

A saved ladder is a folder with ``model.safetensors`` (the ladder's parameters and nothing of the
base), ``config.json`` (:class:`~ladder_kernels.models.config.LadderModelConfig`) and
``generation_config.json``. The weights file also carries the configuration in its header, so that
weights and shape cannot come apart: if a save is cut between two renames, the header says what the
weights are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from ladder_kernels.errors import CheckpointError, MissingFileError, OutputExistsError
from ladder_kernels.models.config import LadderModelConfig

__all__ = [
    "CONFIG_FILE",
    "GENERATION_FILE",
    "WEIGHTS_FILE",
    "load_into",
    "read_weights",
    "save_ladder",
]

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

_HEADER_KEY = "ladder_config"
_IDENTITY = ("ladder", "base_fingerprint")
_NAMED_AT_MOST = 4


def save_ladder(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: LadderModelConfig,
    generation_config: GenerationConfig | None,
) -> None:
    """Write a saved ladder beside its place, then rename it there.

    A folder that does not exist or is empty appears whole. In one that holds other files those
    stay, and each file of an older saved ladder is replaced in one step, the weights first.

    Args:
        folder: Where to; made with its parents.
        weights: Parameters by name.
        config: Of the model.
        generation_config: ``None`` writes none.

    Raises:
        OutputExistsError: If ``folder`` is a file.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder}: found a file; a ladder is saved into a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.saving-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
        text = config.to_json_string()
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt", _HEADER_KEY: text})
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
        if generation_config is not None:
            generation_config.to_json_file(staging / GENERATION_FILE)
        for path in staging.iterdir():
            _sync(path)
        if folder.is_dir() and any(folder.iterdir()):
            for name in (WEIGHTS_FILE, CONFIG_FILE, GENERATION_FILE):
                if (staging / name).exists():
                    (staging / name).replace(folder / name)
            _sync(folder)
        else:
            staging.replace(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_weights(
    path: Path, config: LadderModelConfig
) -> tuple[dict[str, torch.Tensor], LadderModelConfig]:
    """Read a saved ladder's weights, and the configuration that they were saved with.

    Args:
        path: The weights file.
        config: Of the file beside it.

    Returns:
        The parameters by name on the CPU, and ``config``; or the configuration in the file's header
        if the two are of different ladders or bases, as after a save that was cut short.

    Raises:
        MissingFileError: If there is no such file.
        CheckpointError: If it is truncated or corrupt.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; a saved ladder needs it")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved: dict[str, Any] = json.loads(header.get(_HEADER_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt safetensors file ({error})") from error
    if any(saved.get(name, getattr(config, name)) != getattr(config, name) for name in _IDENTITY):
        config = LadderModelConfig.from_dict(saved)
    return weights, config


def load_into(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: Path) -> None:
    """Load parameters into ``module``; its dtype becomes theirs where they share one.

    Args:
        module: The model.
        weights: Parameters by name.
        source: The file that they come from, for messages.

    Raises:
        CheckpointError: If a tensor is missing, not known, or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not known" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        more = len(problems) - _NAMED_AT_MOST
        shown = "; ".join(problems[:_NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{source}: does not fit its configuration: {shown}")
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) == 1 and (dtype := dtypes.pop()).is_floating_point:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
    module.load_state_dict(dict(weights))
