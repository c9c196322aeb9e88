"""Steps from taps that lie in files, against steps that compute them; and taps in 8 bits.

    python -m bench.tap_cache                        SmolLM2-135M, 2,048 tokens, float32
    python -m bench.tap_cache --dtype bfloat16
    python -m bench.tap_cache --int8                 gradients with taps in 8 bits

From the second epoch on, a sequence whose taps are kept skips the frozen pass. Both ways take the
same steps in turns, with a loss on every token, then on one in ten; their losses have to be equal
by bits before a time counts. The ladder is plain, with taps in the compute dtype. The step with
computed taps keeps them in memory, as the first epoch without a cache does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import rows as results
from bench.timing import Quantiles, alternate
from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.demo import find_weights
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.loading import load_backbone

__all__ = ["compare", "gradient_cosines"]

_FILE = "tap_cache.csv"
_MODEL = "SmolLM2-135M-Instruct"
_LADDERS = {
    "plain ladder": LadderConfig.lst(every=3, width=72, block="mlp"),
    "ladder on every layer, with attention": LadderConfig.lst(every=1, reduction=16),
}


def _labels(ids: torch.Tensor, answers: int) -> torch.Tensor:
    places = torch.arange(ids.shape[1])
    return ids.masked_fill(places % answers != 0, -100)


def _step(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, losses: list[float]
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    return step


def compare(
    backbone: Backbone, ladder: LadderConfig, *, context: int, answers: int, turns: int
) -> dict[str, Quantiles]:
    """Seconds of a step whose taps are computed, and of one whose taps are in files.

    Raises:
        RuntimeError: If their losses are not equal by bits.
    """
    dtype = str(backbone.dtype).removeprefix("torch.")
    ids = torch.randint(1000, 40000, (1, context), generator=torch.Generator().manual_seed(0))
    labels = _labels(ids, answers)
    losses: dict[str, list[float]] = {"computed": [], "from files": []}
    with tempfile.TemporaryDirectory() as folder:
        computed = LadderForCausalLM.from_backbone(backbone, ladder, tap_dtype=dtype)
        kept = LadderForCausalLM.from_backbone(
            backbone, ladder, tap_dtype=dtype, taps="disk", tap_cache=folder
        )
        models = zip(losses, (computed.train(), kept.train()), strict=True)
        calls = {name: _step(model, ids, labels, losses[name]) for name, model in models}
        timed = alternate(calls, seconds=0.0, at_least=turns)
    if losses["computed"] != losses["from files"]:
        raise RuntimeError(f"losses differ: {losses}; not timed")
    return timed


def gradient_cosines(backbone: Backbone, ladder: LadderConfig, *, context: int) -> list[float]:
    """Cosines of a ladder's gradients with taps in 8 bits to those with taps in float32.

    The ladder has taken some steps before, so that every part of it has a gradient.

    Returns:
        Of all gradients together, then the least of any parameter's.
    """
    ids = torch.randint(1000, 40000, (1, context), generator=torch.Generator().manual_seed(0))
    gradients = {}
    exact = LadderForCausalLM.from_backbone(backbone, ladder, tap_dtype="float32").train()
    step = _step(exact, ids, ids, [])
    for _ in range(3):
        step()
    for tap_dtype in ("float32", "int8"):
        model = LadderForCausalLM.from_backbone(backbone, ladder, tap_dtype=tap_dtype).train()
        model.load_state_dict(exact.state_dict())
        model(input_ids=ids, labels=ids).loss.backward()
        gradients[tap_dtype] = [p.grad.flatten().double() for p in model.parameters()]
    pairs = list(zip(gradients["float32"], gradients["int8"], strict=True))
    whole = F.cosine_similarity(*(torch.cat(each) for each in zip(*pairs, strict=True)), dim=0)
    return [float(whole), min(float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs)]


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--int8", action="store_true", help="gradients with taps in 8 bits")
    given = parser.parse_args()
    backbone = load_backbone(Path(find_weights()), dtype=getattr(torch, given.dtype))
    about = {"bench": "tap_cache", "model": _MODEL, "dtype": given.dtype}
    shape = f"B=1 S={given.context}"
    found: list[results.Row] = []
    lines = []
    for name, ladder in _LADDERS.items():
        if given.int8:
            whole, least = gradient_cosines(backbone, ladder, context=given.context)
            figures = {f"{name}, all gradients": whole, f"{name}, least of a parameter": least}
            found += results.cosines(figures, shape=f"{shape} int8 taps", **about)
            lines.append([name, f"{whole:.6f}", f"{least:.6f}"])
            continue
        for answers in (1, 10):
            timed = compare(
                backbone, ladder, context=given.context, answers=answers, turns=given.turns
            )
            named = {f"{name}, taps {where}": times for where, times in timed.items()}
            found += results.seconds(named, shape=f"{shape} loss on 1 in {answers}", **about)
            slow, fast = (timed[where].median for where in ("computed", "from files"))
            rates = (f"{given.context / each:,.0f}" for each in (slow, fast))
            lines.append([name, f"1 in {answers}", *rates, f"{slow / fast:.2f}x"])
            print(" | ".join(lines[-1]), flush=True)
    header = ["ladder", "loss on", "tokens/s, computed", "tokens/s, from files", "faster"]
    if given.int8:
        header = ["ladder", "cosine of all gradients", "least of a parameter's"]
    results.report(found, _FILE, header, lines)


if __name__ == "__main__":
    main()
