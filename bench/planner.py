"""What the planner says against what the live-byte meter counts, for whole models.

    python -m bench.planner

Twelve steps on a GPU that is not there: models, contexts and placements that differ. Each plan must
lie between what is counted and 3 % above it. QLoRA's plan stands beside, for comparison.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import ladder_kernels as lk
from bench import rows as results
from bench.memory import measure
from ladder_kernels.memory.qlora import qlora_stages
from ladder_kernels.memory.settings import Settings
from ladder_kernels.memory.sizes import LadderSizes, ModelSizes
from ladder_kernels.memory.step import step_stages
from ladder_kernels.models.shapes import config_of

__all__ = ["COMBINATIONS", "Combination"]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One step.

    Attributes:
        model: A known name.
        context: Tokens.
        weights: Placement of the blocks.
        taps: Where they wait.
        recompute: Whether the side pass is recomputed.
        slice_tokens: Tokens at a time inside a frozen layer.
        free_gradients: Whether gradients are freed as they are applied.
        reduction: Of the ladder, a rung at each layer.
        recommended: The recommended ladder instead.
    """

    model: str
    context: int = 2048
    weights: str = "resident"
    taps: str = "device"
    recompute: bool = True
    slice_tokens: int | None = None
    free_gradients: bool = False
    reduction: int = 16
    recommended: bool = False

    @property
    def embeddings(self) -> str:
        """On the host where the blocks are not resident."""
        return "device" if self.weights == "resident" else "host"

    def ladder(self) -> lk.LadderConfig:
        """The ladder's configuration."""
        if self.recommended:
            return lk.LadderConfig.recommended()
        return lk.LadderConfig.lst(every=1, reduction=self.reduction)

    def words(self) -> str:
        """The settings, in words."""
        words = [f"S={self.context}", f"weights {self.weights}", f"taps {self.taps}"]
        words += ["recomputed"] if self.recompute else []
        words += [f"slices of {self.slice_tokens}"] if self.slice_tokens else []
        words += ["gradients freed"] if self.free_gradients else []
        words += ["recommended ladder"] if self.recommended else [f"reduction {self.reduction}"]
        return ", ".join(words)


_SMALL: dict[str, Any] = {"taps": "host", "slice_tokens": 512, "free_gradients": True}

COMBINATIONS = (
    Combination(model="SmolLM2-135M", recompute=False),
    Combination(model="Llama-3.2-1B", context=8192, taps="host"),
    Combination(model="Qwen2.5-1.5B", recommended=True),
    Combination(model="Qwen2.5-7B", recompute=False),
    Combination(model="Qwen2.5-7B", **_SMALL),
    Combination(model="Qwen2.5-7B", weights="streamed", **_SMALL),
    Combination(model="Qwen2.5-7B", weights="streamed", context=16384, **_SMALL),
    Combination(model="Mistral-7B", recommended=True, taps="host"),
    Combination(model="Llama-3.1-8B", context=4096, taps="host"),
    Combination(model="Qwen3-14B", weights="host"),
    Combination(model="Qwen2.5-32B", weights="host", context=4096, **_SMALL),
    Combination(model="Llama-3.1-70B", weights="streamed", reduction=32, **_SMALL),
)
"""What is compared."""


def main() -> int:
    """Compare; returns the number of plans that are too low, or too high."""
    rows, lines, failed = [], [], 0
    for each in COMBINATIONS:
        config = config_of(each.model)
        nf4_head = not config.tie_word_embeddings
        measured = measure(
            config,
            each.ladder(),
            context=each.context,
            recompute=each.recompute,
            slice_tokens=each.slice_tokens,
            free_gradients=each.free_gradients,
            placement={"weights": each.weights, "embeddings": each.embeddings},
            taps={"taps": each.taps},
        )
        model = ModelSizes(config, quantize_head=nf4_head)
        settings = Settings(
            context=each.context,
            weights=each.weights,
            embeddings=each.embeddings,
            taps=each.taps,
            slice_tokens=each.slice_tokens,
            recompute=each.recompute,
            free_gradients=each.free_gradients,
        )
        stages = step_stages(model, LadderSizes(each.ladder(), model), settings)
        plan = max(stages, key=lambda stage: stage.total)
        counted = measured.peak.usage.total
        ratio = plan.total / counted
        failed += not 1 <= ratio <= 1.03
        rivals = [
            max(
                stage.total
                for stage in qlora_stages(ModelSizes(config), settings, checkpointing=checkpointing)
            )
            for checkpointing in (False, True)
        ]
        figures = {"counted": counted, "planned": plan.total}
        figures |= {"QLoRA, planned": rivals[0], "QLoRA, checkpointing, planned": rivals[1]}
        lines.append(
            [each.model, each.words()]
            + [f"{size / 1e9:.3f}" for size in figures.values()]
            + [f"{ratio:.4f}", plan.name]
        )
        print(" | ".join(lines[-1]), flush=True)
        found = results.bytes_of(
            figures, bench="planner", model=each.model, shape=each.words(), dtype="bfloat16"
        )
        rows += [replace(row, evidence="modelled") for row in found]
    header = ["model", "step", "counted, GB", "planned", "QLoRA", "QLoRA, checkpointing"]
    results.report(rows, "planner.csv", [*header, "planned / counted", "largest in"], lines)
    return failed


if __name__ == "__main__":
    sys.exit(main())
