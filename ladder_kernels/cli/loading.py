"""The model that ``generate`` and ``evaluate`` run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ladder_kernels.errors import ConfigError, LadderKernelsError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ladder_kernels.models.modeling import LadderForCausalLM

__all__ = ["ModelOptions", "device_of", "load", "tokenizer_of"]


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to run, and where."""

    model: str = field(
        metadata={
            "help": "a saved ladder, or a base model: hub name, folder (safetensors, bitsandbytes "
            "NF4, GGUF) or GGUF file"
        }
    )
    base: str | None = _help("where a saved ladder's base is, if it has moved", None)
    gguf_file: str | None = _help("name of a GGUF file in the model's folder or repository", None)
    weights: str | None = _help(
        "where backbone weights live: resident (on the device), streamed (in the base's NF4 "
        "files, see 'quantize'; one layer after another is read) or host (in pinned memory beside "
        "a GPU); default resident",
        None,
    )
    embeddings: str | None = _help(
        "where the backbone's embeddings live: device, or host (in their file, where they lie in "
        "one); default host if weights are streamed, else device",
        None,
    )
    activations: str | None = _help(
        "how the backbone's NF4 layers take their inputs: exact, or int8 (rounded to 8 "
        "bits); default exact, or what a saved ladder was trained with",
        None,
    )
    dtype: str | None = _help(
        "compute dtype of the backbone; default float32 on a CPU, else bfloat16 or float16", None
    )
    device: str | None = _help("cpu, cuda ...; default a GPU where there is one", None)


def tokenizer_of(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of the model; if a saved ladder has none, that of the ``base`` given.

    Raises:
        LadderKernelsError: As :func:`~ladder_kernels.training.data.load_tokenizer` does.
    """
    from ladder_kernels.training.data import load_tokenizer

    try:
        return load_tokenizer(options.model, gguf_file=options.gguf_file)
    except LadderKernelsError:
        if options.base is None:
            raise
        return load_tokenizer(options.base)


def load(options: ModelOptions) -> tuple[LadderForCausalLM, bool]:
    """Load a saved ladder with its base, or a base model alone.

    Args:
        options: Which, and where to.

    Returns:
        The model, and whether its ladder was saved; if not, it is a placeholder, to be disabled.

    Raises:
        LadderKernelsError: As ``LadderForCausalLM.from_pretrained`` does.
    """
    from ladder_kernels.models.config import LadderConfig
    from ladder_kernels.models.modeling import LadderForCausalLM
    from ladder_kernels.models.pretrained import find_saved_ladder

    saved = options.gguf_file is None and find_saved_ladder(options.model) is not None
    model = LadderForCausalLM.from_pretrained(
        options.model,
        # The smallest that there is: it holds the place of one.
        ladder=None if saved else LadderConfig(rungs=((1,),), width=2, block="mlp"),
        base=options.base,
        gguf_file=options.gguf_file,
        weights=options.weights,
        embeddings=options.embeddings,
        activations=options.activations,
        dtype=options.dtype,
        device=device_of(options.device),
    )
    return model, saved


def device_of(name: str | None) -> torch.device:
    """The device of a name, by default a GPU where there is one.

    Raises:
        ConfigError: If there is none of that name here.
    """
    import torch

    gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    here = "cpu" + (f", cuda:0 to cuda:{gpus - 1}" if gpus else "; torch sees no GPU")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: found {name!r}; here there is {here}") from None
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= gpus
    ):
        raise ConfigError(f"device: found {name!r}; here there is {here}")
    return device
