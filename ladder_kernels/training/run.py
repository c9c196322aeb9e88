"""A whole training run: from options to a saved ladder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladder_kernels.errors import ConfigError, MissingFileError, OutputExistsError
from ladder_kernels.training.budget import within_budget
from ladder_kernels.training.options import TrainOptions

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from ladder_kernels.models.modeling import LadderForCausalLM
    from ladder_kernels.training.evaluation import Perplexity

__all__ = ["TrainOptions", "TrainResult", "newest_checkpoint", "train"]

# Written last, so that a checkpoint that has a readable one is whole.
_STATE_FILE = "trainer_state.json"
_CHECKPOINT_FILES = (_STATE_FILE, "optimizer.pt", "scheduler.pt", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did.

    Attributes:
        steps: Optimizer steps, those before a resume included.
        tokens: Real tokens trained on, over all processes, those before a resume not included.
        tokens_per_second: Of those, evaluation and saving not counted.
        peak_memory_bytes: See :func:`ladder_kernels.memory.peak.peak_memory_bytes`.
        train_loss: Mean loss a step, those before a resume not included.
        base: Held-out perplexity of the base model; ``None`` without held-out data, or if it was
            not asked for.
        tuned: Held-out perplexity with the trained ladder; ``None`` without held-out data.
        output: Where the ladder was saved.
    """

    steps: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    train_loss: float
    base: Perplexity | None
    tuned: Perplexity | None
    output: Path


def train(options: TrainOptions, *, callbacks: Sequence[TrainerCallback] = ()) -> TrainResult:
    """Train a ladder and save it, with the tokenizer, in ``options.output``.

    What can be checked cheaply is checked before anything slow starts, and nothing is written
    before the model and the data are loaded. Under ``torchrun`` or ``accelerate launch`` every
    process takes its share of each step. The same options give the same weights, by bits; so does a
    run that was killed and resumed.

    Args:
        options: See :class:`~.options.TrainOptions`.
        callbacks: Further ones for the ``Trainer``, called after those of this library.

    Returns:
        What was done.

    Raises:
        OutputExistsError: If the output folder exists and is not empty, unless resuming; nothing in
            it is touched.
        ConfigError: If an option is not allowed, the context is longer than the model's, or a
            checkpoint is of another ladder.
        MissingFileError: If a model, file or checkpoint does not exist.
        DataError: If data are empty, unreadable, or lack a column.
        UnsupportedModelError: If the model's architecture cannot carry a ladder.
    """
    limited = options.budget is not None
    if limited:
        options, _ = within_budget(options)
    ladder = options.ladder_config()
    checkpoint = _check_output(options)
    _check_context(options.context, _max_context(options.model, options.gguf_file), options.model)
    _check_reporter(options.report_to)
    _check_optimizer(options.optimizer)

    from transformers import PrinterCallback

    from ladder_kernels.memory.allocation import return_freed_memory
    from ladder_kernels.training.callbacks import RichProgressCallback, ThroughputCallback
    from ladder_kernels.training.data import load_tokenizer, pad_token_id_of, prepare_data
    from ladder_kernels.training.packing import LadderCollator
    from ladder_kernels.training.trainer import PerplexityTrainer

    tokenizer = load_tokenizer(options.model, gguf_file=options.gguf_file)
    arguments = _arguments(options)
    with arguments.main_process_first(desc="data"):
        rows = prepare_data(options.data_options(), tokenizer, options.context)
        held_out = options.eval_data_options()
        eval_rows = held_out and prepare_data(held_out, tokenizer, options.context)
    if limited or options.weights == "streamed":
        return_freed_memory()
    model = _load_model(options, ladder, arguments.device)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, model)

    throughput = ThroughputCallback()
    own: list[Any] = [throughput]
    if options.report_to == "tensorboard":
        from transformers.integrations.integration_utils import TensorBoardCallback

        own.append(TensorBoardCallback())
    progress = RichProgressCallback() if options.progress else None
    if progress is not None:
        own.append(progress)
    trainer = PerplexityTrainer(
        model=model,
        args=arguments,
        data_collator=LadderCollator(pad_token_id_of(tokenizer)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        callbacks=[*own, *callbacks],
        free_gradients=options.free_gradients,
    )
    trainer.remove_callback(PrinterCallback)  # ours says the same, readably
    if checkpoint is not None:
        state = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
        trainer.steps_done = state["global_step"]
    base = trainer.perplexity(base=True) if eval_rows is not None and options.eval_base else None
    try:
        outcome = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finally:
        if progress is not None:
            progress.close()
    trainer.save_model()
    if options.tap_cache is None and options.tap_cache_folder is not None:
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            shutil.rmtree(options.tap_cache_folder, ignore_errors=True)
    return TrainResult(
        steps=outcome.global_step,
        tokens=throughput.tokens,
        tokens_per_second=throughput.tokens_per_second,
        peak_memory_bytes=_peak(arguments),
        train_loss=outcome.training_loss,
        base=base,
        tuned=trainer.perplexity() if eval_rows is not None else None,
        output=options.output_folder,
    )


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run.

    A process killed while it saves leaves half a checkpoint, which is passed over.

    Args:
        folder: Output of the run.

    Returns:
        The checkpoint's folder, or ``None`` if there is none.
    """
    whole = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_whole(path):
            whole.append((int(step), path))
    return max(whole)[1] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    if not all((checkpoint / name).is_file() for name in _CHECKPOINT_FILES):
        return False
    try:
        json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


# Checks that cost nothing ---------------------------------------------------------------------


def _check_output(options: TrainOptions) -> Path | None:
    """Refuse a used output folder, or find the checkpoint to resume from."""
    folder = options.output_folder
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder}: found a file; the output must be a folder")
    if not options.resume:
        # The other processes may come here when the first has already begun to write.
        first = int(os.environ.get("RANK", "0")) == 0
        if first and folder.is_dir() and any(folder.iterdir()):
            raise OutputExistsError(
                f"{folder}: exists and is not empty; nothing in it was touched. Give a new folder, "
                "or resume"
            )
        return None
    if options.checkpoint is not None:
        checkpoint = Path(options.checkpoint).expanduser()
        if not _is_whole(checkpoint):
            raise MissingFileError(f"{checkpoint}: found no whole checkpoint there to resume from")
        return checkpoint
    newest = newest_checkpoint(folder)
    if newest is None:
        raise MissingFileError(f"{folder}: found no whole checkpoint there to resume from")
    return newest


def _check_reporter(name: str) -> None:
    from importlib.util import find_spec

    if name == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigError("report_to: tensorboard is not installed (pip install tensorboard)")


def _check_optimizer(name: str) -> None:
    from importlib.util import find_spec

    if name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optimizer: adamw_8bit needs bitsandbytes, which is not installed (pip install "
            "bitsandbytes)"
        )


def _check_context(context: int, longest: int | None, model: str) -> None:
    if longest is not None and context > longest:
        raise ConfigError(f"context: found {context}; {model} allows {longest} at most")


def _max_context(model: str, gguf_file: str | None) -> int | None:
    """The longest context of a model whose configuration is at hand; ``None`` if it is not.

    Loading the model finds out the same, but only after all weights were read.
    """
    folder = Path(model).expanduser()
    if gguf_file is not None or not (folder / "config.json").is_file():
        return None
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values = values.get("base_config") or values
        return values.get("max_position_embeddings")
    except (ValueError, AttributeError):
        return None  # the loader has a better message


def _check_checkpoint(checkpoint: Path, model: LadderForCausalLM) -> None:
    """Refuse to resume with another ladder or base than the checkpoint's."""
    from ladder_kernels.models.pretrained import check_fingerprint, find_saved_ladder

    saved = find_saved_ladder(str(checkpoint))
    if saved is None:
        raise ConfigError(f"{checkpoint}: found a checkpoint of another kind of model")
    check_fingerprint(str(checkpoint), saved.config, model.backbone)
    for name in sorted({*saved.config.ladder, *model.config.ladder}):
        was, now = saved.config.ladder.get(name), model.config.ladder.get(name)
        if was != now:
            raise ConfigError(f"{name}: found {now!r}; the checkpoint to resume has {was!r}")
    was, now = saved.config.activations, model.config.activations
    if was != now:
        raise ConfigError(f"activations: found {now!r}; the checkpoint to resume has {was!r}")


# Parts of a run -------------------------------------------------------------------------------


def _arguments(options: TrainOptions) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    try:
        arguments = TrainingArguments(
            output_dir=str(options.output_folder),
            num_train_epochs=options.epochs,
            max_steps=-1 if options.max_steps is None else options.max_steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.eval_batch_size or options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.schedule,
            lr_scheduler_kwargs=_SCHEDULE_OPTIONS.get(options.schedule),
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            optim=options.optimizer,
            seed=options.seed,
            bf16=options.bf16,
            gradient_checkpointing=options.gradient_checkpointing,
            use_cpu=options.device == "cpu",
            logging_steps=options.logging_steps,
            logging_nan_inf_filter=False,
            eval_strategy="no" if options.eval_steps is None else "steps",
            eval_steps=options.eval_steps,
            save_strategy="no" if options.save_steps is None else "steps",
            save_steps=500 if options.save_steps is None else options.save_steps,
            save_total_limit=options.save_total_limit,
            include_num_input_tokens_seen="non_padding",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=options.device != "cpu" and torch.cuda.is_available(),
            # Every parameter of a ladder takes part in every step.
            ddp_find_unused_parameters=False,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from None
    return arguments


_SCHEDULE_OPTIONS = {"cosine_with_min_lr": {"min_lr_rate": 0.1}}


def _load_model(options: TrainOptions, ladder: Any, device: Any) -> LadderForCausalLM:
    from ladder_kernels.models.modeling import LadderForCausalLM
    from ladder_kernels.models.pretrained import find_saved_ladder

    saved = options.gguf_file is None and find_saved_ladder(options.model) is not None
    changed = options.changed_ladder_fields()
    if saved and changed:
        raise ConfigError(
            f"{changed[0]}: {options.model} is a saved ladder and has its own shape; leave it out"
        )
    model = LadderForCausalLM.from_pretrained(
        options.model,
        ladder=None if saved else ladder,
        weights=options.weights,
        embeddings=options.embeddings,
        taps=options.taps,
        tap_dtype=options.tap_dtype,
        tap_cache=options.tap_cache_folder,
        tap_cache_bytes=options.tap_cache_bytes,
        activations=options.activations,
        dtype=options.dtype,
        device=device,
        blocksize=options.blocksize,
        double_quant=options.double_quant,
        quantize_head=options.quantize_head,
        gguf_file=options.gguf_file,
    )
    _check_context(options.context, model.backbone.max_context, options.model)
    model.backbone.slice_tokens = options.slice_tokens
    return model


def _peak(arguments: TrainingArguments) -> int:
    from ladder_kernels.memory.peak import peak_memory_bytes

    return peak_memory_bytes(arguments.device)
