"""Steps of large models in little memory, for real on a CPU: each in a process of its own.

    python -m bench.smallest                             a step of Qwen2.5-7B's shape, resident and
                                                         streamed, each under a hard limit
    python -m bench.smallest --model Llama-3.1-70B --layers 4 --weights streamed --limit 5
    python -m bench.smallest --time                      seconds of a streamed step against resident

The base has random weights and lies in an NF4 file, which is written first, under ``--folder``. A
step is 2,048 tokens with a loss on each, the second one of its optimizer; its ladder is
``LadderConfig.lst()`` in float32, its optimizer AdamW with states of 8 bits. Taps wait on disk, the
side pass recomputes, layers take tokens in slices, gradients are freed as they are applied.

Bytes are those of live tensors (``ladder_kernels.memory.meter``); beside them stands the process's
largest anonymous resident memory, sampled. The limit (``RLIMIT_DATA``) holds for all the memory
that the process maps for itself, touched or not: what goes beyond fails. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import rows as results
from bench.timing import Quantiles, alternate

__all__ = ["Step", "random_base", "run_step"]

_FILE = "smallest.csv"
_SLICE = 512
# Of a first step, which makes the optimizer's states.
_FEW_TOKENS = 64
_REDUCTION = 16
_LIMITS = {"resident": 6.0, "streamed": 2.5}
_HEADER = [
    "model", "layers", "weights", "limit", "weights", "taps", "ladder", "optimizer", "transients",
    "peak of tensors", "process, anonymous", "a step",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to run.

    Attributes:
        base: Folder of the base.
        weights: Where they live, "resident" or "streamed".
        context: Tokens.
        limit: Bytes that the process may map for itself, or ``None``.
        every: Layers from one rung to the next.
        threads: Of the process.
    """

    base: Path
    weights: str
    context: int = 2048
    limit: int | None = None
    every: int = 1
    threads: int = 2


def random_base(
    name: str,
    folder: Path,
    *,
    layers: int | None = None,
    quantize_head: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a base of a known shape with random NF4 weights, unless it is there.

    Args:
        name: Of the shape.
        folder: Where bases are kept.
        layers: Keep so many layers of it; default all.
        quantize_head: Whether a head that is not the embeddings is NF4, too; transformers does not
            load such a file.
        dtype: Of what is not NF4.

    Returns:
        The base's folder.
    """
    from bench.random_weights import RandomSource
    from ladder_kernels.models.architecture import Architecture
    from ladder_kernels.models.backbone import Quantization
    from ladder_kernels.models.saving import quantize_model
    from ladder_kernels.models.shapes import config_of

    config = config_of(name)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    quantize_head = quantize_head and not config.tie_word_embeddings
    base = folder / f"{name}-{config.num_hidden_layers}"
    if not quantize_head and not config.tie_word_embeddings:
        base = base.with_name(f"{base.name}-float-head")
    if dtype != torch.bfloat16:
        base = base.with_name(f"{base.name}-{str(dtype).removeprefix('torch.')}")
    if not base.exists():
        shapes = Architecture.of(config).shapes(tied=bool(config.tie_word_embeddings))
        quantize_model(
            RandomSource(shapes, quantize_head=quantize_head),
            config,
            base,
            quantization=Quantization(quantize_head=quantize_head),
            dtype=dtype,
        )
    return base


@contextmanager
def _model(step: Step) -> Iterator[tuple[Any, Any]]:
    """The model and its optimizer, whose states are there."""
    from bitsandbytes.optim import AdamW8bit

    from ladder_kernels import LadderConfig, LadderForCausalLM
    from ladder_kernels.training.freeing import GradientFreeing

    with tempfile.TemporaryDirectory(dir=step.base.parent) as taps:
        model = LadderForCausalLM.from_pretrained(
            step.base,
            ladder=LadderConfig.lst(every=step.every, reduction=_REDUCTION),
            weights=step.weights,
            embeddings="host",
            taps="disk",
            tap_cache=taps,
            dtype="bfloat16",
        )
        model.train()
        model.gradient_checkpointing = True
        model.backbone.slice_tokens = _SLICE
        optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        GradientFreeing(optimizer, lambda: True)
        take_step(model, _FEW_TOKENS, 0)
        yield model, optimizer


def take_step(model: Any, context: int, seed: int) -> float:
    """A training step on random tokens, whose taps no other seed has; returns the loss."""
    shape = (1, context)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


def run_step(step: Step) -> dict[str, Any]:
    """Take a step in this process, which should be a fresh one; returns what it took."""
    if step.limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (step.limit, step.limit))
    torch.set_num_threads(step.threads)
    from bench.memory import AnonymousMemory
    from ladder_kernels.memory.allocation import return_freed_memory
    from ladder_kernels.memory.meter import Meter

    return_freed_memory()

    anonymous = AnonymousMemory()
    with anonymous.sampled(), _model(step) as (model, optimizer), Meter(model, optimizer) as meter:
        start = time.perf_counter()
        loss = take_step(model, step.context, 1)
        seconds = time.perf_counter() - start
        trained = model.num_parameters(only_trainable=True)
    return {
        "usage": meter.peak.usage._asdict(),
        "peak": meter.peak.usage.total,
        "operation": meter.peak.operation,
        "anonymous": anonymous.most,
        "seconds": seconds,
        "loss": loss,
        "trained": trained,
    }


def _in_own_process(step: Step) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_step, (step,))


def compare_times(base: Path, context: int, turns: int) -> dict[str, Quantiles]:
    """Seconds of steps with the weights resident and streamed, taking turns in this process.

    Raises:
        RuntimeError: If their losses are not the same, turn by turn.
    """
    losses: dict[str, list[float]] = {"resident": [], "streamed": []}
    with ExitStack() as models:
        calls = {}
        for weights, found in losses.items():
            model, _ = models.enter_context(_model(Step(base=base, weights=weights)))
            calls[weights] = partial(_noted_step, model, context, found)
        timed = alternate(calls, seconds=0.0, at_least=turns)
    if losses["resident"] != losses["streamed"]:
        raise RuntimeError(f"losses differ: {losses}; not timed")
    return timed


def _noted_step(model: Any, context: int, losses: list[float]) -> None:
    losses.append(take_step(model, context, 1 + len(losses)))


def _rows(name: str, step: Step, found: dict[str, Any], layers: int) -> list[results.Row]:
    limit = "" if step.limit is None else f" under {step.limit / 1e9:.1f} GB"
    measured = {
        f"{step.weights}{limit}, {part}": int(value)
        for part, value in (
            ("live tensors", found["peak"]),
            ("process, anonymous", found["anonymous"]),
            *((f"{part} at the peak", value) for part, value in found["usage"].items()),
        )
    }
    return results.bytes_of(
        measured, "bitsandbytes", **_about(name, step.context, layers, step.every)
    )


def _about(name: str, context: int, layers: int, every: int = 1) -> dict[str, str]:
    shape = f"B=1 S={context} layers={layers} rung every {every}"
    return {"bench": "smallest", "model": name, "shape": shape, "dtype": "bfloat16"}


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen2.5-7B", help="a shape by name")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--weights", choices=list(_LIMITS), nargs="+", default=list(_LIMITS))
    parser.add_argument("--limit", type=float, help="GB; default 6 resident, 2.5 streamed")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--every", type=int, default=1, help="layers from one rung to the next")
    parser.add_argument("--time", action="store_true", help="compare seconds, in turns")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bases"), help="of bases")
    given = parser.parse_args()
    base = random_base(given.model, given.folder.absolute(), layers=given.layers)
    layers = json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    if given.time:
        _report_times(given, base, layers)
        return
    lines, rows = [], []
    for weights in given.weights:
        limit = int(1e9 * (_LIMITS[weights] if given.limit is None else given.limit))
        step = Step(
            base=base, weights=weights, context=given.context, limit=limit, every=given.every,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        found = _in_own_process(step)
        usage = found["usage"]
        lines.append(
            [
                *(given.model, str(layers), weights, f"{limit / 1e9:.1f} GB"),
                *(
                    f"{usage[part] / 1e6:,.0f} MB"
                    for part in ("weights", "taps", "ladder", "optimizer", "transients")
                ),
                *(f"{found[part] / 1e9:.2f} GB" for part in ("peak", "anonymous")),
                f"{found['seconds']:.0f} s",
            ]
        )
        print(" | ".join(lines[-1]), f"| loss {found['loss']:.4f}", flush=True)
        print(f"  the peak is in {found['operation']}; {found['trained'] / 1e6:.1f} M are trained")
        rows += _rows(given.model, step, found, layers)
    results.report(rows, _FILE, _HEADER, lines)


def _report_times(given: Any, base: Path, layers: int) -> None:
    timed = compare_times(base, given.context, given.turns)
    rows = results.seconds(timed, **_about(given.model, given.context, layers))
    lines = [
        [
            name,
            f"{times.median:.2f} s",
            f"{given.context / times.median:.1f}",
            f"{times.median / timed['resident'].median:.3f}",
        ]
        for name, times in timed.items()
    ]
    results.report(rows, _FILE, ["weights", "a step", "tokens/s", "time, resident = 1"], lines)


if __name__ == "__main__":
    main()
