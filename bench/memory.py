"""How much memory a training step takes: what lives at every moment, and what for.

    python -m bench.memory Qwen2.5-7B                          on a GPU that is not there: traced
    python -m bench.memory SmolLM2-135M --device cpu           for real, with random weights
    python -m bench.memory Qwen2.5-7B --steps 2 --plot step    step-light.png and step-dark.png

Bytes are those of live tensors (``ladder_kernels.memory.meter``). On the CPU, the process's
anonymous memory is sampled beside them: that of tensors, of kernels' scratch, of Python and of what
the allocator keeps. The base's weights are random. The first step makes the optimizer's states; the
last one is reported.

Here, too: the memory that one call takes beyond what is there before it and what it returns.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ladder_kernels as lk
from bench.random_weights import random_backbone
from ladder_kernels.memory.ledger import CATEGORIES, Moment, Usage
from ladder_kernels.memory.meter import Meter
from ladder_kernels.memory.peak import peak_memory_bytes
from ladder_kernels.memory.tracing import fake_cuda
from ladder_kernels.models.loading import backbone_from_config
from ladder_kernels.models.shapes import config_of
from ladder_kernels.training.freeing import GradientFreeing

__all__ = ["AnonymousMemory", "Measured", "bytes_beyond", "draw", "measure", "process_bytes"]

_STATUS = Path("/proc/self/status")
_SAMPLES = 0.02


def bytes_beyond(call: Callable[[], list[torch.Tensor]]) -> int:
    """Bytes of the process's largest resident set during ``call``, beyond inputs and outputs.

    Meant for a process of its own, in which no larger call was made: memory that the allocator kept
    from an earlier one would not be counted. Linux only.

    Args:
        call: Returns its outputs, whose bytes are taken off.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the largest so far
    before = process_bytes("VmRSS")
    outputs = call()
    most = peak_memory_bytes()
    return most - before - sum(output.nbytes for output in outputs)


def process_bytes(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``, such as ``"RssAnon"``. Linux only."""
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


class AnonymousMemory:
    """Samples the process's anonymous resident memory, which no file is behind. Linux only.

    Attributes:
        most: Bytes, the most of all samples.
    """

    def __init__(self) -> None:
        self.most = 0

    @contextlib.contextmanager
    def sampled(self) -> Iterator[None]:
        """Sample while this is entered."""
        done = threading.Event()

        def sample() -> None:
            while True:
                self.most = max(self.most, process_bytes("RssAnon"))
                if done.wait(_SAMPLES):
                    return

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the last step took.

    Attributes:
        peak: When the total was largest.
        largest: The most of each kind, each at its own moment.
        timeline: After every change.
        loss: Of the step; ``None`` where numbers were not computed.
        anonymous: Bytes of the process, sampled; ``None`` where nothing ran.
    """

    peak: Moment
    largest: Usage
    timeline: Sequence[Moment]
    loss: float | None
    anonymous: int | None


def measure(
    config: Any,
    ladder: lk.LadderConfig,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    context: int = 2048,
    steps: int = 2,
    answers: int = 1,
    quantize_head: bool = True,
    recompute: bool = False,
    accumulation: int = 1,
    slice_tokens: int | None = None,
    free_gradients: bool = False,
    target: str = "sm_86",
    placement: Mapping[str, str | None] | None = None,
    taps: Mapping[str, Any] | None = None,
) -> Measured:
    """Take training steps with a fused AdamW and count.

    Args:
        config: A transformers configuration.
        ladder: Beside it.
        device: "cuda": traced, on no GPU; "cpu": for real.
        dtype: Compute dtype.
        batch: Rows.
        context: Tokens a row.
        steps: How many; the last one counts.
        answers: Loss on one token in so many.
        quantize_head: Whether the head is NF4; a head that is the embeddings stays float.
        recompute: Whether activations are recomputed in the backward pass.
        accumulation: Micro-batches of a step.
        slice_tokens: Tokens at a time inside a frozen layer.
        free_gradients: Whether gradients are freed as they are applied.
        target: The GPU whose kernels are traced.
        placement: ``weights`` and ``embeddings`` as ``backbone_from_config`` takes them; traced
            only.
        taps: Options of ``LadderForCausalLM.from_backbone`` about taps.
    """
    quantize_head = quantize_head and not config.tie_word_embeddings
    options: dict[str, Any] = {"dtype": dtype, "quantize_head": quantize_head}
    with contextlib.ExitStack() as entered:
        if device == "cpu":
            backbone = random_backbone(config, device="cpu", **options)
        else:
            place = entered.enter_context(fake_cuda())
            backbone = backbone_from_config(config, device=place, **options, **(placement or {}))  # type: ignore[arg-type]
        model = lk.LadderForCausalLM.from_backbone(backbone, ladder, **(taps or {}))
        model.train()
        model.gradient_checkpointing = recompute
        backbone.slice_tokens = slice_tokens
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], fused=True
        )
        done = 0
        if free_gradients:
            freeing = GradientFreeing(optimizer, lambda: done % accumulation == 0)
            entered.callback(freeing.close)
        batches = []
        for index in range(accumulation):
            ids = torch.arange(batch * context, device=backbone.device).view(batch, context)
            ids = (ids + index) % config.vocab_size
            labels = ids.masked_fill(ids % answers != 0, -100)
            batches.append({"input_ids": ids, "labels": labels})
        anonymous = AnonymousMemory()
        meter = entered.enter_context(Meter(model, optimizer, target=target))
        if device == "cpu":
            entered.enter_context(anonymous.sampled())
        loss = None
        for _ in range(steps):
            meter.restart()
            anonymous.most = 0
            if backbone.streams and accumulation > 1:
                model.prefill(batches)
            for each in batches:
                done += 1
                found: Any = model(**each).loss
                found.backward()
                loss = float(found.detach()) if device == "cpu" else None
                del found
            optimizer.step()
            optimizer.zero_grad()
    return Measured(
        peak=meter.peak,
        largest=meter.largest(),
        timeline=meter.timeline,
        loss=loss,
        anonymous=anonymous.most or None,
    )


def draw(timeline: Sequence[Moment], title: str, path: Path) -> list[Path]:
    """Draw what lives over a step, stacked, for light pages and for dark ones.

    Args:
        timeline: Of a meter.
        title: Of the plot.
        path: Without what follows: ``-light.png`` and ``-dark.png``.

    Returns:
        The files.
    """
    from bench import plots

    def fill(figure: Any, theme: Any) -> None:
        axes = figure.add_axes((0.08, 0.11, 0.75, 0.81))
        heights = {
            name: [getattr(moment.usage, name) / 1e9 for moment in timeline] for name in CATEGORIES
        }
        plots.stack(axes, range(len(timeline)), heights, step=True)
        peak = max(moment.usage.total for moment in timeline) / 1e9
        axes.axhline(peak, linestyle="--", linewidth=1, color=theme.ink)
        axes.annotate(f"peak {peak:.2f} GB", (0, peak), (2, 3), textcoords="offset points")
        axes.set(title=title, xlabel="changes, in order", ylabel="live bytes of tensors, GB")
        axes.set_xlim(0, len(timeline) - 1)
        axes.set_ylim(0, 1.1 * peak)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, frameon=False)

    return plots.save(path, (9, 4.8), fill)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a known name, a config.json, or a folder with one")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--target", default="sm_86", help="the GPU that is traced")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--answers", type=int, default=1, help="loss on one token in so many")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ladder", choices=["lst", "recommended"], default="lst")
    parser.add_argument("--reduction", type=int, default=16)
    parser.add_argument("--float-head", action="store_true", help="leave the head in float")
    parser.add_argument("--weights", choices=["resident", "host", "streamed"], default="resident")
    parser.add_argument("--embeddings", choices=["device", "host"])
    parser.add_argument("--taps", choices=["device", "host"], default="device")
    parser.add_argument("--tap-dtype", choices=["bfloat16", "int8"], default="bfloat16")
    parser.add_argument("--slice-tokens", type=int)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--free-gradients", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="in the backward pass")
    parser.add_argument("--plot", type=Path, help="beginning of the plots' names")
    given = parser.parse_args()
    if given.device == "cpu" and (given.weights, given.embeddings) != ("resident", None):
        parser.error("on the CPU, weights are resident here; see python -m bench.smallest")
    ladder = {"lst": lk.LadderConfig.lst, "recommended": lk.LadderConfig.recommended}[given.ladder]
    measured = measure(
        config_of(given.model),
        ladder(reduction=given.reduction),
        device=given.device,
        dtype=getattr(torch, given.dtype),
        batch=given.batch,
        context=given.context,
        steps=given.steps,
        answers=given.answers,
        quantize_head=not given.float_head,
        recompute=given.recompute,
        accumulation=given.accumulation,
        slice_tokens=given.slice_tokens,
        free_gradients=given.free_gradients,
        target=given.target,
        placement={"weights": given.weights, "embeddings": given.embeddings},
        taps={"taps": given.taps, "tap_dtype": given.tap_dtype},
    )
    kind = "measured" if given.device == "cpu" else f"traced for {given.target}"
    print(f"{given.model}, {given.batch} x {given.context} tokens, step {given.steps}, {kind}\n")
    print(f"{'':12}{'at the peak':>14}{'at most':>14}   MB")
    for name in (*CATEGORIES, "mapped", "host"):
        at_peak, most = (getattr(each, name) for each in (measured.peak.usage, measured.largest))
        print(f"{name:12}{at_peak / 1e6:14,.1f}{most / 1e6:14,.1f}")
    print(f"{'peak':12}{measured.peak.usage.total / 1e6:14,.1f}   in {measured.peak.operation}")
    if measured.anonymous is not None:
        print(f"{'process':12}{measured.anonymous / 1e6:14,.1f}   anonymous, sampled")
        print(f"loss {measured.loss:.4f}")
    if given.plot is not None:
        title = f"{given.model}, {given.batch} x {given.context} tokens, {given.ladder} ladder"
        for file in draw(measured.timeline, title, given.plot):
            print(file)


if __name__ == "__main__":
    main()
