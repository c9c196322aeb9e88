"""A training run in a process of its own, for tests that kill it or start several.

The one argument is a json file: ``options`` of a run with ``train``, ``hang_at`` a step to wait for
ever at; or ``base``, ``rows``, ``output`` and ``arguments`` of a plain Trainer, whose losses and
weights go to ``output``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from conftest import train_plain
from datasets import load_from_disk
from safetensors.torch import save_file
from transformers import TrainerCallback

from ladder_kernels.training.run import TrainOptions, train


class Hang(TrainerCallback):
    """Says when a step is reached, and stays there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            print("reached", flush=True)
            time.sleep(3600)


def main() -> None:
    run()
    # A group left to the end of the process may abort it: its threads outlive what they use.
    PartialState().destroy_process_group()


def run() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    if "options" in spec:
        callbacks = [Hang(spec["hang_at"])] if "hang_at" in spec else []
        train(TrainOptions(**spec["options"]), callbacks=callbacks)
        return
    output = Path(spec["output"])
    losses, weights, trainer = train_plain(
        Path(spec["base"]), load_from_disk(spec["rows"]), output, **spec["arguments"]
    )
    if trainer.is_world_process_zero():
        report = {"losses": losses, "processes": trainer.args.world_size}
        (output / "report.json").write_text(json.dumps(report), encoding="utf-8")
        save_file(weights, output / "weights.safetensors")


if __name__ == "__main__":
    main()
