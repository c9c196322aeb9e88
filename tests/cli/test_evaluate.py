"""``evaluate``: the numbers of ``evaluate_perplexity``, as a table and as JSON."""

from __future__ import annotations

import json

import pytest

import ladder_kernels as lk
from ladder_kernels.training.data import DataOptions, load_tokenizer, prepare_data
from ladder_kernels.training.evaluation import evaluate_perplexity


def test_json_holds_what_the_model_scores(call, ladder, data):
    run = call("evaluate", "--model", ladder, "--data", data, "--context", 48, "--json")
    assert (run.code, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    model = lk.LadderForCausalLM.from_pretrained(ladder)
    rows = prepare_data(DataOptions(source=str(data)), load_tokenizer(ladder), 48)
    for name in ("base", "tuned"):
        expected = evaluate_perplexity(model, rows, base=name == "base")
        assert found[name]["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert found[name]["tokens"] == expected.tokens
    assert found["base"]["loss"] != found["tuned"]["loss"]
    assert found["context"] == 48


def test_table(call, ladder, data):
    options = ("evaluate", "--model", ladder, "--data", data)
    run = call(*options)
    assert (run.code, run.stderr) == (0, "")
    found = json.loads(call(*options, "--json").stdout)
    assert found["context"] == 64  # all that the model allows
    for name in ("base", "tuned"):
        row = next(line for line in run.stdout.splitlines() if line.startswith(name))
        assert f"{found[name]['perplexity']:.4f}" in row
    change = found["tuned"]["perplexity"] / found["base"]["perplexity"] - 1
    assert f"{change:+.1%}" in run.stdout


def test_base_model_alone(call, base, ladder, data):
    alone = json.loads(call("evaluate", "--model", base, "--data", data, "--json").stdout)
    beside = json.loads(call("evaluate", "--model", ladder, "--data", data, "--json").stdout)
    assert alone["tuned"] is None
    assert alone["base"]["loss"] == beside["base"]["loss"]
    assert "tuned" not in call("evaluate", "--model", base, "--data", data).stdout


def test_batches_and_padding_change_nothing(call, ladder, data):
    options = ("evaluate", "--model", ladder, "--data", data, "--json", "--no-pack")
    one = json.loads(call(*options).stdout)
    many = json.loads(call(*options, "--batch-size", 5).stdout)
    assert many["tuned"]["loss"] == pytest.approx(one["tuned"]["loss"], rel=1e-5)
    assert many["tuned"]["tokens"] == one["tuned"]["tokens"]
