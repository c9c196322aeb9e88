"""``ladder-kernels quantize``: write a model in NF4, calibrated or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladder_kernels.cli.console import Verbose, say
from ladder_kernels.cli.hub import check_model, go_offline_without_hub
from ladder_kernels.cli.loading import device_of
from ladder_kernels.errors import ConfigError, LadderKernelsError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ladder_kernels.models.backbone import Quantization
    from ladder_kernels.models.saving import Saved, Saves

__all__ = ["command"]

_CONTEXT = 1024
_TOKENS = 16384


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Base model with float weights: hub name, folder (safetensors, GGUF) or GGUF file."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that the weights are rounded for (may be given several times): any text "
            "file, a data file or folder as train has, or the name of a data set on the hub. "
            "Without any, each weight is rounded to the nearest value.",
            metavar="FILE",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Tokens of those texts to use, spread over them; default {_TOKENS}."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Tokens seen at once; default {_CONTEXT}, or all that the model allows."
        ),
    ] = None,
    blocksize: Annotated[
        int, typer.Option(help="Weights that share a scale: 32, 64, ..., 4096.")
    ] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantise the scales too.")] = True,
    quantize_head: Annotated[bool, typer.Option(help="Quantise the output head too.")] = False,
    gguf_file: Annotated[
        str | None, typer.Option(help="Name of a GGUF file in the folder or repository.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype to compute in and to store what is not quantised in; default float32 on a "
            "CPU, else bfloat16 or float16."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda ...; default a GPU where there is one.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write a model in NF4, as bitsandbytes has it, to be the base of ladders.

    Weights are read, quantised and written one after another, so a model may be larger than the
    memory. From such a folder, train can stream them: --weights streamed.

    Rounding for --calibration texts loses far less than rounding to nearest, in the same format.
    """
    sources = list(calibration or ())
    if not sources and (tokens is not None or context is not None):
        option = "tokens" if tokens is not None else "context"
        raise ConfigError(f"{option}: found a value, but no --calibration to take them from")
    go_offline_without_hub(model, *sources)
    check_model(model, gguf_file)

    from ladder_kernels.models.backbone import Quantization
    from ladder_kernels.models.loading import load_config
    from ladder_kernels.models.pretrained import generation_config_of
    from ladder_kernels.models.saving import check_is_new
    from ladder_kernels.training.data import calibration_rows

    # What may be refused, before what takes long.
    check_is_new(output)
    place = device_of(device)
    tokenizer = _tokenizer(model, gguf_file, needed=bool(sources))
    rows = None
    if sources and tokenizer is not None:
        limit = getattr(load_config(model, gguf_file=gguf_file), "max_position_embeddings", None)
        if context is None:
            context = _CONTEXT if limit is None else min(_CONTEXT, limit)
        elif limit is not None and context > limit:
            raise ConfigError(f"context: found {context}; {model} allows {limit} at most")
        rows = calibration_rows(
            sources, tokenizer, tokens=_TOKENS if tokens is None else tokens, context=context
        )
        say(f"calibrating with {sum(map(len, rows)):,} tokens; this may take minutes")
    others = [each for each in (tokenizer, generation_config_of(model)) if each is not None]
    settings = Quantization(blocksize, double_quant, quantize_head, rows is not None)
    saved = _write(model, output, others, settings, gguf_file, dtype, place, rows)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(
        f"{output}: {saved.parameters / 1e6:,.1f} M parameters, {saved.nf4_bytes / 1e6:,.1f} MB "
        f"of NF4, {size / 1e6:,.1f} MB in all"
    )


def _write(
    model: str,
    output: Path,
    others: Sequence[Saves],
    settings: Quantization,
    gguf_file: str | None,
    dtype: str | None,
    place: torch.device,
    rows: list[list[int]] | None,
) -> Saved:
    """Write the folder: weight by weight where each is for itself, else from a whole backbone."""
    from ladder_kernels.models.loading import SUPPORTED_NATIVE, default_dtype, open_model
    from ladder_kernels.models.pretrained import compute_dtype_of, load_base
    from ladder_kernels.models.saving import quantize_model, save_backbone

    if rows is None:
        config, source = open_model(model, gguf_file)
        if config.model_type in SUPPORTED_NATIVE:
            kept = compute_dtype_of(dtype) or default_dtype(place)
            return quantize_model(
                source, config, output, *others, quantization=settings, dtype=kept
            )
    options = {
        "blocksize": settings.blocksize,
        "double_quant": settings.double_quant,
        "quantize_head": settings.quantize_head,
        "gguf_file": gguf_file,
        "calibration": rows,
    }
    return save_backbone(load_base(model, dtype, place, options), output, *others)


def _tokenizer(
    model: str, gguf_file: str | None, *, needed: bool
) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; ``None`` if it has none and none is needed."""
    from ladder_kernels.training.data import load_tokenizer

    try:
        return load_tokenizer(model, gguf_file=gguf_file)
    except LadderKernelsError:
        if needed:
            raise
        return None
