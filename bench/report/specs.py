"""Every table and plot that there is; one more is one more entry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.learning.report import draw_frontier, draw_scaling
from bench.learning.studies import PEFT
from bench.plots import METHODS
from bench.report.learned import LEARNING, Mean, StudyPlot, base_of, shape_of
from bench.report.pictures import AgainstContext, Frontier, Plot, Roofline, Timeline
from bench.report.select import (
    GPU,
    HELD_TO_AVX2,
    PROCESSOR,
    Machine,
    Selection,
    Source,
    Where,
    tokens_per_second,
)
from bench.report.tables import (
    Against,
    Blank,
    Cell,
    Column,
    Filled,
    Line,
    Range,
    Ratio,
    Table,
    duration,
    gigabytes,
    megabytes,
    millions,
    percent,
    seconds,
    whole,
)
from bench.rows import Row

__all__ = ["PLOTS", "TABLES"]

_STEP = "python -m bench.train_step --dtype float32 bfloat16 --answers 1 10"
_SHAPE = "--model Qwen2.5-1.5B"
_ACROSS_CONTEXTS = "python -m bench.train_step --context 512 1024 2048 4096 8192"
_OPS = "python -m bench.ops"
_SMOL = "SmolLM2-135M-Instruct"
_QWEN = "Qwen2.5-1.5B, random weights"
_QWEN_7B = "Qwen2.5-7B, random weights"
_CONTEXT = 2048
# PyTorch's own gradients in bfloat16 are slow there: QLoRA takes over half a minute for so many.
_AVX2_CONTEXT = 256
_AVX2 = f"{_STEP} --isa avx2 --context {_AVX2_CONTEXT}"
_CONTEXTS = (512, 1024, 2048, 4096, 8192)
_LIVE = "bytes: live beyond the weights"
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_QLORA = ("QLoRA", "QLoRA, checkpointed", "QLoRA, Liger loss")
_ACROSS = (
    "ladder", "ladder, kept taps", "recommended ladder", "recommended ladder, recomputed",
    "QLoRA", "QLoRA, checkpointed", "QLoRA on our kernels, checkpointed", "plain LST", "plain QST",
)  # fmt: skip


def _shape(context: int | str, answers: int) -> str:
    return f"B=1 S={context} loss on 1 in {answers}"


_EVERY, _TENTH = (_shape(_CONTEXT, answers) for answers in (1, 10))


def _rate(row: Row) -> str:
    return f"{tokens_per_second(row):,.0f}"


def _named(names: Sequence[str], **where: str) -> list[Line]:
    """A line a candidate."""
    return [Line((name,), {"candidate": name, **where}) for name in names]


def _train_step(
    name: str,
    model: str,
    dtype: str,
    machine: Machine,
    command: str,
    context: int = _CONTEXT,
) -> Table:
    every, tenth = ({"shape": _shape(context, answers)} for answers in (1, 10))
    parts = ("seconds: forward", "seconds: backward", "seconds: optimizer")
    return Table(
        name=name,
        source=Source(
            file="train_step.csv",
            command=command,
            where={"bench": "train_step", "model": model, "dtype": dtype},
            machine=machine,
        ),
        heads=("method",),
        lines=_named(tuple(METHODS)),
        sparse=True,
        columns=(
            Column(header="trained", metrics=("parameters: trained",), text=millions, where=every),
            Column(header="tokens/s", text=_rate, where=every),
            Column(header="tokens/s, loss on 1 in 10", text=_rate, where=tenth),
            Ratio(header="against QLoRA", to=_QLORA, where=every),
            Ratio(header="against QLoRA, 1 in 10", to=_QLORA, where=tenth),
            Column(
                header="forward / backward / optimizer",
                metrics=parts,
                text=lambda row: f"{row.median:.2f}",
                where=every,
                unit=" s",
            ),
            Column(header="beyond the weights", metrics=(_LIVE,), text=megabytes, where=every),
            Column(header="resident", metrics=("bytes: resident",), text=megabytes, where=every),
        ),
    )


def _contexts(dtype: str) -> list[Table]:
    def contexts(kind: str, metric: str, text: object, note: str) -> Table:
        return Table(
            name=f"contexts-{kind}-{dtype}",
            source=_steps(dtype, _ACROSS_CONTEXTS),
            heads=(note,),
            lines=_named(_ACROSS),
            sparse=True,
            columns=tuple(
                Column(
                    header=f"{context:,}",
                    metrics=(metric,),
                    text=text,  # type: ignore[arg-type]
                    where={"shape": _shape(context, 1)},
                )
                for context in _CONTEXTS
            ),
        )

    return [
        contexts("speed", "seconds", _rate, "tokens/s at a context of"),
        contexts("memory", _LIVE, megabytes, "beyond the weights at a context of"),
    ]


def _steps(dtype: str, command: str, **where: str) -> Source:
    return Source(
        file="train_step.csv",
        command=command,
        where={"bench": "train_step", "model": _SMOL, "dtype": dtype, **where},
    )


_EVERY_TOKEN, _ONE_IN_TEN = "loss on every token", "on one in ten"


def _times_as_fast(label: str, candidate: str, dtype: str, to: tuple[str, ...]) -> Line:
    cells = [
        Ratio(header=header, to=to, where={"shape": shape})
        for header, shape in ((_EVERY_TOKEN, _EVERY), (_ONE_IN_TEN, _TENTH))
    ]
    return Line((label,), {"candidate": candidate, "dtype": dtype}, cells)


def _times_as_small(of: str, dtype: str, to: str) -> Line:
    ratio = Ratio(header=_EVERY_TOKEN, to=(to,), metric=_LIVE, where={"shape": _EVERY})
    label = f"bytes beyond the weights, {_SHORT[dtype]}: {to} against {of}"
    where = {"candidate": of, "dtype": dtype}
    return Line((label,), where, (ratio, Blank(header=_ONE_IN_TEN)))


def _comparison() -> Table:
    """What the ladder takes against its rivals: each cell is a ratio."""
    lines = []
    for dtype, short in _SHORT.items():
        lines += [
            _times_as_fast(f"tokens/s, {short}: {of} against {to}", of, dtype, rivals)
            for of, to, rivals in (
                ("ladder", "the best QLoRA", _QLORA),
                ("ladder, int8 activations", "the best QLoRA", _QLORA),
                ("ladder, kept taps", "the best QLoRA", _QLORA),
                ("ladder", "plain LST", ("plain LST",)),
                ("QLoRA on our kernels", "QLoRA", ("QLoRA",)),
            )
        ]
        lines += [
            _times_as_small(of, dtype, to)
            for of in ("ladder", "ladder, recomputed")
            for to in ("QLoRA", "QLoRA, checkpointed", "plain LST")
        ]
    return Table(
        name="comparison",
        source=Source(
            file="train_step.csv",
            command=_STEP,
            where={"bench": "train_step", "model": _SMOL},
        ),
        lines=lines,
        columns=lines[0].cells or (),
        sparse=True,
    )


def _long_ops() -> Table:
    """By operation, of many tokens or none, in both dtypes: what a training step is made of."""
    share, pytorch = "share of the bound", ("torch", "torch on dequantised weights")

    def lines(rows: Sequence[Row]) -> list[Line]:
        return [line for line in _op_groups(rows) if line.labels[1] in ("", f"{_CONTEXT:,}")]

    return Table(
        name="ops",
        source=Source(file="ops.csv", command=_OPS),
        heads=("operation", "tokens"),
        lines=lines,
        columns=(
            *(
                Range(
                    header=f"{share}, {short}",
                    metric=share,
                    text=percent,
                    where={"dtype": dtype},
                    optional=True,
                )
                for dtype, short in _SHORT.items()
            ),
            *(
                Against(header=f"{title}, {short}", rivals=rivals, where={"dtype": dtype})
                for title, rivals in (
                    ("against PyTorch", pytorch),
                    ("recomputing", ("torch, recomputing",)),
                    ("against bitsandbytes", ("bitsandbytes",)),
                )
                for dtype, short in _SHORT.items()
            ),
        ),
    )


def _ops(name: str, dtype: str, machine: Machine, command: str) -> Table:
    """By operation and number of tokens, over all layers and models."""
    return Table(
        name=name,
        source=Source(file="ops.csv", command=command, where={"dtype": dtype}, machine=machine),
        heads=("operation", "tokens"),
        lines=_op_groups,
        columns=(
            Range(
                header="share of the bound",
                metric="share of the bound",
                text=percent,
                optional=True,
            ),
            Against(header="times as fast as"),
        ),
    )


def _every_op(name: str, dtype: str, machine: Machine, command: str) -> Table:
    """By operation, model and shape."""
    return Table(
        name=name,
        source=Source(file="ops.csv", command=command, where={"dtype": dtype}, machine=machine),
        heads=("operation", "shape"),
        lines=_op_lines,
        columns=(
            Column(header="ours", text=duration),
            Column(
                header="share of the bound",
                metrics=("share of the bound",),
                text=percent,
                optional=True,
            ),
            Against(header="times as fast as"),
        ),
    )


def _works(rows: Sequence[Row]) -> dict[tuple[str, str, str], str]:
    """Bench, model and shape of what was measured, and the fastest of our backends that was."""
    ours: dict[tuple[str, str, str], str] = {}
    order = ("reference", "cpu", "triton")
    for row in rows:
        if row.candidate in order and row.bench.startswith("ops/") and row.metric == "seconds":
            work = (row.bench, row.model, row.shape)
            ours[work] = max(ours.get(work, order[0]), row.candidate, key=order.index)
    return ours


def _op_lines(rows: Sequence[Row]) -> list[Line]:
    """A line an operation and shape."""
    return [
        Line(
            (bench.removeprefix("ops/"), f"{model}: {shape}"),
            {"bench": bench, "model": model, "shape": shape, "candidate": candidate},
        )
        for (bench, model, shape), candidate in _works(rows).items()
    ]


def _op_groups(rows: Sequence[Row]) -> list[Line]:
    """A line an operation, direction and number of tokens."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for (bench, _, shape), candidate in _works(rows).items():
        direction = re.search(r", backward|, loss and gradient", shape)
        # A shape begins with the number of tokens; a whole weight's with its rows.
        first = re.search(r" (\w+)=(\d+)", shape)
        count = f"{int(first[2]):,}" if first and first[1] != "N" else ""
        key = (bench, direction[0] if direction else "", count, candidate)
        groups.setdefault(key, []).append(shape)
    return [
        Line(
            (bench.removeprefix("ops/") + direction, count),
            {"bench": bench, "shape": tuple(shapes), "candidate": candidate},
        )
        for (bench, direction, count, candidate), shapes in groups.items()
    ]


def _gpu_step() -> Table:
    autocast, separate = "bfloat16 autocast", "bfloat16, adapters in float32"
    qlora, checkpointed = "QLoRA (bitsandbytes)", "QLoRA (bitsandbytes), gradient checkpointing"
    third, everywhere = "ladder of every third layer, MLP blocks", "our adapters on all layers"
    methods = {
        "ladder of every third layer, MLP rungs": (third, autocast),
        "ladder of every layer, with attention": ("ladder", autocast),
        "recommended ladder": ("recommended ladder", autocast),
        "recommended ladder, recomputed": ("recommended ladder, recomputed", autocast),
        everywhere: (everywhere, autocast),
        f"{everywhere}, recomputed": (f"{everywhere}, recomputed", autocast),
        "QLoRA (PEFT r = 16, bitsandbytes)": (qlora, autocast),
        "QLoRA (PEFT r = 16, bitsandbytes), checkpointed": (checkpointed, autocast),
        "QLoRA without autocast": (qlora, separate),
        "QLoRA without autocast, checkpointed": (checkpointed, separate),
        "QLoRA with `accelerate_4bit`": ("QLoRA with accelerate_4bit", autocast),
    }
    return Table(
        name="gpu-step",
        source=Source(
            file="gpu_step.csv",
            command="python -m bench.gpu_step",
            where={"model": _QWEN_7B, "shape": _EVERY},
            machine=GPU,
        ),
        lines=[
            Line((label,), {"candidate": candidate, "dtype": dtype})
            for label, (candidate, dtype) in methods.items()
        ],
        columns=(
            Column(header="a step", text=lambda row: f"{row.median * 1e3:.0f} ms"),
            Column(header="tokens/s", text=_rate),
            Column(header="allocated at the peak", metrics=("bytes",), note=" [allocated]",
                   text=gigabytes),
        ),
    )  # fmt: skip


def _smallest() -> Table:
    def at_peak(header: str, part: str) -> Column:
        return Column(
            header=header, metrics=("bytes",), note=f", {part} at the peak", text=megabytes
        )

    def line(label: str, candidate: str, model: str, shape: str) -> Line:
        return Line((label,), {"candidate": candidate, "model": model, "shape": shape})

    whole_7b = ("Qwen2.5-7B", "B=1 S=2048 layers=28 rung every 1")
    return Table(
        name="smallest",
        source=Source(
            file="smallest.csv", command="python -m bench.smallest", where={"dtype": "bfloat16"}
        ),
        heads=("weights",),
        lines=(
            line("resident", "resident under 6.0 GB", *whole_7b),
            line("streamed from their file", "streamed under 2.5 GB", *whole_7b),
            line(
                "streamed: Llama-3.1-70B's shape, four of its layers, a rung at every second",
                "streamed under 5.0 GB", "Llama-3.1-70B", "B=1 S=2048 layers=4 rung every 2",
            ),
        ),
        columns=(
            at_peak("the model's", "weights"),
            at_peak("ladder", "ladder"),
            at_peak("optimizer", "optimizer"),
            at_peak("transients", "transients"),
            Column(header="live tensors at the peak", metrics=("bytes",), note=", live tensors",
                   text=gigabytes),
            Column(header="the process, anonymous", metrics=("bytes",),
                   note=", process, anonymous", text=gigabytes),
            Column(header="limit", metrics=("bytes",), note=", live tensors", text=_limit),
        ),
    )  # fmt: skip


def _limit(row: Row) -> str:
    """Of the process, which its candidate's name says."""
    found = re.search(r"under ([\d.]+ GB)", row.candidate)
    return found[1] if found else "none"


def _gpu_memory() -> Table:
    def at(context: int | str, header: str, text: object, **more: object) -> Column:
        shape = _shape(context, 1)
        return Column(header=header, text=text, where={"shape": shape}, **more)  # type: ignore[arg-type]

    columns = []
    for context, short in ((2048, "2,048"), (16384, "16,384")):
        columns += [
            at(context, f"tokens/s at {short} tokens", _rate),
            at(context, f"live at {short} tokens", gigabytes, metrics=("bytes",),
               note=" [live tensors]"),
        ]  # fmt: skip
    columns.append(
        at("2048..16384", "bytes a further token", whole, metrics=("bytes",),
           note=" [live tensors, per extra token]")
    )  # fmt: skip
    labels = {
        "resident: every layer": "resident, a rung at every layer",
        "taps on the host: every layer": "taps on the host, recomputed, slices of 1,024 tokens",
        "all on the host: every layer": "besides: weights and embeddings on the host, "
        "8-bit AdamW, gradients freed",
        "all on the host: every third layer, MLP blocks": "the same, an MLP rung at every third "
        "layer",
    }
    return Table(
        name="gpu-memory",
        source=Source(
            file="gpu_memory.csv",
            command="python -m bench.gpu_memory",
            where={"model": _QWEN_7B, "dtype": "bfloat16 autocast"},
            machine=GPU,
        ),
        lines=[Line((label,), {"candidate": name}) for name, label in labels.items()],
        columns=columns,
    )


def _tap_cache() -> Table:
    plain, attention = "plain ladder", "ladder on every layer, with attention"
    lines = [
        Line(
            (label, loss),
            {"candidate": candidate, "dtype": dtype, "shape": shape},
        )
        for label, candidate, dtype in (
            ("plain ladder: MLP rungs at every third layer; bf16", plain, "bfloat16"),
            ("the same, fp32", plain, "float32"),
            ("rungs with attention at every layer; bf16", attention, "bfloat16"),
        )
        for loss, shape in (("every token", _EVERY), ("one token in ten", _TENTH))
    ]
    return Table(
        name="tap-cache",
        source=Source(
            file="tap_cache.csv", command="python -m bench.tap_cache", where={"model": _SMOL}
        ),
        heads=("", "loss on"),
        lines=lines,
        columns=(
            Column(header="tokens/s, first epoch", note=", taps computed", text=_rate),
            Column(header="from kept taps", note=", taps from files", text=_rate),
            _FromFiles(),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _FromFiles:
    """How many times as fast a step is from kept taps."""

    header: str = "times as fast"

    def fill(self, selection: Selection, line: Where) -> Filled:
        name = str(line["candidate"])
        ratio = Ratio(header=self.header, to=(f"{name}, taps computed",))
        return ratio.fill(selection, {**line, "candidate": f"{name}, taps from files"})


def _learning_cost() -> Table:
    labels = {
        PEFT: "QLoRA by PEFT on bitsandbytes",
        "qlora": "QLoRA on this library's kernels",
        "qlora, recomputed": "QLoRA on this library's kernels, gradient checkpointing",
        "re-entry 3/4 + r16": "re-entry below the upper three quarters, adapters there",
        "re-entry 1/2 + r16": "recommended ladder: re-entry below the upper half, adapters there",
        "re-entry 1/2 + r16, recomputed": "recommended ladder, gradient checkpointing",
        "re-entry 1/2": "re-entry below the upper half, without adapters",
        "re-entry 1/4": "re-entry below the upper quarter, without adapters",
        "ladder": "plain ladder",
    }
    return Table(
        name="learning-cost",
        source=Source(
            file="learning_cost.csv",
            command="python -m bench.learning cost",
            where={"model": _SMOL, "dtype": "bfloat16"},
            machine=lambda name: "family 25 model 17" in name,
        ),
        lines=[Line((label,), {"candidate": name}) for name, label in labels.items()],
        columns=(
            _Trained(),
            Column(header="a step", text=seconds, optional=True),
            Column(header="tokens/s", text=_rate, optional=True),
            Column(
                header="memory beyond the base", metrics=("bytes",), text=megabytes, elsewhere=True
            ),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """Trained parameters of a method of the learning study, whose trials know them."""

    header: str = "trained"

    def fill(self, selection: Selection, line: Where) -> Filled:
        method = str(line["candidate"]).removesuffix(", recomputed")
        method = "qlora" if method == PEFT else method  # their sizes are the same
        rows = [
            row
            for row in LEARNING.select().rows
            if (row.candidate, row.model) == (method, base_of("calibrated"))
            and row.metric == "parameters: trained"
        ]
        if len({row.median for row in rows}) != 1:
            return Filled(text="", missing=True)
        return Filled(text=millions(rows[0]))


def _learned() -> Table:
    """What methods learn in a time: trials by their steps."""
    recommended = "re-entry 1/2 + r16"
    heads = {
        "QLoRA": "qlora",
        "ladder, PEFT's time": recommended,
        "ladder, QLoRA's time on our kernels": recommended,
        "ladder, equal tokens": recommended,
        "plain ladder": "ladder",
    }

    def line(
        label: str,
        bench: str,
        steps: Sequence[int | str],
        metric: str,
        text: Callable[[float], str],
        besides: str = "",
    ) -> Line:
        """``steps`` has a text where there are no trials."""
        cells: list[Cell] = [
            Blank(header=head, text=count)
            if isinstance(count, str)
            else Mean(
                header=head,
                where={"candidate": method, "shape": shape_of(count)},
                metric=metric,
                text=text,
                besides=besides,
            )
            for (head, method), count in zip(heads.items(), steps, strict=True)
        ]
        untrained = Mean(
            header="untrained",
            where={"candidate": "untrained", "shape": shape_of(0)},
            metric=metric,
            text=text,
            seeds=False,
        )
        known = bench.startswith("learning/docstrings")
        first = untrained if known else Blank(header="untrained")
        return Line((label,), {"bench": bench, "model": base_of("calibrated")}, [first, *cells])

    def share(value: float) -> str:
        return f"{100 * value:.1f} %"

    tasks = "learning/tasks/"
    lines = [
        line("docstrings, perplexity of the answers (lower is better)",
             "learning/docstrings/docstrings", (40, 131, 56, 40, 107), "perplexity",
             lambda value: f"{value:.1f}"),
        line("WordNet glosses to 25 classes, accuracy", f"{tasks}nlu",
             (60, "not run: ahead already", 84, 60, 161), "accuracy", share),
        line("word problems with their steps, right answers of 100 (loss in nats a token)",
             f"{tasks}maths", (60, 225, 84, 60, 161), "exact_match",
             lambda value: f"{100 * value:.1f}", "loss"),
        line("first wrong step of a solution, accuracy (always \"none\": 50 %)", f"{tasks}critic",
             (60, "not run", 84, 60, 161), "accuracy", share),
    ]  # fmt: skip
    return Table(
        name="learned",
        source=LEARNING,
        heads=("held out",),
        lines=lines,
        columns=lines[0].cells or (),
    )


def _trials() -> Table:
    """Every trial of the study, for prose to cite."""

    def lines(rows: Sequence[Row]) -> list[Line]:
        trials = dict.fromkeys((row.bench, row.model, row.candidate, row.shape) for row in rows)
        return [
            Line(
                (bench.removeprefix("learning/"), model.rpartition(", ")[2], candidate, shape),
                {"bench": bench, "model": model, "candidate": candidate, "shape": shape},
            )
            for bench, model, candidate, shape in trials
        ]

    texts: Mapping[str, Callable[[float], str]] = {
        "perplexity": lambda value: f"{value:.2f}",
        "loss": lambda value: f"{value:.3f}",
        "accuracy": lambda value: f"{100 * value:.1f} %",
        "exact_match": lambda value: f"{100 * value:.1f} %",
        "steps": lambda value: f"{value:.1f}",
    }
    return Table(
        name="trials",
        source=LEARNING,
        heads=("study", "base", "method", "trained for"),
        lines=lines,
        columns=[
            Mean(header=metric, metric=metric, text=text, seeds=False, optional=True)
            for metric, text in texts.items()
        ],
    )


def _planner() -> Table:
    """What the planner says against what was counted."""
    counted, planned = "counted", "planned"

    def lines(rows: Sequence[Row]) -> list[Line]:
        steps = dict.fromkeys((row.model, row.shape) for row in rows)
        return [
            Line((model, shape), {"model": model, "shape": shape, "candidate": counted})
            for model, shape in steps
        ]

    def plan(header: str, candidate: str) -> Column:
        return Column(
            header=header, metrics=("bytes",), text=gigabytes, where={"candidate": candidate}
        )

    return Table(
        name="planner",
        source=Source(
            file="planner.csv", command="python -m bench.planner", evidence=("modelled",)
        ),
        heads=("model", "step"),
        lines=lines,
        columns=(
            plan("counted", counted),
            plan("planned", planned),
            plan("QLoRA, planned", "QLoRA, planned"),
            plan("QLoRA with gradient checkpointing, planned", "QLoRA, checkpointing, planned"),
        ),
    )


def _quantization() -> Table:
    labels = {
        "float32": "float32",
        "NF4 to nearest": "NF4, rounded to nearest",
        "NF4 calibrated": "NF4, calibrated",
        "NF4 to nearest, down in 8 bits": "NF4, rounded to nearest, the down projections in 8 bits",
    }
    texts = ("source code, 6138", "licences, 6138", "answers in chats, 899")
    return Table(
        name="quantization",
        source=Source(
            file="quantization.csv",
            command="python -m bench.quantization --rows 6",
            where={"model": _SMOL},
        ),
        lines=[Line((label,), {"candidate": name}) for name, label in labels.items()],
        columns=(
            Column(
                header="size of the layers",
                metrics=("bytes",),
                text=lambda row: f"{row.median / 1e6:,.1f} MB",
                where={"shape": "linear layers"},
            ),
            *(
                Column(
                    header=text.partition(",")[0],
                    metrics=("perplexity",),
                    text=lambda row: f"{row.median:.2f}",
                    where={"shape": f"{text} tokens in 6 rows"},
                )
                for text in texts
            ),
        ),
    )


_ALL_TABLES: Sequence[Table] = (
    _comparison(),
    _train_step("train-step-float32", _SMOL, "float32", PROCESSOR, _STEP),
    _train_step("train-step-bfloat16", _SMOL, "bfloat16", PROCESSOR, _STEP),
    *(
        _train_step(
            f"train-step-{dtype}-avx2", _SMOL, dtype, HELD_TO_AVX2, _AVX2, context=_AVX2_CONTEXT
        )
        for dtype in _SHORT
    ),
    *(
        _train_step(f"train-step-1.5b-{dtype}", _QWEN, dtype, PROCESSOR, f"{_STEP} {_SHAPE}")
        for dtype in ("float32", "bfloat16")
    ),
    *_contexts("float32"),
    *_contexts("bfloat16"),
    _long_ops(),
    *(
        make(f"{kind}-{dtype}{suffix}", dtype, machine, _OPS + option)
        for kind, make in (("ops", _ops), ("every-op", _every_op))
        for machine, suffix, option in ((PROCESSOR, "", ""), (HELD_TO_AVX2, "-avx2", " --isa avx2"))
        for dtype in ("float32", "bfloat16")
    ),
    _gpu_step(),
    _gpu_memory(),
    _smallest(),
    _tap_cache(),
    _learning_cost(),
    _learned(),
    _trials(),
    _planner(),
    _quantization(),
)


def _drawn(dtype: str, short: str) -> list[Plot]:
    about = f"SmolLM2-135M, {short}"
    return [
        AgainstContext(
            name=f"memory-context-{dtype}",
            title=f"Memory of a training step beyond the weights ({about})",
            source=_steps(dtype, _ACROSS_CONTEXTS),
            methods=_ACROSS,
            metric=_LIVE,
            value=lambda row: row.median / 1e9,
            label="live bytes beyond the weights, GB",
        ),
        AgainstContext(
            name=f"speed-context-{dtype}",
            title=f"Speed of training, loss on every token ({about})",
            source=_steps(dtype, _ACROSS_CONTEXTS),
            methods=_ACROSS,
            metric="seconds",
            value=tokens_per_second,
            label="tokens/s",
        ),
        Frontier(
            name=f"frontier-{dtype}",
            title=f"Speed against memory, 2,048 tokens, loss on every token ({about})",
            source=_steps(dtype, _STEP, shape=_EVERY),
        ),
        Timeline(
            name=f"timeline-{dtype}",
            title=f"What lives over one step of 2,048 tokens ({about})",
            source=Source(
                file="timeline.csv",
                command="python -m bench.train_step --timeline ladder QLoRA",
                where={
                    "bench": "train_step_timeline", "model": _SMOL, "dtype": dtype, "shape": _EVERY,
                },
            ),
        ),
        Roofline(
            name=f"roofline-{dtype}",
            title=f"Operations at Qwen2.5-7B's shapes under the processor's roof ({short})",
            source=Source(file="ops.csv", command=_OPS, evidence=("measured", "modelled")),
            model="Qwen2.5-7B",
            dtype=dtype,
        ),
    ]  # fmt: skip


_ALL_PLOTS: Sequence[Plot] = (
    *_drawn("float32", "fp32"),
    *_drawn("bfloat16", "bf16"),
    StudyPlot(
        name="learning-frontier",
        title="Perplexity of docstrings against training time, by method",
        fill=draw_frontier,
        size=(8.0, 4.8),
    ),
    StudyPlot(
        name="learning-scaling",
        title="Loss against trained parameters and against compute, by method",
        fill=draw_scaling,
        size=(10.0, 4.5),
    ),
)

TABLES: Mapping[str, Table] = {table.name: table for table in _ALL_TABLES}
"""By name."""

PLOTS: Mapping[str, Plot] = {plot.name: plot for plot in _ALL_PLOTS}
"""By name."""
