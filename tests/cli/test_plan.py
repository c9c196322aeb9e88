"""``plan``: what a model takes, in which parts, and what fits, before a download."""

from __future__ import annotations

import json

import pytest

from ladder_kernels.memory.planner import RUNTIME


def test_a_table(call):
    run = call("plan", "--model", "Qwen2.5-7B", "--budget", "6GB")
    assert (run.code, run.stderr) == (0, "")
    for words in (
        *("Qwen2.5-7B: 7.62 B parameters", "1 x 2,048 tokens a step", "this plan", "QLoRA"),
        *("weights", "taps", "gradients", "runtime", "fits", "longest row", "largest in:"),
        *("train with: ", "--gradient-checkpointing"),
    ):
        assert words in run.stdout
    total = next(line for line in run.stdout.splitlines() if line.startswith("total"))
    assert int(total.split()[1].replace(",", "")) <= 6000


def test_gradients_are_freed_without_clipping(call):
    arguments = ("plan", "--model", "Qwen2.5-7B", "--kind", "lst", "--budget", "2GB", "--no-clip")
    said = call(*arguments).stdout.partition("train with: ")[2]
    assert "--free-gradients" in said
    assert "--max-grad-norm 0" in said


@pytest.mark.parametrize("budget", [None, "5GB"])
def test_as_json(call, budget):
    arguments = ("plan", "--model", "Qwen/Qwen3-8B-Base", "--json", "--rows", 4, "--kind", "lst")
    run = call(*arguments, *(() if budget is None else ("--budget", budget)))
    found = json.loads(run.stdout)
    assert found["parameters"] == 8_190_735_360
    assert sum(found["parts"].values()) == found["peak"] == max(found["stages"].values())
    assert found["total"] == found["peak"] + RUNTIME
    assert found["stages"][found["bound"]] == found["peak"]
    settings = found["settings"]
    assert settings["batch_size"] * settings["gradient_accumulation"] == 4
    assert [rival["name"] for rival in found["rivals"]] == [
        "QLoRA",
        "QLoRA, gradient checkpointing",
    ]
    for rival in found["rivals"]:
        assert sum(rival["parts"].values()) == rival["peak"]
        assert budget is None or rival["peak"] > found["peak"]
        assert (rival["longest_context"] is None) == (budget is None)
    if budget is None:
        assert (found["budget"], settings["weights"], settings["batch_size"]) == (
            None,
            "resident",
            4,
        )
    else:
        assert found["total"] <= found["budget"] == 5 * 10**9
        assert found["longest_context"] >= 2048


def test_a_folder_and_what_is_decided(call, base):
    run = call(
        "plan", "--model", base, "--device", "cpu", "--context", 48, "--reduction", 4, "--json",
        "--weights", "streamed", "--slice-tokens", 128, "--gradient-checkpointing",
        "--taps", "disk",
    )  # fmt: skip
    found = json.loads(run.stdout)
    assert found["settings"] == {
        **found["settings"],
        "weights": "streamed",
        "slice_tokens": 128,
        "gradient_checkpointing": True,
        "taps": "disk",
        "optimizer": "adamw_torch_fused",
    }
    assert found["trained_parameters"] > 0


def test_what_it_says_of_settings_is_what_train_takes(call, base, data, tmp_path):
    planned = call(
        "plan",
        "--model",
        base,
        "--device",
        "cpu",
        "--context",
        48,
        "--rows",
        2,
        "--budget",
        "601MB",
    ).stdout
    options = planned.partition("train with: ")[2].split()
    options = [] if options == ["the", "defaults"] else options
    run = call(
        "train", "--model", base, "--data", data, "--output", tmp_path / "out", "--device", "cpu",
        "--context", 48, "--max-steps", 1, *options,
    )  # fmt: skip
    assert run.code == 0, run


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("--model must be given",)),
        (("--model", "Qwen9-7B"), ("Qwen9-7B", "known are Llama-2-7B")),
        (("--model", "Qwen3-8B", "--budget", "six"), ("budget: found 'six'", "6GB")),
        (("--model", "Qwen3-8B", "--budget", "1GB"), ("need", "at least", "weights host")),
        (("--model", "Qwen3-8B", "--device", "tpu"), ("device: found 'tpu'", "cuda, cpu")),
        (("--model", "Qwen3-8B", "--taps", "moon"), ("taps: found 'moon'", "device, host, disk")),
        (("--model", "Qwen3-8B", "--optimizer", "lion"), ("optimizer: found 'lion'", "adamw_8bit")),
        (("--model", "Qwen3-8B", "--reduction", 7), ("reduction: found 7",)),
        (("--model", "Qwen3-8B", "--batch-size", 2), ("batch_size: found 2", "rows 1")),
    ],
)
def test_what_is_refused(call, arguments, parts):
    call("plan", *arguments).assert_refused(*parts)
