"""``budget``: a run chooses by itself what fits, and leaves what was decided."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ladder_kernels.errors import ConfigError
from ladder_kernels.memory.planner import RUNTIME
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.training.budget import within_budget
from ladder_kernels.training.options import TrainOptions
from ladder_kernels.training.run import train


@pytest.fixture
def options(base: Path, tmp_path: Path) -> TrainOptions:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"number {n} of the rows"}) for n in range(40)))
    return TrainOptions(
        model=str(base),
        output=str(tmp_path / "out"),
        data=str(rows),
        context=32,
        reduction=4,
        batch_size=4,
        gradient_accumulation=2,
        max_steps=2,
        device="cpu",
        progress=False,
        budget="1GB",
    )


def smallest(options: TrainOptions) -> int:
    """The least that a run can do with, from the message that refuses anything less."""
    with pytest.raises(ConfigError, match=r"need .* at least"):
        within_budget(replace(options, budget="1MB"))
    low, high = RUNTIME, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        try:
            within_budget(replace(options, budget=str(middle)))
            high = middle
        except ConfigError:
            low = middle
    return high


def test_where_there_is_room_nothing_changes(options):
    found, plan = within_budget(options)
    given = {"embeddings": "device", "tap_dtype": "bfloat16", "quantize_head": False}
    # All rows of a step at once, which are as many as before.
    given |= {"batch_size": 8, "gradient_accumulation": 1, "budget": None}
    assert found == replace(options, **given)
    assert plan.bytes <= 10**9


def test_where_there_is_none_it_saves_and_trains(options):
    budget = smallest(options)
    found, plan = within_budget(replace(options, budget=str(budget)))
    assert plan.bytes == budget
    assert found.gradient_checkpointing
    assert (found.batch_size, found.gradient_accumulation) == (1, 8)
    assert (found.taps, found.weights) == ("disk", "resident")
    result = train(replace(options, budget=str(budget)))
    again = train(replace(found, output=f"{options.output}-again"))
    assert result.steps == 2
    weights = [load_file(each.output / "model.safetensors") for each in (result, again)]
    assert all((weights[0][name] == tensor).all() for name, tensor in weights[1].items())


def test_what_is_decided_stays(options):
    decided = replace(
        options,
        optimizer="adamw_torch",
        tap_dtype="float32",
        taps="disk",
        slice_tokens=128,
        gradient_checkpointing=True,
    )
    for budget in ("1GB", str(smallest(decided))):
        found, _ = within_budget(replace(decided, budget=budget))
        for name in ("optimizer", "tap_dtype", "taps", "slice_tokens", "gradient_checkpointing"):
            assert getattr(found, name) == getattr(decided, name), name
        for field in fields(found):
            if field.name in ("model", "data", "context", "reduction", "learning_rate", "seed"):
                assert getattr(found, field.name) == getattr(decided, field.name)


def test_packed_files_can_be_streamed(options, tokenizer, tmp_path):
    config = AutoConfig.from_pretrained(options.model, num_hidden_layers=24)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    load_backbone(tmp_path / "deep").save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    one = replace(options, batch_size=1, gradient_accumulation=1)
    deep, packed = (replace(one, model=str(tmp_path / name)) for name in ("deep", "packed"))
    assert smallest(packed) < smallest(deep)
    found, _ = within_budget(replace(packed, budget=str(smallest(packed))))
    assert (found.weights, found.embeddings) == ("streamed", "host")
    assert train(found).steps == 2


def test_gradients_are_freed_without_clipping(options):
    freed = replace(options, max_grad_norm=0.0, batch_size=1, gradient_accumulation=1)
    found, _ = within_budget(replace(freed, budget=str(smallest(freed))))
    assert found.free_gradients
    clipped = replace(freed, max_grad_norm=1.0)
    assert smallest(clipped) > smallest(freed)


def test_what_is_refused(options, tmp_path):
    with pytest.raises(ConfigError, match="budget: found nothing"):
        within_budget(replace(options, budget=None))
    with pytest.raises(ConfigError, match="budget: found 'much'"):
        train(replace(options, budget="much"))
    with pytest.raises(ConfigError, match="memory of optimizer 'adafactor' is not known"):
        within_budget(replace(options, optimizer="adafactor"))
    with pytest.raises(ConfigError, match="a GGUF file says its model's shape only"):
        within_budget(replace(options, gguf_file="model.gguf"))
    with pytest.raises(ConfigError, match=r"has no readable config\.json"):
        within_budget(replace(options, model=str(tmp_path)))
    done = train(replace(options, budget=None))
    with pytest.raises(ConfigError, match="is a saved ladder"):
        within_budget(replace(options, model=str(done.output), reduction=16))
