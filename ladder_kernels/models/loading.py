"""Frozen backbones from files, the hub, or a model in memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,  # type: ignore[reportPrivateImportUsage]
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ladder_kernels.errors import (
    CheckpointError,
    ConfigError,
    MissingFileError,
    UnsupportedModelError,
)
from ladder_kernels.memory.placement import ON_DEVICE, Placement
from ladder_kernels.models.architecture import FAMILIES, Architecture
from ladder_kernels.models.backbone import Backbone, Quantization
from ladder_kernels.models.calibration import check_rows
from ladder_kernels.models.gguf_source import GGUFSource
from ladder_kernels.models.hooked_backbone import HOOKED, HookedBackbone, empty_model
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.models.sources import (
    INDEX,
    SINGLE,
    EmptySource,
    ModuleSource,
    SafetensorsSource,
    read_json,
)
from ladder_kernels.models.weights import TensorSource, WeightReader
from ladder_kernels.nf4.quantize import has_values

__all__ = [
    "SUPPORTED_HOOKED",
    "SUPPORTED_NATIVE",
    "backbone_from_config",
    "backbone_from_transformers",
    "default_dtype",
    "load_backbone",
    "load_config",
    "open_model",
    "reader_for",
]

SUPPORTED_NATIVE: tuple[str, ...] = tuple(sorted(FAMILIES))
SUPPORTED_HOOKED: tuple[str, ...] = tuple(sorted(HOOKED))


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The compute dtype for a device: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_backbone(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    quantize_head: bool = False,
    gguf_file: str | None = None,
    calibration: Sequence[Sequence[int] | torch.Tensor] | None = None,
    weights: str = "resident",
    embeddings: str | None = None,
) -> Backbone:
    """Load a frozen backbone, quantising tensor by tensor.

    With ``calibration``, each linear layer is quantised for the inputs that these texts give it
    (:mod:`ladder_kernels.models.calibration`): less is lost, in the same format. It takes three
    minutes for SmolLM2-135M and 16,384 tokens on one CPU core, so keep the result:
    ``backbone.save_pretrained(folder)``, and load the folder. Another machine may round a few
    weights otherwise, and a ladder is for one base.

    Args:
        name_or_path: A folder with ``config.json`` and safetensors, float or quantised to nf4 by
            bitsandbytes; a GGUF file; or the name of a model on the hub.
        dtype: Compute dtype; see :func:`default_dtype`.
        device: Where the weights shall be; default the CPU.
        blocksize: Weights that share a scale, for weights quantised here.
        double_quant: Whether their scales are quantised too.
        quantize_head: Whether the output head is quantised as well.
        gguf_file: Name of a GGUF file in the folder or hub repository.
        calibration: Token ids of some texts, each a list or a 1-D tensor; 16 thousand tokens of
            what the model shall be good at are enough. For native backbones, from float weights.
        weights: Where the layers' weights are: "resident", on the device; "streamed", in the
            folder's files, from which one layer after another is read; or "host", in pinned memory
            beside a GPU, from which one after another is copied. Streamed weights must be NF4 in
            safetensors files, as :func:`~ladder_kernels.models.saving.quantize_model` writes them.
        embeddings: Where the embeddings are: "device", or "host", in their file if they lie in
            one, from which rows are gathered; default "host" if weights are streamed.

    Returns:
        The backbone.

    Raises:
        MissingFileError: If a file or folder does not exist, or the hub has or gives no such model.
        CheckpointError: If a file is truncated, corrupt, or lacks tensors.
        UnsupportedModelError: If the architecture or the quantisation is not supported, or cannot
            be calibrated.
        NonFiniteError: If a weight holds NaN or infinity.
        ConfigError: If an option is not allowed.
    """
    place = torch.device(device or "cpu")
    settings = Quantization(blocksize, double_quant, quantize_head, calibration is not None)
    placement = Placement.of(weights, embeddings)
    config, source = open_model(str(name_or_path), gguf_file)
    return _build(config, source, settings, dtype, place, str(name_or_path), calibration, placement)


def load_config(name_or_path: str | Path, *, gguf_file: str | None = None) -> Any:
    """The transformers configuration of a model, without its weights.

    Arguments and errors are those of :func:`load_backbone`.
    """
    return open_model(str(name_or_path), gguf_file)[0]


def open_model(name: str, gguf_file: str | None) -> tuple[Any, TensorSource]:
    """The configuration of a model, and where its tensors are.

    Arguments and errors are those of :func:`load_backbone`.
    """
    path = _resolve(name, gguf_file)
    if gguf_file is not None or path.is_file():
        gguf_source = GGUFSource(path)
        return gguf_source.config, gguf_source
    config, prequantized = _read_config(path)
    return config, SafetensorsSource(path, prequantized=prequantized)


def backbone_from_transformers(
    model: Any,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    quantize_head: bool = False,
    dtype: torch.dtype | None = None,
) -> Backbone:
    """Make a frozen backbone of a model in memory, which is left as it is.

    Args:
        model: A transformers ``...ForCausalLM``, float or quantised to nf4 by bitsandbytes.
        blocksize: Weights that share a scale, for weights quantised here.
        double_quant: Whether their scales are quantised too.
        quantize_head: Whether the output head is quantised as well.
        dtype: Compute dtype; default that of the model's device (see :func:`default_dtype`).

    Returns:
        The backbone, on the device of the model.

    Raises:
        UnsupportedModelError: If the architecture is not supported.
    """
    config = copy.deepcopy(model.config)
    config.quantization_config = None
    del config.quantization_config
    settings = Quantization(blocksize, double_quant, quantize_head)
    name = str(getattr(model.config, "_name_or_path", ""))
    return _build(config, ModuleSource(model), settings, dtype, model.device, name)


def backbone_from_config(
    config: Any,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    blocksize: int = 64,
    double_quant: bool = True,
    quantize_head: bool = False,
    weights: str = "resident",
    embeddings: str | None = None,
) -> Backbone:
    """A backbone whose weights have shapes and no values, to trace what a model would do.

    Args:
        config: A transformers configuration of a causal language model.
        device: "meta", or any device within ``FakeTensorMode``, such as that of
            :func:`~ladder_kernels.memory.tracing.fake_cuda`.
        dtype: Compute dtype.
        blocksize: Weights that share a scale.
        double_quant: Whether their scales are quantised too.
        quantize_head: Whether the output head is quantised as well.
        weights: Where the layers' weights are, as for :func:`load_backbone`; of streamed ones, and
            of those on the host, the device holds two slots.
        embeddings: Where the embeddings are, as there.

    Returns:
        The backbone. Its fingerprint is that of no other one.

    Raises:
        UnsupportedModelError: If the architecture is not supported.
        ConfigError: If tensors on the device have values: the weights would be garbage.
    """
    place = torch.device(device)
    if has_values(torch.empty(0, device=place)):
        raise ConfigError(
            f"device: found {str(place)!r}, where tensors have values; allowed are 'meta', and any "
            "device within FakeTensorMode"
        )
    _check_model_type(config.model_type, config.to_dict())
    if config.model_type in HOOKED:
        parameters = empty_model(config).named_parameters(remove_duplicate=False)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    else:
        shapes = Architecture.of(config).shapes(tied=bool(config.tie_word_embeddings))
    settings = Quantization(blocksize, double_quant, quantize_head)
    placement = Placement.of(weights, embeddings)
    source = EmptySource(shapes, place, dtype)
    return _build(config, source, settings, dtype, place, "", None, placement)


def _build(
    config: Any,
    source: TensorSource,
    settings: Quantization,
    dtype: torch.dtype | None,
    device: torch.device,
    name: str,
    calibration: Sequence[Sequence[int] | torch.Tensor] | None = None,
    placement: Placement = ON_DEVICE,
) -> Backbone:
    compute = dtype or default_dtype(device)
    _check_model_type(config.model_type, config.to_dict())
    placement.check_device(device)
    texts = None
    if calibration is not None:
        _check_calibrated(config.model_type, source)
        if placement != ON_DEVICE:
            raise ConfigError(
                "calibration: found texts, for which weights are rounded while all of them are at "
                "hand; allowed are weights='resident' and embeddings='device'"
            )
        texts = check_rows(
            calibration,
            vocab_size=config.vocab_size,
            max_context=getattr(config, "max_position_embeddings", None),
        )
    if config.model_type in HOOKED:
        _check_resident(config.model_type, placement)
        return HookedBackbone(
            config, source, quantization=settings, dtype=compute, device=device, name_or_path=name
        )
    architecture = Architecture.of(config)
    reader = reader_for(
        config, architecture, source, settings, dtype=compute, device=device, placement=placement
    )
    return NativeBackbone(
        config,
        architecture,
        reader,
        quantization=settings,
        name_or_path=name,
        calibration=texts,
    )


def reader_for(
    config: Any,
    architecture: Architecture,
    source: TensorSource,
    settings: Quantization,
    *,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement = ON_DEVICE,
) -> WeightReader:
    """A reader of the weights of a model of our own.

    Args:
        config: Its transformers configuration.
        architecture: The same, resolved.
        source: Where its tensors are.
        settings: How they are quantised.
        dtype: Compute dtype.
        device: Where the weights shall be.
        placement: What of them shall be elsewhere.

    Raises:
        CheckpointError: If tensors are missing or have another shape.
    """
    tied = bool(config.tie_word_embeddings)
    return WeightReader(
        source,
        shapes=architecture.shapes(tied=tied),
        quantization=settings,
        dtype=dtype,
        device=device,
        placement=placement,
        tied=("lm_head.weight",) if tied else (),
    )


def _check_resident(model_type: str, placement: Placement) -> None:
    """Refuse to place weights of transformers' layers elsewhere.

    Raises:
        UnsupportedModelError: If any of them shall not be on the device.
    """
    for name, value, allowed in (
        ("weights", placement.weights, "resident"),
        ("embeddings", placement.embeddings, "device"),
    ):
        if value != allowed:
            raise UnsupportedModelError(
                f"{name}: found {value!r}, but '{model_type}' runs on the layers of transformers; "
                f"allowed is '{allowed}', or one of {', '.join(SUPPORTED_NATIVE)}"
            )


def _check_calibrated(model_type: str, source: TensorSource) -> None:
    """Refuse a model that cannot be quantised for given inputs.

    Raises:
        UnsupportedModelError: If it is quantised already, or runs on transformers' layers.
    """
    if source.prequantized:
        raise UnsupportedModelError(
            f"calibration: {source.where} is quantised already; it needs float weights"
        )
    if model_type in HOOKED:
        raise UnsupportedModelError(
            f"calibration: '{model_type}' runs on the layers of transformers; allowed are "
            f"{', '.join(SUPPORTED_NATIVE)}"
        )


def _check_model_type(model_type: str, config: dict[str, Any]) -> None:
    """Refuse an architecture that has no backbone here, with the reason and what there is.

    Raises:
        UnsupportedModelError: If ``model_type`` is not supported.
    """
    if model_type in FAMILIES or model_type in HOOKED:
        return
    if config.get("is_encoder_decoder"):
        reason = "is an encoder-decoder"
    elif model_type not in CONFIG_MAPPING_NAMES:
        reason = "is not an architecture that transformers knows"
    elif model_type in ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"):
        reason = "keeps a recurrent state instead of attention"
    elif any("expert" in field for field in config):
        reason = "is a mixture of experts"
    elif model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = "is not a causal language model"
    else:
        reason = "is not supported"
    raise UnsupportedModelError(
        f"'{model_type}' {reason}; a ladder needs one of {', '.join(SUPPORTED_NATIVE)}, or, "
        f"slower, {', '.join(SUPPORTED_HOOKED)}"
    )


def _read_config(folder: Path) -> tuple[Any, bool]:
    """The configuration of a folder, and whether its checkpoint is quantised."""
    path = folder / "config.json"
    fields = read_json(path)
    if "model_type" not in fields:
        raise CheckpointError(f"'{path}' names no model_type")
    _check_model_type(fields["model_type"], fields)
    quantized = fields.pop("quantization_config", None)
    if quantized is not None:
        _check_quantization(str(path), quantized)
    try:
        return AutoConfig.for_model(**fields), quantized is not None
    except Exception as error:  # whatever a configuration class raises over a wrong value
        text = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"'{path}' is not a valid configuration: {text}") from None


def _check_quantization(where: str, config: dict[str, Any]) -> None:
    method = config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config else "unknown")
    found = f"quantised with {method}"
    if method == "bitsandbytes":
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            found = "quantised to 8 bits by bitsandbytes"
        elif config.get("bnb_4bit_quant_type", "fp4") != "nf4":
            found = "quantised to fp4 by bitsandbytes"
        else:
            return
    raise UnsupportedModelError(
        f"{where}: the checkpoint is {found}; allowed are float safetensors, bitsandbytes nf4 and "
        "GGUF"
    )


def _resolve(name: str, gguf_file: str | None) -> Path:
    """The folder or GGUF file that a name stands for, fetched from the hub if need be."""
    path = Path(name).expanduser()
    if path.is_file():
        if gguf_file is not None or path.suffix.lower() != ".gguf":
            raise CheckpointError(f"'{name}' is a file; allowed are a folder and a .gguf file")
        return path
    if path.is_dir():
        return path if gguf_file is None else path / gguf_file
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or ".gguf" in name:
        raise MissingFileError(f"'{name}' does not exist")
    return _fetch(name, gguf_file)


def _fetch(name: str, gguf_file: str | None) -> Path:
    """Bring a model of the hub into its cache and return its folder, or its GGUF file.

    Raises:
        MissingFileError: If the hub has no such model, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file))

    try:
        if gguf_file is not None:
            return fetch(gguf_file)
        config = fetch("config.json")
        try:
            index = fetch(INDEX)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not (config.parent / SINGLE).exists():
                raise
            fetch(SINGLE)
        else:
            for shard in _shards(index):
                fetch(shard)
    except LocalEntryNotFoundError:
        raise MissingFileError(
            f"'{name}' is not a folder here, and the hub cannot be reached to look for a model of "
            f"that name (offline?)"
        ) from None
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise MissingFileError(
            f"'{name}' is neither a folder nor a model that the hub gives out: {text}"
        ) from None
    return config.parent


def _shards(index: Path) -> Sequence[str]:
    return sorted(set(read_json(index).get("weight_map", {}).values()))
