"""The settings of a run that fit a budget of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladder_kernels.errors import ConfigError
from ladder_kernels.training.options import TrainOptions

if TYPE_CHECKING:
    from ladder_kernels.memory.planner import Plan

__all__ = ["within_budget"]

# Options of a run by what the planner calls them.
_CHOSEN = {
    "weights": "weights",
    "embeddings": "embeddings",
    "taps": "taps",
    "tap_dtype": "tap_dtype",
    "slice_tokens": "slice_tokens",
    "gradient_checkpointing": "recompute",
    "optimizer": "optimizer",
    "free_gradients": "free_gradients",
    "quantize_head": "quantize_head",
}
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit", "sgd": "sgd",
}  # fmt: skip
_WIDE = ("float32", "float64")


def within_budget(options: TrainOptions) -> tuple[TrainOptions, Plan]:
    """Choose what is not given so that a run fits its budget.

    Options that differ from their defaults stay. Rows of an optimizer step stay as many, whatever
    the size of a micro-batch.

    Args:
        options: With a budget.

    Returns:
        The options, without one, and what they take.

    Raises:
        ConfigError: If there is no budget, the model's configuration is not at hand, an optimizer's
            memory is not known, or the budget cannot be met; the message says what can.
        UnsupportedModelError: If the model's memory is not known beforehand.
    """
    from ladder_kernels.memory.planner import Planner, parse_bytes

    if options.budget is None:
        raise ConfigError("budget: found nothing; it must be a size such as 6GB")
    budget = parse_bytes(options.budget)
    config, quantization = _base(options)
    device = _device(options)
    float32 = options.dtype in _WIDE or (options.dtype is None and device == "cpu")
    planner = Planner(
        config,
        options.ladder_config(),
        device=device,
        context=options.context,
        rows=options.batch_size * options.gradient_accumulation,
        element=4 if float32 else 2,
        choices=_choices(options, quantization),
        documents=options.pack,
        clips=options.max_grad_norm > 0,
        blocksize=quantization.get("blocksize") or options.blocksize or 64,
        double_quant=options.double_quant is not False,
    )
    plan = planner.fastest(budget)
    chosen = plan.options()
    if options.optimizer != TrainOptions.optimizer:
        del chosen["optimizer"]  # it has several names
    return replace(options, budget=None, **chosen), plan


def _base(options: TrainOptions) -> tuple[Any, Mapping[str, Any]]:
    """The base's configuration, and how its checkpoint is quantised, if it is."""
    from transformers import AutoConfig

    from ladder_kernels.models.pretrained import find_saved_ladder

    if options.gguf_file is not None or Path(options.model).expanduser().is_file():
        raise ConfigError(
            "budget: a GGUF file says its model's shape only when it is read; allowed are folders "
            "and names on the hub (see 'quantize')"
        )
    if find_saved_ladder(options.model) is not None:
        raise ConfigError(
            f"budget: {options.model} is a saved ladder; allowed are base models. Give the options "
            "of memory themselves ('plan' says them)"
        )
    try:
        config = AutoConfig.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"budget: {options.model} has no readable config.json ({reason})"
        ) from None
    quantization = getattr(config, "quantization_config", None) or {}
    return config, quantization if isinstance(quantization, dict) else quantization.to_dict()


def _device(options: TrainOptions) -> str:
    import torch

    if options.device is not None:
        return torch.device(options.device).type
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choices(options: TrainOptions, quantization: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What is decided: options that are given, and what the checkpoint allows."""
    defaults = {field.name: field.default for field in fields(options)}
    choices: dict[str, tuple[Any, ...]] = {
        ours: (getattr(options, name),)
        for name, ours in _CHOSEN.items()
        if getattr(options, name) != defaults[name]
    }
    if "optimizer" in choices:
        known = _OPTIMIZERS.get(options.optimizer)
        if known is None:
            raise ConfigError(
                f"budget: the memory of optimizer {options.optimizer!r} is not known; allowed are "
                f"{', '.join(_OPTIMIZERS)}"
            )
        choices["optimizer"] = (known,)
    if not quantization and "weights" not in choices:
        # Only NF4 files can be streamed.
        choices["weights"] = ("resident", "host") if _device(options) == "cuda" else ("resident",)
    skipped = quantization.get("llm_int8_skip_modules")
    if quantization and skipped is not None and "lm_head" not in skipped:
        choices["quantize_head"] = (True,)
    return choices
