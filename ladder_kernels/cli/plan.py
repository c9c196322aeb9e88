"""``ladder-kernels plan``: what training a model takes, and what fits, before any download."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ladder_kernels.cli.console import Verbose, print_json, table
from ladder_kernels.cli.options import flags_of, given, make, with_flags
from ladder_kernels.errors import ConfigError
from ladder_kernels.training.options import TrainOptions

if TYPE_CHECKING:
    from ladder_kernels.memory.planner import Plan, Planner
    from ladder_kernels.memory.settings import Stage
    from ladder_kernels.models.config import LadderConfig

__all__ = ["PlanOptions", "command"]


def _help(text: str, default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


def _same(name: str, default: Any = None) -> Any:
    """An option of ``train``, by default not decided."""
    field = next(each for each in dataclasses.fields(TrainOptions) if each.name == name)
    return _help(field.metadata["help"].partition("; default")[0], default)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What ``plan`` can be told; options that ``train`` has too mean the same there."""

    model: str = dataclasses.field(
        metadata={"help": "a well-known model's name, a config.json, or a folder with one"}
    )
    context: int = _help("tokens a row", 2048)
    rows: int = _help("rows of an optimizer step (train's batch_size x gradient_accumulation)", 1)
    budget: str | None = _help("memory that the run may take, such as 6GB", None)
    device: str = _help("cuda, or cpu", "cuda")
    dtype: str | None = _help("compute dtype: bfloat16, float16 or float32; default as train", None)
    pack: bool = _help("rows are packed with several documents", False)
    clip: bool = _help("gradients are clipped to a norm, so that all must be there at once", True)
    rank: int = _help("of QLoRA's adapters, for comparison", 16)

    kind: str | None = _same("kind")
    every: int | None = _same("every")
    connected: int | None = _same("connected")
    free: int | None = _same("free")
    reduction: int | None = _same("reduction")
    width: int | None = _same("width")
    merge: str | None = _same("merge")
    block: str | None = _same("block")
    reentry: float | None = _same("reentry")
    adapter_rank: int | None = _same("adapter_rank")

    weights: str | None = _same("weights")
    embeddings: str | None = _same("embeddings")
    taps: str | None = _same("taps")
    tap_dtype: str | None = _same("tap_dtype")
    batch_size: int | None = _same("batch_size")
    slice_tokens: int | None = _same("slice_tokens")
    gradient_checkpointing: bool | None = _same("gradient_checkpointing")
    optimizer: str | None = _help("adamw, adamw_8bit or sgd", None)
    quantize_head: bool | None = _same("quantize_head")


PANELS = {
    "model": "Model, rows and budget",
    "kind": "Ladder (default as train: the recommended one)",
    "weights": "Decided already (default: whatever fits, or the usual without a budget)",
}
_LADDER = (
    "kind", "every", "connected", "free", "reduction", "width", "merge", "block", "reentry",
    "adapter_rank",
)  # fmt: skip
_DECIDED = (
    "weights", "embeddings", "taps", "tap_dtype", "batch_size", "slice_tokens", "optimizer",
    "quantize_head",
)  # fmt: skip
_ALLOWED = {
    "device": ("cuda", "cpu"),
    "dtype": (None, "bfloat16", "float16", "float32"),
    "weights": (None, "resident", "streamed", "host"),
    "embeddings": (None, "device", "host"),
    "taps": (None, "device", "host", "disk"),
    "tap_dtype": (None, "bfloat16", "float16", "float32", "int8"),
}
_LONGEST = 1 << 20


@with_flags(flags_of(PlanOptions, panels=PANELS))
def command(
    call: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Say what training a model takes, in which parts, and the fastest settings that fit a budget.

    Nothing is downloaded or run: bytes are computed from shapes, times are modelled. QLoRA stands
    beside it, for comparison.
    """
    options = make(PlanOptions, given(call, flags))
    for name, allowed in _ALLOWED.items():
        if getattr(options, name) not in allowed:
            names = ", ".join(str(each) for each in allowed if each is not None)
            raise ConfigError(f"{name}: found {getattr(options, name)!r}; allowed are {names}")
    planner = _planner(options)
    budget = None
    if options.budget is not None:
        from ladder_kernels.memory.planner import parse_bytes

        budget = parse_bytes(options.budget)
    plan = planner.usual() if budget is None else planner.fastest(budget)
    if as_json:
        print_json(_values(options, planner, plan, budget))
    else:
        _show(options, planner, plan, budget)


def _planner(options: PlanOptions) -> Planner:
    from ladder_kernels.memory.planner import Planner
    from ladder_kernels.models.shapes import config_of

    choices = {
        name: (getattr(options, name),) for name in _DECIDED if getattr(options, name) is not None
    }
    if options.gradient_checkpointing is not None:
        choices["recompute"] = (options.gradient_checkpointing,)
    if options.batch_size is not None and options.rows % max(1, options.batch_size):
        raise ConfigError(
            f"batch_size: found {options.batch_size}, which does not divide rows {options.rows}"
        )
    float32 = options.dtype == "float32" or (options.dtype is None and options.device == "cpu")
    return Planner(
        config_of(options.model),
        _ladder(options),
        device=options.device,
        context=options.context,
        rows=options.rows,
        element=4 if float32 else 2,
        choices=choices,
        documents=options.pack,
        clips=options.clip,
    )


def _ladder(options: PlanOptions) -> LadderConfig:
    from ladder_kernels.models.config import LadderConfig

    shape = {name: getattr(options, name) for name in _LADDER if getattr(options, name) is not None}
    return LadderConfig(**shape) if shape else LadderConfig.recommended()


def _rivals(
    options: PlanOptions, planner: Planner, budget: int | None
) -> list[tuple[str, Stage, int | None]]:
    """QLoRA: name, peak, and the longest row within the budget."""
    found = []
    for checkpointing in (False, True):
        name = "QLoRA, gradient checkpointing" if checkpointing else "QLoRA"
        stage = planner.qlora(rank=options.rank, checkpointing=checkpointing)
        longest = None
        if budget is not None:
            longest = planner.longest_qlora(
                rank=options.rank, checkpointing=checkpointing, budget=budget, most=_LONGEST
            )
        found.append((name, stage, longest))
    return found


def _values(
    options: PlanOptions, planner: Planner, plan: Plan, budget: int | None
) -> dict[str, Any]:
    from ladder_kernels.memory.planner import RUNTIME

    values: dict[str, Any] = {
        "model": options.model,
        "context": options.context,
        "rows": options.rows,
        "device": options.device,
        "budget": budget,
        "parameters": planner.model.parameters(),
        "trained_parameters": planner.ladder.parameters(),
        "settings": plan.options(),
        "changes": list(plan.changes),
        "parts": plan.peak.parts,
        "runtime": RUNTIME,
        "peak": plan.peak.total,
        "total": plan.bytes,
        "bound": plan.peak.name,
        "stages": _largest(plan.stages),
        "modelled_seconds": plan.seconds,
    }
    if budget is not None:
        smallest = planner.smallest()
        values["longest_context"] = planner.longest_context(smallest, budget, _LONGEST)
    values["rivals"] = [
        {
            "name": name,
            "parts": stage.parts,
            "peak": stage.total,
            "total": stage.total + RUNTIME,
            "bound": stage.name,
            "longest_context": longest,
        }
        for name, stage, longest in _rivals(options, planner, budget)
    ]
    return values


def _largest(stages: Sequence[Stage]) -> dict[str, int]:
    """The most that stages of a name take: they come again with each micro-batch."""
    found: dict[str, int] = {}
    for stage in stages:
        found[stage.name] = max(stage.total, found.get(stage.name, 0))
    return found


def _show(options: PlanOptions, planner: Planner, plan: Plan, budget: int | None) -> None:
    from ladder_kernels.memory.planner import RUNTIME, in_words

    trained = planner.ladder.parameters() / 1e6
    print(
        f"{options.model}: {planner.model.parameters() / 1e9:.2f} B parameters and a ladder of "
        f"{trained:,.1f} M, {options.rows} x {options.context:,} tokens a step, {options.device}"
    )
    print(f"settings: {in_words(plan)}")
    if plan.changes:
        print(f"changes numbers: {', '.join(plan.changes)}")
    print()
    rivals = _rivals(options, planner, budget)
    columns = [("this plan", plan.peak)] + [(name, stage) for name, stage, _ in rivals]
    rows = [
        [part, *(_megabytes(stage.parts[part]) for _, stage in columns)] for part in plan.peak.parts
    ]
    rows.append(["runtime", *[_megabytes(RUNTIME)] * len(columns)])
    rows.append(["total", *(_megabytes(stage.total + RUNTIME) for _, stage in columns)])
    if budget is not None:
        rows.append(
            ["fits", *("yes" if stage.total + RUNTIME <= budget else "no" for _, stage in columns)]
        )
        longest = [planner.longest_context(planner.smallest(), budget, _LONGEST)]
        longest += [tokens or 0 for _, _, tokens in rivals]
        rows.append(["longest row, tokens", *(f"{tokens:,}" for tokens in longest)])
    table(["MB at the peak", *(name for name, _ in columns)], rows, numbers=True)
    print(f"\nlargest in: {plan.peak.name}")
    print(f"train with: {_command_line(plan)}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def _command_line(plan: Plan) -> str:
    """The options of ``train`` that are not its defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    usual = {**defaults, "embeddings": "device", "tap_dtype": "bfloat16", "quantize_head": False}
    words = []
    for name, value in plan.options().items():
        if value == usual[name] or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        words.append(flag if value is True else f"{flag} {value}")
    if plan.settings.free_gradients:
        words.append("--max-grad-norm 0")
    return " ".join(words) or "the defaults"
