"""What a run says of itself on a terminal, and elsewhere."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ladder_kernels.training.callbacks import RichProgressCallback, ThroughputCallback


def run(
    model: Any, rows: datasets.Dataset, output: Path, *callbacks: Any, **options: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


class Slow(TrainerCallback):
    """Takes its time over evaluations, which must not count."""

    def __init__(self) -> None:
        self.slept = 0.0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        time.sleep(0.2)
        self.slept += time.perf_counter() - start


def test_throughput_counts_real_tokens_and_no_evaluation(
    packed: datasets.Dataset, make_model: Callable[..., Any], tmp_path: Path
):
    throughput, slow = ThroughputCallback(), Slow()
    emptiest = sorted(range(len(packed)), key=lambda i: sum(packed[i]["attention_mask"]))
    rows = packed.select(emptiest[:16])
    begin = time.perf_counter()
    trainer = run(
        make_model(), rows, tmp_path, slow, throughput, eval_strategy="steps", eval_steps=1
    )
    whole = time.perf_counter() - begin
    real = sum(sum(row["attention_mask"]) for row in rows)
    assert real < 16 * 32
    assert throughput.tokens == real
    assert slow.slept > 0
    assert 0 < throughput.seconds <= whole - slow.slept
    assert throughput.tokens_per_second == throughput.tokens / throughput.seconds
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 for entry in logged)
    assert all(entry["peak_memory_bytes"] > 10_000_000 for entry in logged)


def test_plain_lines_without_a_terminal(
    packed: datasets.Dataset, make_model: Callable[..., Any], tmp_path: Path
):
    text = io.StringIO()
    progress = RichProgressCallback(Console(file=text, width=40))
    trainer = run(
        make_model(), packed, tmp_path, ThroughputCallback(), progress,
        eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4", "step 4/4"]
    loss = trainer.state.log_history[0]["loss"]
    for part in (f"loss {loss:.4f}", "tokens/s", "peak", "lr ", "left"):
        assert part in lines[0]
    assert "held-out loss" in lines[2]


def test_a_bar_on_a_terminal(
    packed: datasets.Dataset, make_model: Callable[..., Any], tmp_path: Path
):
    text = io.StringIO()
    progress = RichProgressCallback(Console(file=text, width=140, force_terminal=True))
    run(make_model(), packed, tmp_path, ThroughputCallback(), progress)
    shown = text.getvalue()
    for part in ("Training", "4/4", "loss", "tokens/s"):
        assert part in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is back"


def test_a_run_that_fails_gives_the_cursor_back(
    packed: datasets.Dataset, make_model: Callable[..., Any], tmp_path: Path
):
    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("power cut")

    text = io.StringIO()
    progress = RichProgressCallback(Console(file=text, width=140, force_terminal=True))
    with pytest.raises(RuntimeError, match="power cut"):
        run(make_model(), packed, tmp_path, progress, Fail())
    progress.close()
    shown = text.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
