"""A model trains the same wherever its taps wait, and what waits on disk is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import ConfigError
from ladder_kernels.memory.taps_disk import DiskTaps
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.frozen_pass import Work
from ladder_kernels.models.loading import backbone_from_transformers

LADDERS = {
    "lst": LadderConfig.lst(every=1, reduction=4),
    "several taps": LadderConfig(rungs=((1, 2), (), (3, 1)), reduction=4, merge="gate"),
    "re-entry": LadderConfig.lst(every=1, reduction=4, reentry=1, adapter_rank=2),
    "adapters": LadderConfig.adapters(2, 4),
}
FEWER = LadderConfig.lst(every=3, reduction=4)
STORES = ("device", "host", "disk")
IDS = torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(5))
LEFT = torch.tensor([[1] * 10, [0] * 3 + [1] * 7, [0] * 9 + [1]])
RIGHT = LEFT.flip(-1)
HOLES = torch.tensor([[1] * 10, [1, 1, 0, 0, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0, 0, 1, 1, 1]])
PACKED = torch.tensor([[*range(6), *range(4)], [*range(10)], [*range(3), *range(3), *range(4)]])
INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "plain": {},
    "one row": {"input_ids": IDS[:1]},  # read from its file without a copy
    "left": {"attention_mask": LEFT},
    "right": {"attention_mask": RIGHT},
    "holes": {"attention_mask": HOLES},
    "packed": {"position_ids": PACKED},
    "packed and padded": {"position_ids": PACKED, "attention_mask": RIGHT},
}


@pytest.fixture(scope="module")
def backbone(make: Callable[..., Any]) -> Backbone:
    return backbone_from_transformers(make("mistral"), blocksize=32)


def shaken(backbone: Backbone, name: str = "lst", **options: Any) -> LadderForCausalLM:
    """A model in training whose ladder has learned something."""
    model = LadderForCausalLM.from_backbone(backbone, {**LADDERS, "fewer": FEWER}[name], **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def placed(backbone: Backbone, store: str, folder: Path, name: str = "lst", **options: Any) -> Any:
    cache = folder if store == "disk" else None
    return shaken(backbone, name, taps=store, tap_cache=cache, **options)


def labels_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Padding has none; the first token of a row has one, which padding before it predicts."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch["input_ids"].masked_fill(mask == 0, -100)


def without_first(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels as :func:`labels_of`, but nothing predicts the first token of a row."""
    labels, mask = labels_of(batch), batch["attention_mask"]
    return {**batch, "labels": labels.masked_fill(mask.cumsum(-1) == 1, -100)}


def step(model: LadderForCausalLM, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss: Any = model(**{"labels": labels_of(batch), **batch}).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return {"loss": loss.detach(), **grads}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


class Rows:
    """Sequences that frozen passes ran, by pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
        self.passes: list[list[int]] = []
        run = type(backbone)._run

        def counted(this: Any, works: Sequence[Work], stop: int) -> None:
            self.passes.append([len(work.tokens) for work in works])
            run(this, works, stop)

        monkeypatch.setattr(type(backbone), "_run", counted)

    def taken(self) -> list[list[int]]:
        passes, self.passes = self.passes, []
        return passes


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> Rows:
    return Rows(monkeypatch, backbone)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", LADDERS)
def test_every_store_trains_the_same_by_bits(backbone, name, inputs, recompute, tmp_path):
    batch = {"input_ids": IDS, **INPUTS[inputs]}
    found = []
    for store in STORES:
        model = placed(backbone, store, tmp_path, name, tap_dtype="float32")
        if recompute:
            model.gradient_checkpointing_enable()
        found.append(step(model, batch))
        found.append(step(model, batch))
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.mark.parametrize("tap_dtype", ["bfloat16", "int8"])
def test_rounded_taps_are_the_same_in_every_store(backbone, tap_dtype, tmp_path):
    batch = {"input_ids": IDS, "attention_mask": RIGHT}
    found = [
        step(placed(backbone, store, tmp_path, tap_dtype=tap_dtype), batch) for store in STORES
    ]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    exact = step(shaken(backbone, tap_dtype="float32"), batch)
    loss = exact.pop("loss")
    assert found[0]["loss"] != loss
    for name, gradient in exact.items():
        cosine = torch.cosine_similarity(gradient.flatten(), found[0][name].flatten(), 0)
        assert cosine > 0.999, name


def test_the_second_epoch_runs_no_frozen_pass(backbone, rows, tmp_path):
    model = placed(backbone, "disk", tmp_path, tap_dtype="float32")
    batches = [
        {"input_ids": ids[None], "attention_mask": m[None]}
        for ids, m in zip(IDS, RIGHT, strict=True)
    ]
    first = [step(model, batch) for batch in batches]
    assert rows.taken() == [[1], [1], [1]]
    assert [step(model, batch)["loss"] for batch in batches] == [one["loss"] for one in first]
    assert rows.taken() == []
    # Nor does another process, or another ladder with the same taps.
    again = placed(backbone, "disk", tmp_path, tap_dtype="float32")
    assert_same(step(again, batches[1]), first[1])
    assert rows.taken() == []
    assert len(list(tmp_path.glob("*.taps"))) == 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", *[".taps"] * 3]


def test_batches_may_be_made_up_otherwise(backbone, rows, tmp_path):
    """Other rows together, padded on another side and to another length; new rows alone are run."""
    model = placed(backbone, "disk", tmp_path, tap_dtype="float32")
    plain = shaken(backbone, tap_dtype="float32")
    step(model, without_first({"input_ids": IDS[:2], "attention_mask": LEFT[:2]}))
    assert rows.taken() == [[2]]
    wider = torch.zeros(3, 13, dtype=torch.int64)
    mask = torch.zeros(3, 13, dtype=torch.int64)
    wider[0, :7], mask[0, :7] = IDS[1, 3:], 1
    wider[1, :4], mask[1, :4] = IDS[2, :4], 1
    wider[2, 2:12], mask[2, 2:12] = IDS[0], 1
    batch = without_first({"input_ids": wider, "attention_mask": mask})
    found = step(model, batch)
    assert rows.taken() == [[1]]
    expected = step(plain, batch)
    assert rows.taken() == [[3]]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_sequence_that_stands_twice_in_a_batch_is_run_once(backbone, rows, tmp_path):
    batch = {"input_ids": IDS[[0, 1, 0]]}
    found = step(placed(backbone, "disk", tmp_path, tap_dtype="float32"), batch)
    assert rows.taken() == [[2]]
    expected = step(shaken(backbone, tap_dtype="float32"), batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


CHANGES: dict[str, Any] = {
    "tokens": {"input_ids": IDS[:1] + 0 * IDS[:1].flip(-1).cumsum(-1) - torch.eye(10).long()[:1]},
    "positions": {"input_ids": IDS[:1], "position_ids": torch.arange(10)[None] + 2},
    "documents": {"input_ids": IDS[:1], "position_ids": PACKED[:1]},
    "padding": {"input_ids": IDS[:1], "attention_mask": HOLES[1:2]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_sequences_are_not_taken_for_it(backbone, rows, change, tmp_path):
    model = placed(backbone, "disk", tmp_path)
    step(model, {"input_ids": IDS[:1]})
    step(model, CHANGES[change])
    assert rows.taken() == [[1], [1]]


@pytest.mark.parametrize(
    "options", [{"tap_dtype": "float32"}, {"tap_dtype": "int8"}, {"activations": "int8"},
                {"name": "fewer"}, {"name": "re-entry"}]
)  # fmt: skip
def test_other_settings_have_entries_of_their_own(backbone, rows, options, tmp_path):
    step(placed(backbone, "disk", tmp_path), {"input_ids": IDS})
    model = placed(backbone, "disk", tmp_path, **options)
    expected = step(placed(backbone, "device", tmp_path, **options), {"input_ids": IDS})
    rows.taken()
    for _ in range(2):
        assert_same(step(model, {"input_ids": IDS}), expected)
    assert rows.taken() == [[3]]


def test_embeddings_are_known_by_their_numbers(backbone, rows, tmp_path):
    model = placed(backbone, "disk", tmp_path)
    embeds = model.get_input_embeddings()(IDS).detach()
    expected = step(shaken(backbone), {"input_ids": IDS})["loss"]
    rows.taken()
    for scale, passes in ((1.0, [[3]]), (1.0, []), (1.5, [[3]])):
        loss = model(inputs_embeds=scale * embeds, labels=IDS).loss
        assert rows.taken() == passes
        assert torch.equal(loss, expected) == (scale == 1.0)


def test_evaluation_and_generation_write_nothing(backbone, tmp_path):
    model = placed(backbone, "disk", tmp_path / "cache")
    with torch.no_grad():
        model(IDS, labels=IDS)
    with model.disable_ladder():
        model(IDS, labels=IDS)
    model.eval()
    model(IDS, labels=IDS)
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match="cache: found one together with a tap store"):
        backbone.frozen_pass(
            IDS, layout=model._layout(IDS, None, None, None), cache=object(),
            store=DiskTaps(tmp_path),
        )  # fmt: skip


@pytest.mark.parametrize("store", ["device", "disk"])
def test_a_compiled_side_pass_reads_any_store(backbone, store, tmp_path):
    """One graph, also in the second epoch, which reads what the first one wrote."""
    batch = {"input_ids": IDS, "attention_mask": RIGHT}
    expected = step(shaken(backbone, tap_dtype="float32"), batch)
    model = placed(backbone, store, tmp_path, tap_dtype="float32")
    torch._dynamo.reset()
    counters.clear()
    model.ladder.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found = step(model, batch)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert counters["stats"]["unique_graphs"] == 1


# Several micro-batches together -------------------------------------------------------------------

MICRO = [
    {"input_ids": IDS[:2]},
    {"input_ids": IDS[2:], "attention_mask": RIGHT[2:]},
    {"input_ids": IDS[1:], "position_ids": PACKED[1:]},
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LADDERS)
@pytest.mark.parametrize("store", STORES)
def test_prefilled_steps_are_the_same_by_bits(backbone, store, name, recompute, rows, tmp_path):
    plain = shaken(backbone, name, tap_dtype="float32")
    expected = [step(plain, batch) for batch in MICRO]
    model = placed(backbone, store, tmp_path, name, tap_dtype="float32")
    if recompute:
        model.gradient_checkpointing_enable()
    rows.taken()
    model.prefill([{**batch, "labels": labels_of(batch)} for batch in MICRO])
    assert rows.taken() == [[2, 1, 2]]
    # Content counts, not identity, nor order.
    for index in (0, 2, 1):
        copied = {name: tensor.clone() for name, tensor in MICRO[index].items()}
        assert_same(step(model, copied), expected[index])
    assert rows.taken() == []
    assert not model._prefilled
    assert_same(step(model, MICRO[0]), expected[0])
    assert rows.taken() == ([] if store == "disk" else [[2]])


def test_what_is_prefilled_is_for_its_inputs_alone(backbone, rows, tmp_path):
    model = shaken(backbone, tap_dtype="float32")
    model.prefill(MICRO[:1])
    rows.taken()
    other = {"input_ids": IDS[:2], "attention_mask": LEFT[:2]}
    assert_same(step(model, other), step(shaken(backbone, tap_dtype="float32"), other))
    assert rows.taken() == [[2], [2]]
    model.eval()
    model(**MICRO[0], labels=IDS[:2])
    assert len(rows.taken()) == len(model._prefilled) == 1
    model.train().prefill([])
    assert not model._prefilled
    with pytest.raises(ConfigError, match="exactly one of input_ids"):
        model.prefill([{"labels": IDS}])


def test_rows_that_are_cached_are_left_out_of_a_prefill(backbone, rows, tmp_path):
    model = placed(backbone, "disk", tmp_path)
    step(model, MICRO[0])
    rows.taken()
    model.prefill([{"input_ids": IDS}, MICRO[0]])
    assert rows.taken() == [[1]]
    step(model, {"input_ids": IDS})
    step(model, MICRO[0])
    assert rows.taken() == []
