"""Whole training steps of SmolLM2-135M: a ladder, on native and reference operations, and QLoRA.

    python -m bench.train_step                      fp32, 2,048 tokens, loss on every token
    python -m bench.train_step --dtype bfloat16 --answers 10     loss on one token in ten

QLoRA is PEFT on bitsandbytes' NF4 layers in transformers, with and without gradient checkpointing,
and once more with ``accelerate_4bit``. All candidates have the same NF4 base, the same tokens and
AdamW, and they take turns in one process. Plain LST and QST are what their papers describe, in
ordinary PyTorch on the same layers (:mod:`bench.plain_ladders`). "our adapters on all layers" is
the same QLoRA on this library's layers; "recommended ladder" re-enters the model below its upper
half. Before anything is timed, each must lower its loss on the batch. "packed" has the same tokens
as eight documents; "int8 activations" rounds what enters the frozen layers to 8 bits.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ladder_kernels as lk
from bench import rows as results
from bench.plain_ladders import PlainLadder, PlainLST, PlainQST
from bench.qlora import peft_qlora, transformers_base
from bench.timing import alternate
from ladder_kernels.demo import find_weights

_DOCUMENTS = 8


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--context", type=int, default=2048, help="tokens a step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--answers", type=int, default=1, help="loss on one token in so many")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA, on all linear layers")
    parser.add_argument("--seconds", type=float, default=150.0, help="for all turns")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)

    with tempfile.TemporaryDirectory() as folder:
        candidates = _candidates(Path(folder) / "base", dtype, options)
        timed = alternate(
            {name: step for name, (step, _) in candidates.items()},
            seconds=options.seconds,
            at_least=3,
        )
    lines = []
    fastest = timed["ladder"].median
    for name, quantiles in timed.items():
        trained = candidates[name][1]
        rate = options.context / quantiles.median
        lines.append(
            [
                name,
                f"{trained / 1e6:.2f} M",
                f"{quantiles.median:.2f} s",
                f"{rate:,.0f}",
                f"{quantiles.median / fastest:.2f}x",
            ]
        )
    header = ["method", "trained", "a step", "tokens/s", "time, ladder = 1"]
    found = results.seconds(
        timed,
        *("transformers", "peft", "bitsandbytes"),
        bench="train_step",
        model="SmolLM2-135M-Instruct",
        shape=f"B=1 S={options.context} loss on 1 in {options.answers}",
        dtype=options.dtype,
    )
    results.report(found, "train_step.csv", header, lines)


def _candidates(
    folder: Path, dtype: torch.dtype, options: Any
) -> dict[str, tuple[Callable[[], object], int]]:
    """A training step and the number of trained parameters, by name."""
    from ladder_kernels.models.loading import load_backbone

    backbone = load_backbone(find_weights(), dtype=dtype)
    backbone.save_pretrained(folder)
    context = options.context
    ids = torch.randint(1000, 40000, (1, context))
    labels = ids.clone()
    labels[:, torch.arange(context) % options.answers != 0] = -100
    batch = {"input_ids": ids, "labels": labels}
    positions = torch.arange(context)[None] % (context // _DOCUMENTS)

    plain = lk.LadderConfig.lst(every=3, width=72)
    recommended = lk.LadderConfig.recommended()
    everywhere = lk.LadderConfig.adapters(backbone.num_layers, options.rank)

    def ladder(
        config: lk.LadderConfig = plain,
        *,
        backend: str = "auto",
        activations: str = "exact",
        recompute: bool = False,
        **more: torch.Tensor,
    ) -> tuple[Callable[[], object], int]:
        model = lk.LadderForCausalLM.from_backbone(backbone, config, activations=activations)
        model.gradient_checkpointing = recompute
        step = _step(model.train(), {**batch, **more}, 2e-3)

        def on_backend() -> object:
            with lk.use_backend(backend):
                return step()

        return _checked(f"ladder, {backend}", on_backend), model.num_parameters(True)

    def qlora(*, checkpointing: bool, ours: bool = False) -> tuple[Callable[[], object], int]:
        model = peft_qlora(folder, dtype=dtype, rank=options.rank, checkpointing=checkpointing)
        if ours:
            lk.accelerate_4bit(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        name = f"QLoRA, checkpointing {checkpointing}, ours {ours}"
        return _checked(name, _step(model, batch, 5e-4)), trained

    def side_network(kind: type[PlainLadder]) -> tuple[Callable[[], object], int]:
        model = kind(transformers_base(folder, dtype)).train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return _checked(kind.__name__, _step(model, batch, 2e-3)), trained

    return {
        "ladder": ladder(),
        "ladder, packed": ladder(position_ids=positions),
        "ladder, int8 activations": ladder(activations="int8"),
        "ladder on reference operations": ladder(backend="reference"),
        "recommended ladder": ladder(recommended),
        "recommended ladder, recomputed": ladder(recommended, recompute=True),
        "recommended ladder, packed": ladder(recommended, position_ids=positions),
        "our adapters on all layers": ladder(everywhere),
        "our adapters on all layers, packed": ladder(everywhere, position_ids=positions),
        "QLoRA (bitsandbytes)": qlora(checkpointing=False),
        "QLoRA, gradient checkpointing": qlora(checkpointing=True),
        "QLoRA with accelerate_4bit": qlora(checkpointing=False, ours=True),
        "plain LST (bitsandbytes)": side_network(PlainLST),
        "plain QST (bitsandbytes)": side_network(PlainQST),
    }


def _step(model: Any, batch: dict[str, torch.Tensor], rate: float) -> Callable[[], float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _checked(name: str, step: Callable[[], Any]) -> Callable[[], object]:
    """Return ``step`` if a few of it lower the loss.

    Raises:
        RuntimeError: They do not.
    """
    losses = [step() for _ in range(4)]
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"{name}: its loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    return step


if __name__ == "__main__":
    main()
