"""The methods that a training step is compared over: ladders, QLoRA, plain side networks.

Each starts from the same base, a folder in NF4 that transformers with bitsandbytes and this library
both read, and trains as many parameters as QLoRA at the given rank, within 10 %: widths of side
networks (and the rank of the recommended ladder's adapters) are chosen for that. Each is in the
setting that serves it best: what a method could turn on without changing its numbers is on.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import ladder_kernels as lk
from bench.plain_ladders import PlainLadder, PlainLST, PlainQST
from bench.qlora import peft_qlora, transformers_base
from ladder_kernels.memory.sizes import LadderSizes, ModelSizes
from ladder_kernels.training.freeing import GradientFreeing

__all__ = ["METHODS", "Trainee", "Work", "fitted", "parameters_of_qlora"]

_WITHIN = 0.1
_EVERY = 3
_SLICE = 512
_MOST = 4096
# Of AdamW: so low that the loss falls from the first step on, whatever the method.
_RATE = 2e-4


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all methods have in common.

    Attributes:
        base: Folder of the base, in NF4.
        dtype: To compute in.
        rank: Of QLoRA's adapters, which sets how many parameters each method trains.
        device: Where.
    """

    base: Path
    dtype: torch.dtype
    rank: int
    device: torch.device

    @property
    def sizes(self) -> ModelSizes:
        """The base in numbers."""
        from transformers import AutoConfig

        return ModelSizes(AutoConfig.from_pretrained(self.base))


@dataclass(kw_only=True)
class Trainee:
    """A model in training mode and what trains it.

    Attributes:
        model: Takes ``input_ids`` and ``labels``, and returns a ``loss``.
        optimizer: Of its trained parameters.
        autocast: Whether its forward pass runs under bfloat16 autocast.
        resources: Closed when it is done with.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    autocast: bool = False
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


Make = Callable[[Work], Trainee]


def parameters_of_qlora(work: Work) -> int:
    """How many parameters QLoRA trains: adapters of ``rank`` on all linear layers."""
    sizes = work.sizes
    return LadderSizes(lk.LadderConfig.adapters(sizes.layers, work.rank), sizes).parameters()


def fitted(count: Callable[[int], int], wanted: int, *, step: int = 1) -> int:
    """The size that trains about as many parameters as wanted.

    Args:
        count: Number of trained parameters at a size; grows with it.
        wanted: Number of them.
        step: Sizes are multiples of it.

    Raises:
        ValueError: No size comes within 10 %.
    """
    low, high = step, step
    while count(high) < wanted and high < _MOST:
        low, high = high, high + step
    best = min((low, high), key=lambda size: abs(count(size) - wanted))
    if abs(count(best) - wanted) > _WITHIN * wanted:
        raise ValueError(
            f"the nearest sizes, {low} and {high}, train {count(low):,} and {count(high):,} "
            f"parameters; within 10 % of {wanted:,} is allowed"
        )
    return best


# Ladders --------------------------------------------------------------------------------------


def _plain(work: Work) -> lk.LadderConfig:
    return _of_width(work, lk.LadderConfig.lst(every=_EVERY, block="mlp"))


def _every_layer(work: Work) -> lk.LadderConfig:
    return _of_width(work, lk.LadderConfig.lst(every=1))


def _of_width(work: Work, config: lk.LadderConfig) -> lk.LadderConfig:
    sizes = work.sizes

    def count(width: int) -> int:
        return LadderSizes(replace(config, width=width), sizes).parameters()

    return replace(config, width=fitted(count, parameters_of_qlora(work), step=4))


def _recommended(work: Work) -> lk.LadderConfig:
    sizes = work.sizes
    config = lk.LadderConfig.recommended().settled(sizes.layers)

    def count(rank: int) -> int:
        return LadderSizes(replace(config, adapter_rank=rank), sizes).parameters()

    return replace(config, adapter_rank=fitted(count, parameters_of_qlora(work)))


def _everywhere(work: Work) -> lk.LadderConfig:
    return lk.LadderConfig.adapters(work.sizes.layers, work.rank)


def _ladder(
    work: Work,
    config: Callable[[Work], lk.LadderConfig],
    *,
    recompute: bool = False,
    **options: Any,
) -> Trainee:
    model = lk.LadderForCausalLM.from_pretrained(
        work.base, ladder=config(work), dtype=work.dtype, device=work.device, **options
    ).train()
    model.gradient_checkpointing = recompute
    # From float32 weights, as a Trainer with bf16=True does; on a CPU float32 costs little there.
    autocast = work.device.type == "cuda" and work.dtype == torch.bfloat16
    return Trainee(model=model, optimizer=_adamw(model), autocast=autocast)


def _kept_taps(work: Work) -> Trainee:
    folder = tempfile.TemporaryDirectory()
    trainee = _ladder(work, _plain, taps="disk", tap_cache=folder.name)
    trainee.resources.enter_context(folder)
    return trainee


def _streamed(work: Work) -> Trainee:
    from bitsandbytes.optim import AdamW8bit

    gpu = work.device.type == "cuda"
    trainee = _ladder(
        work,
        _plain,
        recompute=True,
        weights="host" if gpu else "streamed",
        embeddings="host",
        taps="host" if gpu else "device",
    )
    trainee.model.backbone.slice_tokens = _SLICE
    trainee.optimizer = AdamW8bit(_trained(trainee.model), lr=_RATE)
    freeing = GradientFreeing(trainee.optimizer, lambda: True)
    trainee.resources.callback(freeing.close)
    return trainee


# Rivals ---------------------------------------------------------------------------------------


def _qlora(work: Work, *, ours: bool = False, **options: bool) -> Trainee:
    model = peft_qlora(work.base, dtype=work.dtype, rank=work.rank, device=work.device, **options)
    if ours:
        lk.accelerate_4bit(model)
    return Trainee(model=model, optimizer=_adamw(model))


def _side_network(work: Work, kind: type[PlainLadder]) -> Trainee:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work.base))

    def count(width: int) -> int:
        with torch.device("meta"):
            side = kind(shape, width=width)
        return sum(p.numel() for p in _trained(side))

    width = fitted(count, parameters_of_qlora(work), step=4)
    base = transformers_base(work.base, work.dtype, work.device)
    model = kind(base, width=width).to(work.device).train()
    return Trainee(model=model, optimizer=_adamw(model))


def _adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=_RATE)


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


METHODS: Mapping[str, Make] = {
    "ladder": functools.partial(_ladder, config=_plain),
    "ladder, int8 activations": functools.partial(_ladder, config=_plain, activations="int8"),
    "ladder, recomputed": functools.partial(_ladder, config=_plain, recompute=True),
    "ladder, kept taps": _kept_taps,
    "ladder, streamed": _streamed,
    "ladder at every layer": functools.partial(_ladder, config=_every_layer),
    "recommended ladder": functools.partial(_ladder, config=_recommended),
    "recommended ladder, recomputed": functools.partial(
        _ladder, config=_recommended, recompute=True
    ),
    "adapters on all layers": functools.partial(_ladder, config=_everywhere),
    "adapters on all layers, recomputed": functools.partial(
        _ladder, config=_everywhere, recompute=True
    ),
    "QLoRA": _qlora,
    "QLoRA, checkpointed": functools.partial(_qlora, checkpointing=True),
    "QLoRA, Liger loss": functools.partial(_qlora, liger_loss=True),
    "QLoRA on our kernels": functools.partial(_qlora, ours=True),
    "QLoRA on our kernels, checkpointed": functools.partial(_qlora, ours=True, checkpointing=True),
    "plain LST": functools.partial(_side_network, kind=PlainLST),
    "plain QST": functools.partial(_side_network, kind=PlainQST),
}
"""How to make each method, by name.

"ladder" is plain: MLP rungs at every third layer, nothing of the model kept. "Recomputed": what
can run again in the backward pass does. "Kept taps": from the
second step on a batch they come from files. "Streamed": weights from their file (on a GPU: from
the host's memory, taps there too), a recomputed side pass, slices of tokens, 8-bit AdamW, gradients
freed as they are applied. "Recommended" re-enters below the upper half of the layers, with adapters
there; "adapters on all layers" is QLoRA on this library's layers, "QLoRA on our kernels" PEFT's
after :func:`ladder_kernels.accelerate_4bit`.
"""
