"""How little memory a training step takes on this GPU, at a 7B model's shape, and what it costs.

    python -m bench.gpu_memory                                  2,048 and 16,384 tokens
    python -m bench.gpu_memory --only "all on the host"         one of the settings

Each setting, with a ladder on every layer and one of MLP blocks on every third, beside QLoRA with
gradient checkpointing (PEFT on bitsandbytes): seconds from step to step, the most bytes that
PyTorch's allocator gave out (*allocated*) and held (*reserved*), and beside them, in one more step,
the most bytes of tensors that lived at once by the meter (``ladder_kernels.memory.meter``) and what
they were for. The difference between the meter's peak and what is allocated in its step is what the
allocator rounds up and what kernels take inside themselves, such as cuBLAS' workspace. The base has
random NF4 weights, its head included; what is trained is computed under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import functools
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ladder_kernels as lk
from bench import rows as results
from bench.gpu_step import forget, methods
from bench.methods import Trainee
from bench.random_weights import random_backbone
from bench.timing import Quantiles, check_losses, each
from bench.train_worker import random_batch, take_step
from ladder_kernels.memory.ledger import CATEGORIES, Usage
from ladder_kernels.memory.meter import Meter
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.models.shapes import config_of
from ladder_kernels.training.freeing import GradientFreeing

__all__ = ["SETTINGS", "Setting", "compare"]

_FILE = "gpu_memory.csv"
_SLICE = 1024
_RANK = 16
_RIVAL = "QLoRA (bitsandbytes), gradient checkpointing"
_PACKAGES = ("triton", "transformers", "peft", "bitsandbytes")
_HEADER = [
    "method", "tokens", "a step", "tokens/s", "allocated", "reserved", "live tensors",
    "allocated beside them", "host",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What saves memory.

    Attributes:
        weights: Where the layers' weights are.
        embeddings: Where the embeddings are.
        taps: Where taps wait.
        recompute: Whether the side pass recomputes.
        slice_tokens: Tokens of a frozen pass that are inside a layer at once.
        small_optimizer: Whether AdamW's states have 8 bits and gradients are freed as they are
            applied.
    """

    weights: str = "resident"
    embeddings: str = "device"
    taps: str = "device"
    recompute: bool = False
    slice_tokens: int | None = None
    small_optimizer: bool = False

    def model(self, backbone: NativeBackbone, ladder: lk.LadderConfig) -> Any:
        """A model in training mode; the slices are the backbone's from here on."""
        backbone.slice_tokens = self.slice_tokens
        model = lk.LadderForCausalLM.from_backbone(backbone, ladder, taps=self.taps).train()
        model.gradient_checkpointing = self.recompute
        return model

    def trainee(self, model: Any) -> Trainee:
        """The model and what trains it."""
        return Trainee(model=model, optimizer=self._optimizer(model), autocast=True)

    def _optimizer(self, model: Any) -> torch.optim.Optimizer:
        trained = [each for each in model.parameters() if each.requires_grad]
        if not self.small_optimizer:
            return torch.optim.AdamW(trained, lr=1e-3)
        from bitsandbytes.optim.adamw import AdamW8bit

        optimizer = AdamW8bit(trained, lr=1e-3)
        GradientFreeing(optimizer, lambda: True)
        return optimizer


_SMALL = {"taps": "host", "recompute": True, "slice_tokens": _SLICE}

SETTINGS: Mapping[str, Setting] = {
    "all on the host": Setting(weights="host", embeddings="host", small_optimizer=True, **_SMALL),
    "taps on the host": Setting(**_SMALL),
    "resident": Setting(),
}
"""By name. "Taps on the host" goes with recomputing and slices; "all on the host" besides with
weights and embeddings there, 8-bit AdamW and gradients that are freed as they are applied."""

_LADDERS = {
    "every layer": lk.LadderConfig.lst(every=1, reduction=16),
    "every third layer, MLP blocks": lk.LadderConfig.lst(every=3, reduction=16, block="mlp"),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one method took at one context.

    Attributes:
        times: Of a step.
        allocated: Most bytes that the allocator had given out, in the timed steps.
        reserved: Most bytes that it held.
        metered: The same as ``allocated``, in the step that the meter watched.
        live: What lived at that step's peak, by the meter.
    """

    times: Quantiles
    allocated: int
    reserved: int
    metered: int
    live: Usage

    @property
    def peak(self) -> int:
        """Bytes of live tensors at the peak."""
        return self.live.total


Make = Callable[[], Trainee]
"""Makes a model in training mode and what trains it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns how many measurements failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="Qwen2.5-7B", help="a shape by name")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of methods")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no GPU here, so nothing was measured: bench.memory counts on a CPU.")
        return 0
    return compare(
        options.model,
        device=torch.device("cuda", torch.cuda.current_device()),
        contexts=options.contexts,
        steps=options.steps,
        only=tuple(options.only),
    )


def compare(
    name: str,
    *,
    device: torch.device,
    contexts: Sequence[int],
    steps: int,
    only: tuple[str, ...] = ("",),
    settings: Mapping[str, Setting] = SETTINGS,
) -> int:
    """Measure methods, and write rows.

    Args:
        name: Of a shape, or a ``config.json``.
        device: Where.
        contexts: Tokens a step, each in its turn.
        steps: That are timed.
        only: Beginnings of the methods' names.
        settings: By name; the last one's base is the rival's, too.

    Returns:
        How many measurements failed.
    """
    failed = 0
    found: list[results.Row] = []
    lines: list[list[str]] = []
    taken: dict[str, dict[int, Measured]] = {}
    config = config_of(name)
    for method, context, make in _methods(config, device, contexts, settings, only):
        about = _about(name, context)
        batch = random_batch(config.vocab_size, context, device)
        try:
            measured = measure(make, batch, device, steps=steps)
        except Exception:  # the others may be measured all the same
            failed += 1
            print(f"{method}, {context} tokens: failed\n{traceback.format_exc()}", flush=True)
        else:
            taken.setdefault(method, {})[context] = measured
            found += rows_of(method, measured, about)
            lines.append(line_of(method, measured, context))
            print(" | ".join(lines[-1]), flush=True)
            if len(taken[method]) == len(contexts):
                found += growth(method, taken[method], name)
        results.write(found, _FILE)
        del make
        forget()
    results.report(found, _FILE, _HEADER, lines)
    return failed


def _methods(
    config: Any,
    device: torch.device,
    contexts: Sequence[int],
    settings: Mapping[str, Setting],
    only: tuple[str, ...],
) -> Iterator[tuple[str, int, Make]]:
    """Every method at every context, one base after the other."""
    places = dict.fromkeys((each.weights, each.embeddings) for each in settings.values())
    for place in places:
        chosen = {
            f"{title}: {ladder}": (setting, _LADDERS[ladder])
            for title, setting in settings.items()
            for ladder in _LADDERS
            if (setting.weights, setting.embeddings) == place
        }
        rivals = [_RIVAL] if place == list(places)[-1] else []
        if not any(method.startswith(only) for method in (*chosen, *rivals)):
            continue
        backbone = random_backbone(
            config,
            device=device,
            quantize_head=not config.tie_word_embeddings,
            weights=place[0],
            embeddings=place[1],
        )
        for method, (setting, ladder) in chosen.items():
            if method.startswith(only):
                for context in contexts:
                    yield method, context, functools.partial(_ladder, backbone, setting, ladder)
        for method in rivals:
            if method.startswith(only):
                for context in contexts:
                    yield method, context, functools.partial(_rival, backbone, method)
        backbone.close()
        del backbone, chosen
        forget()


def _ladder(backbone: NativeBackbone, setting: Setting, ladder: lk.LadderConfig) -> Trainee:
    return setting.trainee(setting.model(backbone, ladder))


def _rival(backbone: NativeBackbone, method: str) -> Trainee:
    return Setting().trainee(methods(backbone, _RANK)[method]())


def measure(
    make: Make, batch: dict[str, torch.Tensor], device: torch.device, *, steps: int
) -> Measured:
    """Train for a few steps, and take their time and memory.

    Args:
        make: Makes the model and what trains it.
        batch: Of every step.
        device: Where the model is.
        steps: That are timed, after two that are not.

    Raises:
        RuntimeError: The loss is not finite, or does not fall.
    """
    trainee = make()
    losses: list[torch.Tensor] = []
    step = functools.partial(take_step, trainee, batch, losses)
    step()
    memory = _Allocator(device)
    times = each(step, device, calls=steps)
    allocated, reserved = memory.most()
    memory = _Allocator(device)
    with Meter(trainee.model, trainee.optimizer, device=device) as meter:
        meter.restart()
        step()
    metered, _ = memory.most()
    check_losses([loss.item() for loss in losses])
    return Measured(
        times=times,
        allocated=allocated,
        reserved=reserved,
        metered=metered,
        live=meter.peak.usage,
    )


class _Allocator:
    """The most bytes that PyTorch's allocator of a GPU gives out and holds, from here on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)

    def most(self) -> tuple[int, int]:
        """Allocated and reserved; zeros on a CPU."""
        if self._device.type != "cuda":
            return 0, 0
        torch.cuda.synchronize(self._device)
        return (
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.max_memory_reserved(self._device),
        )


def _about(name: str, context: int) -> dict[str, str]:
    return {
        "bench": "gpu_memory",
        "model": f"{name}, random weights",
        "shape": f"B=1 S={context} loss on 1 in 1",
        "dtype": "bfloat16 autocast",
    }


def rows_of(method: str, taken: Measured, about: Mapping[str, str]) -> Iterator[results.Row]:
    """Measured rows: seconds of a step, and bytes."""
    yield from results.seconds({method: taken.times}, *_PACKAGES, **about)
    parts = {f"live {part} at the peak": getattr(taken.live, part) for part in CATEGORIES}
    noted = {
        "allocated": taken.allocated,
        "reserved": taken.reserved,
        "live tensors": taken.peak,
        "allocated in the metered step": taken.metered,
        "host tensors that the meter saw": taken.live.host,
        **parts,
    }
    for note, number in noted.items():
        if number:
            yield from results.bytes_of({method: number}, *_PACKAGES, note=note, **about)


def growth(method: str, taken: Mapping[int, Measured], name: str) -> Iterator[results.Row]:
    """Rows of the bytes that each token of context costs, from the least context to the most."""
    least, most = min(taken), max(taken)
    if least == most:
        return
    about = _about(name, least) | {"shape": f"B=1 S={least}..{most} loss on 1 in 1"}
    for note, field in (("allocated", "allocated"), ("live tensors", "peak")):
        grown = getattr(taken[most], field) - getattr(taken[least], field)
        per_token = round(grown / (most - least))
        print(f"{method}: {per_token:,} bytes a token more, {note}", flush=True)
        if per_token:
            note = f"{note}, per extra token"
            yield from results.bytes_of({method: per_token}, *_PACKAGES, note=note, **about)


def line_of(method: str, taken: Measured, context: int) -> list[str]:
    """A line of the table."""
    return [
        method,
        f"{context:,}",
        f"{taken.times.median * 1e3:.1f} ms",
        f"{context / taken.times.median:,.0f}",
        f"{taken.allocated / 1e9:.3f} GB",
        f"{taken.reserved / 1e9:.3f} GB",
        f"{taken.peak / 1e9:.3f} GB",
        f"{(taken.metered - taken.peak) / 1e6:.1f} MB",
        f"{taken.live.host / 1e9:.2f} GB",
    ]


if __name__ == "__main__":
    sys.exit(min(main(), 1))
