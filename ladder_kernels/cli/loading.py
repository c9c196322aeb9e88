"""The model that ``generate`` and ``evaluate`` run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ladder_kernels.cli.hub import go_offline_without_hub

if TYPE_CHECKING:
    from ladder_kernels.models.modeling import LadderForCausalLM

__all__ = ["ModelOptions", "load"]


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
    dtype: str | None = _help(
        "compute dtype of the backbone; default float32 on a CPU, else bfloat16 or float16", None
    )
    device: str | None = _help("cpu, cuda ...; default a GPU where there is one", None)


def load(options: ModelOptions, *also: str) -> tuple[LadderForCausalLM, bool]:
    """Load a saved ladder with its base, or a base model alone.

    Args:
        options: Which, and where to.
        also: Other names that may be on the hub, such as a data set.

    Returns:
        The model, and whether its ladder was saved; if not, it is a placeholder, to be disabled.

    Raises:
        LadderKernelsError: As ``LadderForCausalLM.from_pretrained`` does.
    """
    go_offline_without_hub(options.model, options.base, *also)

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
        dtype=options.dtype,
        device=options.device,
    )
    return model, saved
