"""Options of a training run: one flat record, from which flags and YAML keys come.

Nothing heavy is imported here, so that a command line can show its help at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladder_kernels.errors import ConfigError
from ladder_kernels.nn.slices import SMALLEST_SLICE
from ladder_kernels.training.formats import FORMATS

if TYPE_CHECKING:
    from ladder_kernels.models.config import LadderConfig

__all__ = ["REPORTERS", "SCHEDULES", "DataOptions", "TrainOptions", "check_freeing"]

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr")
"""Learning-rate schedules that the options name; a ``Trainer`` of one's own knows more."""

REPORTERS = ("none", "tensorboard")
"""Where metrics can go, besides the terminal."""


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


def _required(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where rows come from and how they become tokens.

    Raises:
        ConfigError: If ``format`` is unknown or ``limit`` is below 1.
    """

    source: str = _required(
        "jsonl, json, parquet, csv or txt file, a folder of those, a source tree, or a hub data set"
    )
    split: str = _help("split of a hub data set, or of a folder that has several", "train")
    format: str = _help(f"what the rows are: {', '.join(FORMATS)}", "auto")
    text_column: str = _help("format text: column of the documents", "text")
    prompt_column: str = _help("format completion: column of what is given", "prompt")
    completion_column: str = _help("format completion: column of what is learned", "completion")
    messages_column: str = _help("format chat: column of the messages", "messages")
    limit: int | None = _help("use the first so many rows only", None)
    pack: bool = _help("fill each row of tokens with whole documents, instead of padding", True)

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        if self.limit is not None:
            _at_least("limit", self.limit, 1)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that :func:`ladder_kernels.training.run.train` can be told.

    Each field is described in its metadata (``dataclasses.fields(TrainOptions)[i].metadata``,
    key ``"help"``). Fields that describe the ladder have the names of
    :class:`~ladder_kernels.models.config.LadderConfig`, ``output_kind`` excepted, its ``output``.

    Raises:
        ConfigError: If a value is not allowed; the message names the option, what was found and
            what may be.
    """

    model: str = _required(
        "base model: hub name, folder (safetensors, bitsandbytes NF4, GGUF) or GGUF file; "
        "or a saved ladder, which is trained further"
    )
    output: str = _required("folder for the trained ladder and its checkpoints; new or empty")

    data: str = _required(
        "training data: jsonl, json, parquet, csv or txt file, a folder of those, a source tree, "
        "or a hub data set"
    )
    eval_data: str | None = _help("held-out data, of the same kinds; default none", None)
    split: str = _help("split of the training data, where it has several", "train")
    eval_split: str = _help("split of the held-out data, where it has several", "validation")
    format: str = _help(f"what the rows are: {', '.join(FORMATS)}", "auto")
    text_column: str = _help("format text: column of the documents", "text")
    prompt_column: str = _help("format completion: column of what is given", "prompt")
    completion_column: str = _help("format completion: column of what is learned", "completion")
    messages_column: str = _help("format chat: column of the messages", "messages")
    limit: int | None = _help("use the first so many training rows only", None)
    eval_limit: int | None = _help("use the first so many held-out rows only", None)
    pack: bool = _help("fill each row of tokens with whole documents, instead of padding", True)
    context: int = _help("tokens a row", 2048)

    kind: str | None = _help(
        "how rungs are placed: auto (what learned best in the study, as far as the model allows), "
        "lst (one tap a rung, evenly spaced), xladder (the top layers, then rungs without taps), "
        "explicit or adapters (no rungs: adapters above the re-entry only); default auto when no "
        "option of the ladder is given, else explicit with rungs, lst without",
        None,
    )
    every: int | None = _help("lst: backbone layers from one rung to the next (default 1)", None)
    connected: int | None = _help(
        "xladder: rungs that tap the top layers, one each (default 4)", None
    )
    free: int | None = _help("xladder: rungs without taps above those (default 4)", None)
    rungs: tuple[tuple[int, ...], ...] | None = _help(
        "explicit: the layers that each rung taps, such as [[1], [2, 3], []]", None
    )
    reduction: int = _help("width of the backbone divided by the width of the ladder", 16)
    width: int | None = _help("width of the ladder; overrides reduction", None)
    tap: str = _help("what a rung reads of a layer: residual", "residual")
    merge: str = _help("how a tap meets the side stream: sum, gate or channel", "sum")
    temperature: float = _help("divides what the gate's sigmoid sees (merge gate, channel)", 0.1)
    output_kind: str = _help(
        "how the ladder's top meets the last state: residual, interpolate or side", "residual"
    )
    reentry: float = _help(
        "backbone layers, counted from the top, that come after the ladder (a number, or a share "
        "below 1 of all): its output is added to the residual stream before them, and gradients "
        "pass through them and no others",
        0,
    )
    adapter_rank: int = _help(
        "rank of low-rank adapters (LoRA) on every linear layer after the re-entry; 0 for none", 0
    )
    adapter_scale: float = _help("factor on what those adapters add (LoRA's alpha / rank)", 2.0)
    block: str = _help("kind of side block: transformer or mlp", "transformer")
    head_dim: int | None = _help("channels an attention head of the ladder; default fitting", None)
    mlp_ratio: float | None = _help(
        "width inside the ladder's MLP over its width; default the backbone's ratio", None
    )
    init: str = _help("initial weights: orthogonal, xavier, he or pruned", "xavier")
    eps: float = _help("added to the mean square in the ladder's norms", 1e-6)

    budget: str | None = _help(
        "memory that the run may take, such as 6GB: where weights, embeddings and taps live, tap "
        "dtype, slices, batch size, accumulation, checkpointing, optimizer and head are chosen so "
        "that it fits, as fast as it goes; options that are given stay (see 'plan')",
        None,
    )
    weights: str = _help(
        "where backbone weights live: resident (on the device), streamed (in the model's NF4 "
        "files, see 'quantize'; one layer after another is read) or host (in pinned memory beside "
        "a GPU)",
        "resident",
    )
    embeddings: str | None = _help(
        "where the backbone's embeddings live: device, or host (in their file, where they lie in "
        "one); default host if weights are streamed, else device",
        None,
    )
    taps: str = _help(
        "where taps wait between the two passes: device, host, or disk, where they are kept: rows "
        "that come again skip the base model",
        "device",
    )
    tap_dtype: str | None = _help(
        "what taps are kept in: bfloat16, float16, float32 or int8 (with a scale for each token); "
        "default bfloat16",
        None,
    )
    tap_cache: str | None = _help(
        "taps disk: folder that they are kept in, of this base alone, also for other runs; default "
        "one inside output, removed at the end of the run",
        None,
    )
    tap_cache_bytes: int | None = _help(
        "taps disk: most bytes of that folder; further rows are not kept; default no limit", None
    )
    activations: str | None = _help(
        "how the backbone's NF4 layers take their inputs: exact, or int8 (rounded to 8 bits; "
        "faster, a little different); default exact",
        None,
    )
    dtype: str | None = _help(
        "compute dtype of the backbone; default float32 on a CPU, else bfloat16 or float16", None
    )
    device: str | None = _help("cpu, cuda ...; default a GPU where there is one", None)
    gguf_file: str | None = _help("name of a GGUF file in the model's folder or repository", None)
    blocksize: int | None = _help("weights that share a scale in NF4 (default 64)", None)
    double_quant: bool | None = _help("quantise the scales too (default true)", None)
    quantize_head: bool | None = _help("quantise the output head too (default false)", None)
    gradient_checkpointing: bool = _help(
        "keep what enters each rung of the ladder, and each layer above a re-entry, and compute "
        "the rest again in the backward pass: less memory, a little more time, the same bits",
        False,
    )
    slice_tokens: int | None = _help(
        f"take so many tokens at a time through each frozen layer ({SMALLEST_SLICE} or more): less "
        "memory with long rows; default all at once",
        None,
    )
    bf16: bool = _help(
        "compute the ladder under bfloat16 autocast; its weights stay float32", False
    )

    epochs: float = _help("passes over the training data", 1.0)
    max_steps: int | None = _help("stop after so many optimizer steps; overrides epochs", None)
    batch_size: int = _help("rows a step and process", 1)
    gradient_accumulation: int = _help("micro-batches an optimizer step", 1)
    learning_rate: float = _help("largest learning rate", 2e-3)
    schedule: str = _help(f"of the learning rate: {', '.join(SCHEDULES)}", "cosine")
    warmup: float = _help("share of the steps, or from 1 on the number, of rising rate", 0.03)
    weight_decay: float = _help("decoupled weight decay", 0.0)
    max_grad_norm: float = _help("gradients are scaled down to this norm; 0 leaves them", 1.0)
    optimizer: str = _help(
        "one that transformers.TrainingArguments(optim=...) knows, such as adamw_torch_fused, "
        "adamw_8bit (its state in 8 bits, a quarter of the memory, on a CPU too; needs "
        "bitsandbytes), adafactor",
        "adamw_torch_fused",
    )
    free_gradients: bool = _help(
        "step each weight as soon as its gradient is whole, and free that: no two gradients wait "
        "for each other, the bits are the same; needs max_grad_norm 0 and a single process",
        False,
    )
    seed: int = _help("of initial weights and data order; the same seed gives the same bits", 0)

    logging_steps: int = _help("optimizer steps from one report to the next", 10)
    eval_steps: int | None = _help(
        "optimizer steps from one evaluation to the next; default at the end only", None
    )
    eval_base: bool = _help("with held-out data: evaluate the base model too, for comparison", True)
    eval_batch_size: int | None = _help("rows a step in evaluation; default batch_size", None)
    save_steps: int | None = _help(
        "optimizer steps from one checkpoint to the next; default none but the final ladder", None
    )
    save_total_limit: int | None = _help("keep the newest so many checkpoints; default all", None)
    resume: bool = _help("go on from the newest whole checkpoint in output", False)
    checkpoint: str | None = _help("with resume: go on from this checkpoint folder instead", None)
    report_to: str = _help(f"where metrics go besides: {' or '.join(REPORTERS)}", "none")
    progress: bool = _help("show progress on the terminal (plain lines elsewhere)", True)

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("report_to", self.report_to, REPORTERS)
        for name in (
            "context", "batch_size", "gradient_accumulation", "logging_steps", "limit",
            "eval_limit", "max_steps", "eval_batch_size", "eval_steps", "save_steps",
            "save_total_limit", "tap_cache_bytes",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                _at_least(name, value, 2 if name == "context" else 1)
        _at_least("seed", self.seed, 0)
        if self.free_gradients:
            check_freeing(self.max_grad_norm)
        if self.slice_tokens is not None:
            _at_least("slice_tokens", self.slice_tokens, SMALLEST_SLICE)
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            _number(name, getattr(self, name), above=False)
        for name in ("learning_rate", "epochs"):
            _number(name, getattr(self, name), above=True)
        if self.eval_steps is not None and self.eval_data is None:
            raise ConfigError(f"eval_steps: found {self.eval_steps}, but there is no eval_data")
        if self.checkpoint is not None and not self.resume:
            raise ConfigError(
                f"checkpoint: found {self.checkpoint!r}, but resume is off; it says where to resume"
            )
        for name in ("tap_cache", "tap_cache_bytes"):
            value = getattr(self, name)
            if value is not None and self.taps != "disk":
                raise ConfigError(f"{name}: found {value!r}, but taps is {self.taps!r}, not 'disk'")

    @property
    def output_folder(self) -> Path:
        """``output`` as a path."""
        return Path(self.output).expanduser()

    @property
    def tap_cache_folder(self) -> Path | None:
        """Where taps are kept; ``None`` unless they wait on disk."""
        if self.taps != "disk":
            return None
        return self.output_folder / "taps" if self.tap_cache is None else Path(self.tap_cache)

    def data_options(self) -> DataOptions:
        """The training data's options."""
        return self._data(self.data, self.split, self.limit)

    def eval_data_options(self) -> DataOptions | None:
        """The held-out data's options; ``None`` without any."""
        if self.eval_data is None:
            return None
        return self._data(self.eval_data, self.eval_split, self.eval_limit)

    def _data(self, source: str, split: str, limit: int | None) -> DataOptions:
        shared = {
            name: getattr(self, name)
            for name in (
                "format", "text_column", "prompt_column", "completion_column", "messages_column",
                "pack",
            )
        }  # fmt: skip
        return DataOptions(source=source, split=split, limit=limit, **shared)

    def ladder_config(self) -> LadderConfig:
        """The ladder's shape.

        Raises:
            ConfigError: If a field of it is not allowed.
        """
        from ladder_kernels.models.config import LadderConfig

        if not self.changed_ladder_fields():
            return LadderConfig.recommended(seed=self.seed)
        own = {f.name for f in fields(self)}
        values = {
            f.name: getattr(self, f.name)
            for f in fields(LadderConfig)
            if f.name in own - {"output"}
        }
        return LadderConfig(output=self.output_kind, **values)

    def changed_ladder_fields(self) -> list[str]:
        """Options of the ladder's shape that were set, by name."""
        from ladder_kernels.models.config import LadderConfig

        shape = {f.name for f in fields(LadderConfig)} - {"output", "seed"} | {"output_kind"}
        return [
            f.name for f in fields(self) if f.name in shape and getattr(self, f.name) != f.default
        ]


def check_freeing(max_grad_norm: float) -> None:
    """Refuse to free gradients one by one where they are scaled by the norm of all.

    Args:
        max_grad_norm: As in :class:`TrainOptions`.

    Raises:
        ConfigError: If it is not 0.
    """
    if max_grad_norm:
        raise ConfigError(
            f"free_gradients: found True with max_grad_norm {max_grad_norm}, but a norm needs all "
            "gradients at once; allowed is max_grad_norm 0"
        )


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: found {value!r}; allowed are {', '.join(allowed)}")


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: found {value!r}; it must be a whole number, {least} or more")


def _number(name: str, value: object, *, above: bool) -> None:
    fits = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (value > 0 if above else value >= 0)
    )
    if not fits:
        limit = "above 0" if above else "0 or more"
        raise ConfigError(f"{name}: found {value!r}; it must be a number {limit}")
