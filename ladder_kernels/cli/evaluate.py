"""``ladder-kernels evaluate``: perplexity of the base model and with the ladder."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from ladder_kernels.cli.console import Verbose, print_json, table
from ladder_kernels.cli.hub import go_offline_without_hub
from ladder_kernels.cli.loading import ModelOptions, load, tokenizer_of
from ladder_kernels.cli.options import flags_of, make, with_flags
from ladder_kernels.errors import ConfigError
from ladder_kernels.training.options import DataOptions

__all__ = ["command"]

_CONTEXT = 2048
_DATA_FLAGS = {"source": "data"}
_FIELDS = {
    record: [field.name for field in dataclasses.fields(record)]
    for record in (ModelOptions, DataOptions)
}


@with_flags(
    [
        *flags_of(ModelOptions, panels={"model": "Model"}),
        *flags_of(DataOptions, names=_DATA_FLAGS, panels={"source": "Data"}),
    ]
)
def command(
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help=f"Tokens a row; default {_CONTEXT}, or all that the model allows if fewer."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and no progress.")
    ] = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Measure perplexity on held-out data: of the base model, and with a saved ladder."""
    flags["source"] = flags.pop("data")
    of_model, of_data = (
        make(record, {name: flags[name] for name in _FIELDS[record]}, names=_DATA_FLAGS)
        for record in (ModelOptions, DataOptions)
    )
    go_offline_without_hub(of_model.model, of_model.base, of_data.source)

    from ladder_kernels.training.data import prepare_data
    from ladder_kernels.training.evaluation import evaluate_perplexity
    from ladder_kernels.training.sources import load_rows

    # Before the model, which takes longer.
    load_rows(of_data.source, split=of_data.split, limit=of_data.limit)
    model, saved = load(of_model)
    limit = model.backbone.max_context
    if context is None:
        context = _CONTEXT if limit is None else min(_CONTEXT, limit)
    elif limit is not None and context > limit:
        raise ConfigError(f"context: found {context}; {of_model.model} allows {limit} at most")
    rows = prepare_data(of_data, tokenizer_of(of_model), context)
    measured = {
        name: evaluate_perplexity(
            model,
            rows,
            batch_size=batch_size,
            base=name == "base",
            progress=sys.stdout.isatty() and not as_json,
        )
        for name in (("base", "tuned") if saved else ("base",))
    }
    if as_json:
        print_json(
            {
                "model": of_model.model,
                "data": of_data.source,
                "context": context,
                "base": dataclasses.asdict(measured["base"]),
                "tuned": dataclasses.asdict(measured["tuned"]) if saved else None,
            }
        )
        return
    table(
        ("", "perplexity", "loss", "tokens", "tokens/s"),
        [
            (
                name,
                f"{result.perplexity:.4f}",
                f"{result.loss:.4f}",
                f"{result.tokens:,}",
                f"{result.tokens / max(result.seconds, 1e-9):,.0f}",
            )
            for name, result in measured.items()
        ],
        numbers=True,
    )
    if saved:
        change = measured["tuned"].perplexity / measured["base"].perplexity - 1
        print(f"the ladder changes perplexity by {change:+.1%}")
