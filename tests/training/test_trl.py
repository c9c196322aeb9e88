"""TRL's SFTTrainer drives a ladder: what the README says about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ladder_kernels import LadderForCausalLM
from ladder_kernels.training.formats import encode_rows
from ladder_kernels.training.packing import LadderCollator

ARGUMENTS: dict[str, Any] = {
    "max_steps": 5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def sft(
    model: LadderForCausalLM, rows: datasets.Dataset, tokenizer: Any, output: Path, **options: Any
) -> SFTTrainer:
    """As the README has it: gradient checkpointing, TRL's default, is off unless asked for."""
    arguments = SFTConfig(
        output_dir=str(output), **{"gradient_checkpointing": False, **ARGUMENTS, **options}
    )
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"prompt": f"count {i} ", "completion": "one two " * (i % 7 + 1)} for i in range(30)]
    )


def test_sft_has_the_losses_of_our_data_in_a_plain_trainer(
    rows: datasets.Dataset, tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
):
    """Two tokenisations, two losses, one result: answers only, averaged over tokens."""
    theirs = sft(make_model(), rows, tokenizer, tmp_path / "sft")
    theirs.train()
    ours = Trainer(
        model=make_model(),
        args=TrainingArguments(output_dir=str(tmp_path / "plain"), **ARGUMENTS),
        train_dataset=encode_rows(rows, tokenizer),
        data_collator=LadderCollator(0),
    )
    ours.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-4)
    assert losses(ours)[-1] < losses(ours)[0] - 0.3
    loaded = LadderForCausalLM.from_pretrained(tmp_path / "sft" / "checkpoint-5")
    assert loaded.num_parameters() == theirs.model.num_parameters()


@pytest.mark.parametrize(
    "options", [{"packing": True}, {"padding_free": True, "max_length": None}, {"bf16": True}]
)
def test_sft_options(
    options: dict[str, Any], tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
):
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"count {i}"},
                {"role": "assistant", "content": "one two " * (i % 5 + 1)},
            ]
        }
        for i in range(20)
    ]
    trainer = sft(
        make_model(),
        datasets.Dataset.from_list(chats),
        tokenizer,
        tmp_path,
        **{"max_length": 48, **options},
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_gradient_checkpointing_recomputes_the_layers_above_a_re_entry(
    rows: datasets.Dataset, tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
):
    """TRL's default: the same losses, by bits."""
    found = []
    for recompute in (False, True):
        model = make_model(reentry=1, adapter_rank=2)
        trainer = sft(
            model, rows, tokenizer, tmp_path / str(recompute), gradient_checkpointing=recompute
        )
        trainer.train()
        assert model.gradient_checkpointing == recompute
        found.append(losses(trainer))
    assert found[0] == found[1]
    assert found[0][-1] < found[0][0]
