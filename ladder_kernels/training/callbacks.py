"""What a training run says of itself: throughput, memory, progress."""

from __future__ import annotations

import atexit
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ladder_kernels.memory.peak import peak_memory_bytes

__all__ = ["RichProgressCallback", "ThroughputCallback"]


class ThroughputCallback(TrainerCallback):
    """Adds ``tokens_per_second`` and ``peak_memory_bytes`` to what a ``Trainer`` logs.

    Tokens are real ones (padding does not count) of all processes; time spent on evaluation and on
    saving does not count. Callbacks are called in order, so one that shall see these values, such
    as transformers' ``TensorBoardCallback``, must come after it::

        Trainer(..., args=TrainingArguments(report_to="none", ...),
                callbacks=[ThroughputCallback(), TensorBoardCallback()])

    Attributes:
        tokens: Real tokens trained on so far, those before a resume not counted.
        seconds: Time that training on them took.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._seen_before = 0
        self._mark = 0.0
        self._logged = (0, 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run; 0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to count."""
        if args.include_num_input_tokens_seen == "no":
            # The Trainer counts over all processes; its default is not to.
            args.include_num_input_tokens_seen = "non_padding"
        self.tokens, self.seconds, self._logged = 0, 0.0, (0, 0.0)
        self._seen_before = state.num_input_tokens_seen
        self._mark = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a step."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        self.tokens = int(state.num_input_tokens_seen) - self._seen_before

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out the time of an evaluation."""
        self._mark = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out the time of saving a checkpoint."""
        self._mark = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the report of a training step; others are left alone."""
        if logs is None or "loss" not in logs:
            return
        tokens, seconds = self.tokens - self._logged[0], self.seconds - self._logged[1]
        self._logged = (self.tokens, self.seconds)
        figures = {
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "peak_memory_bytes": peak_memory_bytes(args.device),
        }
        logs.update(figures)
        # The history got its copy before callbacks are called.
        state.log_history[-1].update(figures)


class RichProgressCallback(TrainerCallback):
    """A progress bar with loss, throughput, memory and learning rate; plain lines without terminal.

    Put it after :class:`ThroughputCallback`, and pass ``disable_tqdm=True`` to
    ``TrainingArguments``, or there will be two bars.

    Args:
        console: Where to; default standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(stderr=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._begin = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._begin = (time.perf_counter(), state.global_step)
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "", total=state.max_steps, completed=state.global_step, figures=""
        )
        self._progress.start()
        # A run that fails must not leave the terminal without its cursor.
        atexit.register(self.close)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show figures of training beside the bar, and those of evaluation above it."""
        if logs is None or not state.is_world_process_zero:
            return
        figures = _figures(logs)
        if not figures:
            return
        if self._progress is not None and "loss" in logs:
            self._progress.update(self._task, figures=figures)
            return
        line = f"step {state.global_step}/{state.max_steps}  {figures}"
        if "loss" in logs:
            line += f"  {self._left(state)} left"
        self._console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar."""
        self.close()

    def close(self) -> None:
        """Stop showing; called when training ends, and needed after a run that failed."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            atexit.unregister(self.close)

    def _left(self, state: TrainerState) -> str:
        start, first = self._begin
        a_step = (time.perf_counter() - start) / max(state.global_step - first, 1)
        minutes, seconds = divmod(round(a_step * (state.max_steps - state.global_step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _figures(logs: dict[str, float]) -> str:
    shown = (
        ("loss", "loss {:.4f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("learning_rate", "lr {:.2e}"),
        ("eval_loss", "held-out loss {:.4f}"),
        ("eval_perplexity", "perplexity {:.3f}"),
    )
    parts = [text.format(logs[name]) for name, text in shown if name in logs]
    if "peak_memory_bytes" in logs:
        parts.insert(2, f"peak {logs['peak_memory_bytes'] / 1e6:,.0f} MB")
    return "  ".join(parts)
