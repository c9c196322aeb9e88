"""``ladder-kernels train``: fine-tune a model with a ladder."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ladder_kernels.cli.console import Verbose, print_json, say, table
from ladder_kernels.cli.hub import check_model, go_offline_without_hub
from ladder_kernels.cli.loading import device_of
from ladder_kernels.cli.options import flags_of, given, make, read_config, with_flags
from ladder_kernels.training.options import TrainOptions

__all__ = ["command"]

# The first field below each heading of the help.
PANELS = {
    "model": "Model and data",
    "kind": "Ladder",
    "budget": "Base model",
    "epochs": "Optimisation",
    "logging_steps": "Reports, evaluation and checkpoints",
}


@with_flags(flags_of(TrainOptions, panels=PANELS))
def command(
    call: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="YAML file with options by name (learning_rate: 1e-3); flags override it.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and no progress.")
    ] = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Train a ladder beside a frozen base model and save it.

    Before the first step the model is exactly the base model; the base itself is never changed.
    """
    values = {} if config is None else read_config(config, TrainOptions)
    values |= given(call, flags)
    if as_json:
        values["progress"] = False
    options = make(TrainOptions, values, where=", as a flag or in a --config file")
    go_offline_without_hub(options.model, options.data, options.eval_data)
    check_model(options.model, options.gguf_file)
    device_of(options.device)

    if options.budget is not None:
        from ladder_kernels.memory.allocation import return_freed_memory
        from ladder_kernels.memory.planner import gigabytes, in_words
        from ladder_kernels.training.budget import within_budget

        budget, (options, plan) = options.budget, within_budget(options)
        return_freed_memory()
        say(f"within {budget}: {in_words(plan)}; {gigabytes(plan.bytes)} planned")
    from accelerate import PartialState

    from ladder_kernels.training.run import train

    result = train(options)
    # A group left to the end of the process may abort it: its threads outlive what they use.
    PartialState().destroy_process_group()
    if int(os.environ.get("RANK", "0")) != 0:  # of several processes one reports
        return
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    rows = [
        ("optimizer steps", f"{result.steps:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("tokens/s", f"{result.tokens_per_second:,.1f}"),
        ("peak memory", f"{result.peak_memory_bytes / 1e9:.2f} GB"),
        ("mean training loss", f"{result.train_loss:.4f}"),
    ]
    for name, measured in (("base", result.base), ("tuned", result.tuned)):
        if measured is not None:
            rows.append((f"held-out perplexity, {name}", f"{measured.perplexity:.4f}"))
    table(None, rows, numbers=True)
    print(f"saved to {result.output}")
    print(
        f"try it: ladder-kernels generate --model {shlex.quote(str(result.output))} 'your prompt'"
    )
