"""A ``transformers.Trainer`` whose evaluation is perplexity over tokens."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import Trainer

from ladder_kernels.errors import ConfigError
from ladder_kernels.training.evaluation import Perplexity, sum_of_losses
from ladder_kernels.training.freeing import GradientFreeing
from ladder_kernels.training.options import check_freeing

__all__ = ["PerplexityTrainer"]


class PerplexityTrainer(Trainer):
    """Evaluates the mean loss over all tokens, where a plain ``Trainer`` averages over batches.

    The two differ when rows have unequal numbers of learned tokens. Training is the plain
    ``Trainer``'s, which drives a :class:`~ladder_kernels.models.modeling.LadderForCausalLM` as it
    is. Where the weights of the base are read anew in each frozen pass, all micro-batches of an
    optimizer step share one.

    Args:
        arguments: As a plain ``Trainer``'s.
        free_gradients: Step each weight as soon as its gradient is whole, and free that, while the
            backward pass goes on. With accumulation that is in its last micro-batch. The weights
            are the same by bits.
        options: As a plain ``Trainer``'s.

    Attributes:
        steps_done: Optimizer steps of the checkpoint that training is to go on from.

    Raises:
        ConfigError: If gradients cannot be freed one by one: something needs them all at once (a
            largest norm, the scaling of float16, the average over several processes).
    """

    steps_done = 0

    def __init__(self, *arguments: Any, free_gradients: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._free_gradients = free_gradients
        self._freeing: GradientFreeing | None = None
        if free_gradients:
            check_freeing(self.args.max_grad_norm)
            if self.args.fp16:
                raise ConfigError(
                    "free_gradients: found True with fp16, whose scaling needs all gradients at "
                    "once; allowed is bf16, or neither"
                )
            if self.args.world_size > 1:
                raise ConfigError(
                    f"free_gradients: found True on {self.args.world_size} processes, which "
                    "average their gradients after the backward pass; allowed is one process"
                )

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As a plain ``Trainer``'s."""
        try:
            return super().train(*arguments, **options)
        finally:
            self._stop_freeing()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As a plain ``Trainer``'s; with ``free_gradients``, it steps during backward passes."""
        optimizer = super().create_optimizer(model)
        if self._free_gradients:
            self._stop_freeing()
            # Accelerate's wrapper, on a further call, steps through the one inside.
            inner = getattr(optimizer, "optimizer", optimizer)
            self._freeing = GradientFreeing(inner, lambda: self.accelerator.sync_gradients)
        return optimizer

    def _stop_freeing(self) -> None:
        if self._freeing is not None:
            self._freeing.close()
            self._freeing = None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """What is logged: of gradients that are gone already, where they were freed."""
        if self._freeing is not None:
            return self._freeing.take_norm()
        return super()._get_grad_norm(model, grad_norm)

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
