"""Plans: what fits a budget, and in which order settings are taken."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_kernels import LadderConfig
from ladder_kernels.errors import ConfigError
from ladder_kernels.memory.planner import RUNTIME, Planner, gigabytes, in_words, parse_bytes
from ladder_kernels.memory.settings import Settings
from ladder_kernels.models.shapes import KNOWN, config_of

LST = LadderConfig.lst(every=1, reduction=16)


def planner(model: str = "Qwen2.5-7B", **options) -> Planner:
    return Planner(config_of(model), options.pop("ladder", LST), **options)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * 10**9),
        ("11.5 GiB", int(11.5 * 2**30)),
        ("800mb", 8 * 10**8),
        ("6_000_000_000", 6 * 10**9),
        ("24g", 24 * 10**9),
        ("1e9", 10**9),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "six GB", "6XB", "-6GB", "0", "nan", "inf GB", "6G6"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match=r"budget: found .*; it must be a size such as 6GB"):
        parse_bytes(text)


@given(st.integers(1, 10**13))
def test_what_is_named_is_enough(size):
    assert parse_bytes(gigabytes(size)) >= size


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("model", ["Qwen2.5-7B", "Llama-3.2-1B", "SmolLM2-135M"])
def test_from_the_smallest_budget_to_the_largest(model, device):
    plans = planner(model, device=device, element=2)
    smallest = plans.smallest()
    budgets = [smallest.bytes * share // 100 for share in (100, 120, 150, 200, 400, 1000)]
    seconds = []
    for budget in budgets:
        found = plans.fastest(budget)
        assert found.bytes <= budget
        seconds.append(found.seconds)
    # More memory is never slower, but for the little that a choice without rounding may cost.
    assert all(later <= 1.07 * sooner for sooner, later in itertools.pairwise(seconds))
    last = plans.fastest(budgets[-1] + 10**12)
    assert last.changes == ()
    assert in_words(last) == "the usual settings"
    with pytest.raises(
        ConfigError, match=r"budget: found .* tokens a row need .* at least"
    ) as error:
        plans.fastest(smallest.bytes - 1)
    named = str(error.value).partition("need ")[2].partition(" at least")[0]
    assert plans.fastest(parse_bytes(named)).bytes <= parse_bytes(named)


def test_less_memory_is_bought_dearly_only_where_it_must_be():
    plans = planner()
    roomy, tight, tightest = (plans.fastest(parse_bytes(each)) for each in ("12GB", "6GB", "2.3GB"))
    assert roomy.settings == Settings()
    assert (tight.settings.weights, tight.settings.recompute) == ("resident", True)
    assert tightest.settings.weights == "host"
    assert tightest.settings.embeddings == "host"
    assert roomy.seconds < tight.seconds < tightest.seconds


def test_what_is_decided_stays():
    plans = planner(
        choices={
            "weights": ("streamed",),
            "tap_dtype": ("int8",),
            "slice_tokens": (512,),
            "optimizer": ("sgd",),
            "quantize_head": (True,),
        }
    )
    for plan in (plans.usual(), plans.fastest(10**11), plans.smallest()):
        found = plan.settings
        assert (found.weights, found.embeddings, found.tap_dtype) == ("streamed", "host", "int8")
        assert (found.slice_tokens, found.optimizer, plan.quantize_head) == (512, "sgd", True)
        assert plan.options()["optimizer"] == "sgd"
    assert "the output head is NF4" in plans.usual().changes


def test_rows_are_split_as_memory_allows():
    plans = planner(rows=12)
    little = plans.smallest().bytes * 21 // 20
    batches = [plans.fastest(budget).settings.batch_size for budget in (little, 60 * 10**9)]
    assert batches[0] < batches[1]
    for size in batches:
        assert 12 % size == 0
    assert plans.usual().settings.batch_size == 12
    options = plans.fastest(little).options()
    assert options["batch_size"] * options["gradient_accumulation"] == 12


def test_gradients_are_freed_only_where_no_norm_is_taken():
    assert not planner().smallest().settings.free_gradients
    freed = planner(clips=False).smallest()
    assert freed.settings.free_gradients
    assert freed.bytes < planner().smallest().bytes
    assert "free_gradients" in in_words(freed)


def test_a_head_that_is_the_embeddings_is_not_torn_from_them():
    for plan in (planner("Llama-3.2-1B").smallest(), planner("SmolLM2-135M").smallest()):
        assert plan.settings.embeddings == "device" or plan.quantize_head


def test_documents_cost_a_gpu_masks():
    plain, packed = (planner(documents=documents).usual() for documents in (False, True))
    assert packed.bytes >= plain.bytes + 28 * 4 * 2048 * 2048
    on_cpu = [
        planner(documents=documents, device="cpu").usual().bytes for documents in (False, True)
    ]
    assert on_cpu[0] == on_cpu[1]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(KNOWN)), st.integers(4, 40))
def test_the_longest_row(model, gigabytes_of_memory):
    plans, budget = planner(model), gigabytes_of_memory * 10**9
    usual = plans.usual()
    longest = plans.longest_context(usual, budget, 1 << 17)
    if longest == 0:
        assert usual.peak.parts["weights"] + RUNTIME < budget or usual.bytes > budget
        return
    fits = planner(model, context=longest).usual()
    assert fits.bytes <= budget
    if longest < 1 << 17:
        assert planner(model, context=longest + 1).usual().bytes > budget


def test_qlora_beside_it():
    plans = planner("Llama-3.1-8B")
    plain, checkpointed = (plans.qlora(checkpointing=each) for each in (False, True))
    assert plain.total > checkpointed.total > plans.smallest().peak.total
    longest = plans.longest_qlora(checkpointing=True, budget=12 * 10**9, most=1 << 20)
    peak = plans.qlora(checkpointing=True, context=longest)
    assert peak.total + RUNTIME <= 12 * 10**9
    assert plans.qlora(checkpointing=True, context=longest + 1).total + RUNTIME > 12 * 10**9
    assert longest < plans.longest_context(plans.smallest(), 12 * 10**9, 1 << 20)
    assert plans.longest_qlora(checkpointing=False, budget=10**9, most=1 << 20) == 0


@pytest.mark.parametrize(("name", "value"), [("context", 1), ("rows", 0)])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"{name}: found {value}"):
        planner(**{name: value})
