"""The study's machinery: methods, trials, where results are kept, tables and slopes."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.learning.bases import BASES, load_base
from bench.learning.compute import operations
from bench.learning.data import CONTEXT, batches, first_answer_tokens, rows_of
from bench.learning.full import FULL, FullModel
from bench.learning.judge import mean_loss
from bench.learning.methods import METHODS, method_of
from bench.learning.report import frontier, markdown, slope, write
from bench.learning.results import append, claimed, read
from bench.learning.studies import COST, PEFT, QLORA_STEPS, STUDIES
from bench.learning.tasks import TASKS, load_task
from bench.learning.trial import Result, Trial, run_trial
from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.demo import find_weights
from ladder_kernels.training.data import load_tokenizer

TRIAL = Trial(study="docstrings", task="docstrings", base="calibrated", method="qlora", seed=1)
RESULT = Result(
    trial=TRIAL,
    tokens=81920,
    trained_parameters=4884480,
    seconds_per_step=2.25,
    threads=1,
    first_loss=3.5,
    last_loss=2.75,
    figures={"loss": 2.8125, "perplexity": 16.651},
    device="a machine, with a comma",
    versions="torch=1",
    commit="abc",
)


@pytest.mark.parametrize("layers", [30, 32, 12])
@pytest.mark.parametrize("name", METHODS)
def test_methods_fit_backbones_of_any_depth(name, layers):
    config = method_of(name).config(layers, 7)
    assert config.seed == 7
    rungs = config.resolve(layers)
    tapped = [layer for rung in rungs for layer in rung]
    assert all(0 < layer <= layers - config.reentry_layers(layers) for layer in tapped)
    assert rungs or config.adapter_rank


@pytest.mark.parametrize("call", [lambda: method_of("none"), lambda: load_base("none")])
def test_unknown_names_are_refused_with_those_that_there_are(call):
    with pytest.raises(ValueError, match=r"'none': there are (qlora|nearest), "):
        call()


@pytest.mark.parametrize("study", STUDIES)
def test_studies_name_what_there_is_and_try_nothing_twice(study):
    trials = list(STUDIES[study]())
    assert trials
    assert len({trial.key for trial in trials}) == len(trials)
    for trial in trials:
        assert trial.study == study
        assert trial.task in TASKS
        assert trial.base in BASES
        assert trial.method in METHODS or trial.method in ("untrained", FULL)
        assert trial.steps > 0 or trial.method == "untrained"


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "results" / "learning.csv"
    assert read(path) == []
    untrained = replace(
        RESULT,
        trial=replace(TRIAL, method="untrained", steps=0),
        seconds_per_step=math.nan,
        first_loss=math.nan,
        last_loss=math.nan,
    )
    append(RESULT, path)
    append(untrained, path)
    first, second = read(path)
    assert first == RESULT
    assert second.trial == untrained.trial
    assert math.isnan(second.seconds_per_step)
    assert path.read_text().count("study,") == 1


def _try_to_claim(folder: Path) -> bool:
    with claimed(TRIAL, folder) as free:
        return free


def test_one_process_has_a_trial_at_a_time(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with claimed(TRIAL, tmp_path) as free:
            assert free
            assert not pool.apply(_try_to_claim, (tmp_path,))
        assert pool.apply(_try_to_claim, (tmp_path,))


def test_the_key_does_not_depend_on_the_study():
    assert replace(TRIAL, study="scaling").key == TRIAL.key
    assert replace(TRIAL, seed=2).key != TRIAL.key


def test_slope_of_a_power_law_and_its_error():
    exact = [(10.0**k, 3.0 * (10.0**k) ** -0.25) for k in range(4)]
    found, error = slope(exact)
    assert found == pytest.approx(-0.25)
    assert error == pytest.approx(0, abs=1e-12)
    noisy = [(x, y * (1.1 if i % 2 else 0.9)) for i, (x, y) in enumerate(exact)]
    found, error = slope(noisy)
    # By the formulas of simple regression, worked out for these four points.
    x = torch.tensor([math.log(p) for p, _ in noisy], dtype=torch.float64)
    y = torch.tensor([math.log(q) for _, q in noisy], dtype=torch.float64)
    design = torch.stack((x, torch.ones_like(x)), dim=1)
    covariance = torch.linalg.inv(design.T @ design)
    solution = covariance @ design.T @ y
    residual = y - design @ solution
    assert found == pytest.approx(solution[0].item())
    assert error == pytest.approx((residual.square().sum() / 2 * covariance[0, 0]).sqrt().item())


def test_operations_of_a_trial():
    layer, head, labelled = 3_538_944, 576 * 49152, 400 / 2048
    # Up and back through all layers and the head; the adapters three times.
    expected = 2 * (2 * 30 * layer + 2 * labelled * head + 3 * 4_884_480) * 81920
    assert operations(RESULT) == pytest.approx(expected)
    half = replace(RESULT, trial=replace(TRIAL, method="re-entry 1/2", base="cut"))
    expected = 2 * ((22 + 11) * layer + 2 * labelled * head + 3 * 4_884_480) * 81920
    assert operations(half) == pytest.approx(expected)


def test_report(tmp_path):
    others = [
        replace(RESULT, trial=replace(TRIAL, seed=2), figures={"loss": 2.9, "perplexity": 18.2}),
        *(
            replace(
                RESULT,
                trial=replace(TRIAL, method=name, seed=0),
                trained_parameters=size,
                figures={"loss": loss, "perplexity": math.exp(loss)},
            )
            for name, size, loss in (
                ("qlora r1", 10, 3.0),
                ("qlora r4", 40, 2.9),
                ("qlora", 160, 2.8),
            )
        ),
    ]
    text = markdown([RESULT, *others])
    assert "| docstrings | calibrated | qlora | 4.88 M | 40 | 1.00 | 0.46 | 3 | 17.099 ± " in text
    assert "| QLoRA, rank 1 to 64, 30 layers | 3.000, 2.900, 2.800 | -0.0" in text
    write([RESULT, *others], tmp_path)
    assert (tmp_path / "learning.md").read_text() == text
    points = frontier([RESULT, *others])
    assert points["qlora"][-1] == (40, pytest.approx(17.099, abs=1e-3))
    assert points[PEFT][-1][0] > 40


@pytest.mark.parametrize("name", ["maths", "critic"])
def test_rows_hold_whole_examples_and_answers_are_found(name):
    tokenizer = load_tokenizer(find_weights())
    task = load_task(name, train_size=60, held_out_size=20)
    rows = batches(rows_of(task, task.train, tokenizer, 2), tokenizer)
    assert len(rows) == 2
    firsts = {
        tokenizer(example.answer, add_special_tokens=False)["input_ids"][0]
        for example in task.train
    }
    for row in rows:
        assert row["input_ids"].shape == (1, CONTEXT[name])
        places = list(first_answer_tokens(row))
        assert len(places) == int((row["position_ids"][0] == 0).sum()) - _padding_starts(row)
        for place, token in places:
            assert token in firsts
            assert row["input_ids"][0, place + 1] == token
            assert row["labels"][0, place] == -100


def _padding_starts(row: dict[str, torch.Tensor]) -> int:
    """Documents of padding at the end of a row, one at most."""
    mask = row["attention_mask"][0].bool()
    starts = row["position_ids"][0] == 0
    return int((starts & ~mask).sum())


def test_the_whole_model_tells_packed_documents_apart_as_ours_does():
    tokenizer = load_tokenizer(find_weights())
    task = load_task("nlu", train_size=60, held_out_size=20)
    rows = batches(rows_of(task, task.train, tokenizer, 1), tokenizer)
    whole = FullModel().eval()
    ours = LadderForCausalLM.from_backbone(load_base("float"), LadderConfig.lst(every=10)).eval()
    right = pytest.approx(mean_loss(ours, rows), rel=0.01)
    assert mean_loss(whole, rows) == right
    together = [
        {**row, "position_ids": torch.arange(row["input_ids"].shape[1])[None]} for row in rows
    ]
    assert mean_loss(whole, together) != right


def test_the_whole_model_is_trained_from_the_float_base_only():
    with pytest.raises(ValueError, match="begins with the base 'float', not 'calibrated'"):
        run_trial(replace(TRIAL, method=FULL, steps=1))


def test_a_trial_fills_the_time_that_peft_takes():
    one, whole = COST["re-entry 1/2 + r16"], QLORA_STEPS["docstrings"] * COST[PEFT]
    trials = [t for t in STUDIES["docstrings"]() if t.method == "re-entry 1/2 + r16"]
    seeds = {t.seed for t in trials if t.steps * one <= whole < (t.steps + 1) * one}
    assert seeds == {0, 1, 2}
