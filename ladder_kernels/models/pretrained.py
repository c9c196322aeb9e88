"""Where a ladder model's parts come from: names, folders, options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from ladder_kernels.errors import BaseMismatchError, CheckpointError, ConfigError, MissingFileError
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.checkpoint import CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE
from ladder_kernels.models.config import FLOAT_DTYPES, LadderModelConfig

__all__ = [
    "SavedLadder",
    "check_as_placed",
    "check_fingerprint",
    "check_options",
    "compute_dtype_of",
    "find_saved_ladder",
    "generation_config_of",
    "load_base",
    "load_base_of",
]

COMPUTE_DTYPES = {**FLOAT_DTYPES, "float64": torch.float64}

# What AutoModelForCausalLM and callers of transformers pass along, and means nothing here.
_HARMLESS = (
    "trust_remote_code", "adapter_kwargs", "use_safetensors", "low_cpu_mem_usage",
)  # fmt: skip


@dataclass(frozen=True)
class SavedLadder:
    """A saved ladder that was found.

    Attributes:
        config: From its ``config.json``.
        weights: Its weights file.
    """

    config: LadderModelConfig
    weights: Path


def check_as_placed(backbone: Backbone, weights: str | None, embeddings: str | None) -> None:
    """Refuse to place the weights of a backbone otherwise than it was loaded.

    Args:
        backbone: In memory.
        weights: As its loader takes it, or ``None`` for wherever they are.
        embeddings: The same.

    Raises:
        ConfigError: Naming where they are.
    """
    for name, value in (("weights", weights), ("embeddings", embeddings)):
        found = getattr(backbone.placement, name)
        if value not in (None, found):
            raise ConfigError(
                f"{name}: found {value!r}, but the given backbone was loaded with {name}="
                f"{found!r}; load it otherwise (load_backbone), or leave the option out"
            )


def check_options(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse options of ``from_pretrained`` that would be ignored.

    Raises:
        ConfigError: Naming the first.
    """
    if arguments:
        raise ConfigError(
            f"from_pretrained: found {len(arguments) + 1} positional arguments; allowed is one, "
            "the name or path"
        )
    for name, value in options.items():
        if value is not None and not name.startswith("_") and name not in _HARMLESS:
            raise ConfigError(
                f"from_pretrained: found unknown option {name!r}; its documentation lists those "
                "that there are"
            )


def find_saved_ladder(name: str, revision: str | None = None) -> SavedLadder | None:
    """Look whether ``name`` is a saved ladder.

    Args:
        name: Folder or hub name.
        revision: Branch, tag or commit on the hub.

    Returns:
        The ladder, or ``None`` if ``name`` is anything else, existing or not.

    Raises:
        CheckpointError: If its configuration cannot be read.
        MissingFileError: If it is a saved ladder without weights.
    """
    path = Path(name)
    if path.exists():
        file = path / CONFIG_FILE
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable JSON file ({error})") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: found a {type(values).__name__}; it must be an object")
        weights = path / WEIGHTS_FILE
    else:
        try:
            values, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        except (OSError, ValueError):
            return None
        weights = None
    if values.get("model_type") != LadderModelConfig.model_type:
        return None
    if weights is None:
        found = cached_file(
            name, WEIGHTS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if found is None:
            raise MissingFileError(f"{name}: no {WEIGHTS_FILE}; a saved ladder needs it")
        weights = Path(str(found))
    return SavedLadder(LadderModelConfig.from_dict(values), weights)


def load_base(
    name: str | os.PathLike[str],
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    quantization: Mapping[str, Any],
) -> Backbone:
    """Load a backbone; entries of ``quantization`` that are ``None`` take the loader's defaults."""
    from ladder_kernels.models.loading import load_backbone

    options = {key: value for key, value in quantization.items() if value is not None}
    return load_backbone(os.fspath(name), dtype=compute_dtype_of(dtype), device=device, **options)


def compute_dtype_of(value: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a name of :data:`COMPUTE_DTYPES` means; ``None`` for the device's default.

    Raises:
        ConfigError: If it is none of them.
    """
    if value is None or value == "auto":
        return None
    for name, dtype in COMPUTE_DTYPES.items():
        if value in (name, dtype):
            return dtype
    raise ConfigError(
        f"dtype: found {value!r}; allowed are 'auto', {', '.join(map(repr, COMPUTE_DTYPES))}"
    )


def load_base_of(
    config: LadderModelConfig,
    saved: SavedLadder,
    base: str | os.PathLike[str] | Backbone | None,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    quantization: Mapping[str, Any],
) -> Backbone:
    """The backbone of a saved ladder: as it names it, or ``base`` instead.

    Raises:
        ConfigError: If the ladder names none, or one that was calibrated in memory, and none is
            given.
    """
    if isinstance(base, Backbone):
        check_as_placed(base, quantization.get("weights"), quantization.get("embeddings"))
        return base
    if base is None and not config.base_name_or_path:
        raise ConfigError(
            "base: this ladder was saved from a base in memory and names none; give base=..."
        )
    calibrated = config.base_quantization.get("calibrated", False)
    if base is None and calibrated and quantization.get("calibration") is None:
        raise ConfigError(f"base: {_about_calibrated(config)}")
    options = {
        key: config.base_quantization.get(key) if value is None else value
        for key, value in quantization.items()
    }
    if base is not None:
        return load_base(base, dtype, device, options)
    name = config.base_name_or_path
    beside = saved.weights.parent / name
    if not Path(name).exists() and beside.exists():
        name = str(beside)
    return load_base(name, dtype, device, options)


def _about_calibrated(config: LadderModelConfig) -> str:
    """How to find the base of a ladder that was calibrated while it was loaded."""
    return (
        f"this ladder was trained on {config.base_name_or_path} as calibrated in memory, which "
        "another load does not repeat; save such a base before training, by 'ladder-kernels "
        "quantize' or backbone.save_pretrained(folder), and give that folder as base"
    )


def check_fingerprint(name: str, config: LadderModelConfig, backbone: Backbone) -> None:
    """Refuse a base that is not the one that a saved ladder was trained on.

    Raises:
        BaseMismatchError: Naming both.
    """
    if backbone.fingerprint != config.base_fingerprint:
        if config.base_quantization.get("calibrated", False):
            raise BaseMismatchError(
                f"{name}: found another base (fingerprint {backbone.fingerprint[:12]}, not "
                f"{config.base_fingerprint[:12]}): {_about_calibrated(config)}"
            )
        trained_on = config.base_name_or_path or "a base in memory"
        found = backbone.name_or_path or "a base in memory"
        raise BaseMismatchError(
            f"{name}: this ladder was trained on {trained_on} (fingerprint "
            f"{config.base_fingerprint[:12]}), "
            f"found {found} (fingerprint {backbone.fingerprint[:12]}); a ladder works on its own "
            "base only"
        )


def generation_config_of(name: str) -> GenerationConfig | None:
    """The generation settings that come with a model; ``None`` if there are none."""
    path = Path(name)
    if path.exists() and not (path / GENERATION_FILE).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(name)
    except (OSError, ValueError):
        return None
