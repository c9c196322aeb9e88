"""Whole training steps on this GPU, at the shape of a 7B model with random NF4 weights.

    python -m bench.gpu_step                            2,048 tokens, bf16, loss on every token
    python -m bench.gpu_step --only ladder --profile runs/profiles     and where the time goes

QLoRA is PEFT on bitsandbytes' NF4 layers in transformers, with and without gradient checkpointing,
and once more with ``accelerate_4bit``. All methods share one frozen base and have the same tokens
and AdamW; what is trained is computed under bfloat16 autocast from float32 weights, as a Trainer
with ``bf16=True`` does. Each is measured by itself: seconds from step to step by events of the GPU,
and the most bytes that PyTorch's allocator gave out (*allocated*, the base included) and held
(*reserved*). Before anything is timed, each must lower its loss on the batch.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ladder_kernels as lk
from bench import rows as results
from bench.methods import Trainee
from bench.qlora import peft_qlora_on
from bench.random_weights import random_backbone
from bench.timing import Quantiles, check_losses, each
from bench.train_worker import random_batch, take_step
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.models.shapes import config_of

_HEADER = [
    "method", "trained", "a step", "tokens/s", "allocated", "reserved", "loss, first and last",
]  # fmt: skip
_FILE = "gpu_step.csv"
_FIRST_STEPS = 4

Make = Callable[[], Any]
"""Makes a model in training mode."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one method took.

    Attributes:
        times: Of a step.
        allocated: Most bytes that tensors held at once; 0 on a CPU.
        reserved: Most bytes that the allocator held.
        trained: Parameters.
        losses: Of all steps, in order.
    """

    times: Quantiles
    allocated: int
    reserved: int
    trained: int
    losses: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns how many methods failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="Qwen2.5-7B", help="a shape by name")
    parser.add_argument("--context", type=int, default=2048, help="tokens a step")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA, on all linear layers")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of methods")
    parser.add_argument("--profile", type=Path, help="folder for profiles of methods")
    parser.add_argument("--profiled", nargs="+", help="their names; default: all")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no GPU here, so nothing was measured: bench.train_step runs on a CPU.")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    backbone = random_backbone(config_of(options.model), device=device)
    return compare(
        backbone,
        name=options.model,
        context=options.context,
        rank=options.rank,
        steps=options.steps,
        only=tuple(options.only),
        profile=options.profile,
        profiled=options.profiled,
    )


def compare(
    backbone: NativeBackbone,
    *,
    name: str,
    context: int,
    rank: int,
    steps: int,
    only: tuple[str, ...] = ("",),
    profile: Path | None = None,
    profiled: Sequence[str] | None = None,
) -> int:
    """Measure methods, and write rows.

    Args:
        backbone: The base of all of them.
        name: Of its shape.
        context: Tokens a step.
        rank: Of LoRA.
        steps: That are timed.
        only: Beginnings of the methods' names.
        profile: Folder for profiles, if any are wanted.
        profiled: The methods that they are of; default all.

    Returns:
        How many failed.
    """
    batch = random_batch(backbone.config.vocab_size, context, backbone.device)
    failed = 0
    found: list[results.Row] = []
    lines: list[list[str]] = []
    for method, make in methods(backbone, rank).items():
        if not method.startswith(only):
            continue
        try:
            taken = measure(make, batch, backbone.device, steps=steps)
            found += rows_of(method, taken, name=name, context=context)
            results.write(found, _FILE)
            lines.append(line_of(method, taken, context))
            print(" | ".join(lines[-1]), flush=True)
            if profile is not None and (profiled is None or method in profiled):
                _profile(make, batch, profile / f"{method.replace(' ', '_')}.txt")
        except Exception:  # the others may be measured all the same
            failed += 1
            print(f"{method}: failed\n{traceback.format_exc()}", flush=True)
        forget()
    results.report(found, _FILE, _HEADER, lines)
    return failed


def methods(backbone: NativeBackbone, rank: int) -> Mapping[str, Make]:
    """How to make each method's model, by name."""
    layers = backbone.num_layers
    every = lk.LadderConfig.lst(every=1, reduction=16)
    third = lk.LadderConfig.lst(every=3, reduction=16, block="mlp")
    recommended = lk.LadderConfig.recommended()
    everywhere = lk.LadderConfig.adapters(layers, rank)

    def ladder(
        config: lk.LadderConfig,
        activations: str = "exact",
        *,
        recompute: bool = False,
        compiled: bool = False,
    ) -> Make:
        def make() -> Any:
            model: Any = lk.LadderForCausalLM.from_backbone(
                backbone, config, activations=activations
            )
            model.gradient_checkpointing = recompute
            if compiled:
                model.ladder.compile(fullgraph=True)
            return model.to(backbone.device).train()

        return make

    def qlora(checkpointing: bool, ours: bool = False) -> Make:
        def make() -> Any:
            model = peft_qlora_on(backbone, rank=rank, checkpointing=checkpointing)
            return lk.accelerate_4bit(model) if ours else model

        return make

    return {
        "ladder": ladder(every),
        "ladder, int8 activations": ladder(every, "int8"),
        "ladder of every third layer, MLP blocks": ladder(third),
        "ladder of every third layer, MLP blocks, int8 activations": ladder(third, "int8"),
        "compiled ladder of every third layer, MLP blocks": ladder(third, compiled=True),
        "recommended ladder": ladder(recommended),
        "recommended ladder, int8 activations": ladder(recommended, "int8"),
        "recommended ladder, recomputed": ladder(recommended, recompute=True),
        "our adapters on all layers": ladder(everywhere),
        "our adapters on all layers, recomputed": ladder(everywhere, recompute=True),
        "QLoRA (bitsandbytes)": qlora(False),
        "QLoRA (bitsandbytes), gradient checkpointing": qlora(True),
        "QLoRA with accelerate_4bit": qlora(False, True),
        "QLoRA with accelerate_4bit, gradient checkpointing": qlora(True, True),
    }


def measure(
    make: Make, batch: dict[str, torch.Tensor], device: torch.device, *, steps: int
) -> Measured:
    """Train for a few steps, and take their time and memory.

    Args:
        make: Makes the model.
        batch: Of every step.
        device: Where the model is.
        steps: That are timed, after a few that are not.

    Raises:
        RuntimeError: The loss is not finite, or does not fall.
    """
    trainee = _trainee(make)
    losses: list[torch.Tensor] = []
    step = functools.partial(take_step, trainee, batch, losses)
    for _ in range(_FIRST_STEPS):
        step()
    check_losses([loss.item() for loss in losses])
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = each(step, device, calls=steps)
    found = [loss.item() for loss in losses]
    check_losses(found)
    return Measured(
        times=times,
        allocated=torch.cuda.max_memory_allocated(device) if gpu else 0,
        reserved=torch.cuda.max_memory_reserved(device) if gpu else 0,
        trained=trainee.trained,
        losses=found,
    )


def _trainee(make: Make) -> Trainee:
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    return Trainee(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3), autocast=True)


def rows_of(method: str, taken: Measured, *, name: str, context: int) -> Iterator[results.Row]:
    """Measured rows: seconds of a step and, on a GPU, bytes."""
    about = {
        "bench": "gpu_step",
        "model": f"{name}, random weights",
        "shape": f"B=1 S={context} loss on 1 in 1",
        "dtype": "bfloat16 autocast",
    }
    packages = ("triton", "transformers", "peft", "bitsandbytes")
    yield from results.seconds({method: taken.times}, *packages, **about)
    for note, number in (("allocated", taken.allocated), ("reserved", taken.reserved)):
        if number:
            yield from results.bytes_of({method: number}, *packages, note=note, **about)


def line_of(method: str, taken: Measured, context: int) -> list[str]:
    """A line of the table."""
    return [
        method,
        f"{taken.trained / 1e6:.1f} M",
        f"{taken.times.median * 1e3:.1f} ms",
        f"{context / taken.times.median:,.0f}",
        f"{taken.allocated / 1e9:.2f} GB",
        f"{taken.reserved / 1e9:.2f} GB",
        f"{taken.losses[0]:.3f}, {taken.losses[-1]:.3f}",
    ]


def _profile(make: Make, batch: dict[str, torch.Tensor], path: Path) -> None:
    """Write where the time of a step goes: kernels by time, and operations by the host's time."""
    trainee = _trainee(make)
    for _ in range(2):
        take_step(trainee, batch, [])
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        take_step(trainee, batch, [])
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(
            averages.table(sort_by=key, row_limit=60, max_name_column_width=80)
            for key in ("self_cuda_time_total", "self_cpu_time_total")
        ),
        encoding="utf-8",
    )


def forget() -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(min(main(), 1))
