"""A ``transformers.Trainer`` whose evaluation is perplexity over tokens."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import Trainer

from ladder_kernels.training.evaluation import Perplexity, sum_of_losses

__all__ = ["PerplexityTrainer"]


class PerplexityTrainer(Trainer):
    """Evaluates the mean loss over all tokens, where a plain ``Trainer`` averages over batches.

    The two differ when rows have unequal numbers of learned tokens. Training is the plain
    ``Trainer``'s, which drives a :class:`~ladder_kernels.models.modeling.LadderForCausalLM` as it
    is. Where the weights of the base are read anew in each frozen pass, all micro-batches of an
    optimizer step share one.

    Attributes:
        steps_done: Optimizer steps of the checkpoint that training is to go on from.
    """

    steps_done = 0

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As a plain ``Trainer``'s, which would take a further step after the last one."""
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        return (0 if 0 < max_steps <= self.steps_done else epochs, *others, max_steps)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As a plain ``Trainer``'s; with streamed weights, their frozen passes are run as well."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        model: Any = self.model
        backbone = getattr(model, "backbone", None)
        if len(batches) > 1 and getattr(backbone, "streams", False):
            model.prefill([self._prepare_inputs(batch) for batch in batches])
        return batches, items

    def perplexity(self, rows: Any = None, *, base: bool = False) -> Perplexity:
        """Perplexity on rows of tokens, each process taking its share.

        Args:
            rows: Default the evaluation rows.
            base: Of the base model, without the ladder.

        Returns:
            The same on every process.
        """
        start = time.perf_counter()
        rows = self.eval_dataset if rows is None else rows
        share = range(self.args.process_index, len(rows), self.args.world_size)
        total, tokens = sum_of_losses(
            self.model,  # type: ignore[arg-type]
            rows.select(share),
            batch_size=self.args.per_device_eval_batch_size,
            base=base,
        )
        sums = torch.tensor([[total, tokens]], dtype=torch.float64, device=self.args.device)
        gathered: Any = self.accelerator.gather(sums)
        total, tokens = gathered.sum(0).tolist()
        return Perplexity.of(total, int(tokens), time.perf_counter() - start)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Log and return ``eval_loss``, ``eval_perplexity``, ``eval_tokens``, ``eval_runtime``.

        Args:
            eval_dataset: Default the one that the trainer was made with.
            ignore_keys: Not used.
            metric_key_prefix: Instead of "eval".
        """
        found = self.perplexity(eval_dataset)
        metrics = {
            f"{metric_key_prefix}_loss": found.loss,
            f"{metric_key_prefix}_perplexity": found.perplexity,
            f"{metric_key_prefix}_tokens": found.tokens,
            f"{metric_key_prefix}_runtime": found.seconds,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
