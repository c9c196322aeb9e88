"""``train``: from flags and a file to a saved ladder that the other commands take."""

from __future__ import annotations

import json

import pytest

import ladder_kernels as lk

SMALL = (
    "--context", 48, "--reduction", 4, "--max-steps", 2, "--logging-steps", 1, "--dtype", "float32",
    "--device", "cpu",
)  # fmt: skip


def test_a_run_ends_in_a_ladder_that_the_other_commands_take(call, base, data, tmp_path):
    output = tmp_path / "out"
    run = call(
        "train", "--model", base, "--data", data, "--eval-data", data, "--output", output, *SMALL,
        "--max-steps", 8, "--learning-rate", "1e-2",
    )  # fmt: skip
    assert run.code == 0, run
    for name in ("optimizer steps", "tokens/s", "peak memory", "perplexity, base", str(output)):
        assert name in run.stdout
    assert "step 8/8" in run.stderr

    scored = json.loads(
        call("evaluate", "--model", output, "--data", data, "--context", 48, "--json").stdout
    )
    assert scored["tuned"]["perplexity"] < scored["base"]["perplexity"]
    for name in ("base", "tuned"):
        assert f"{scored[name]['perplexity']:.4f}" in run.stdout
    assert call("generate", "--model", output, "--max-new-tokens", 4, "hello").code == 0


def test_flags_override_the_file(call, base, data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\ndata: {data}\noutput: {tmp_path / 'of-the-file'}\n"
        "context: 48\nreduction: 8\nmax_steps: 3\nlearning_rate: 1e-3\nmerge: gate\n"
        "rungs: [[1], []]\ndevice: cpu\npack: no\n"
    )
    output = tmp_path / "of-the-flag"
    run = call(
        "train",
        "--config",
        config,
        "--output",
        output,
        "--max-steps",
        1,
        "--merge",
        "sum",
        "--json",
    )
    assert (run.code, run.stderr) == (0, ""), run
    result = json.loads(run.stdout)
    assert result["steps"] == 1
    assert result["output"] == str(output)
    assert result["base"] is None
    assert not (tmp_path / "of-the-file").exists()
    shape = lk.LadderForCausalLM.from_pretrained(output).config.ladder_config
    assert (shape.merge, shape.reduction, shape.rungs) == ("sum", 8, ((1,), ()))


def test_a_flag_at_its_default_overrides_the_file_too(call, base, data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("merge: gate\n")
    output = tmp_path / "out"
    run = call(
        "train", "--config", config, "--model", base, "--data", data, "--output", output, *SMALL,
        "--merge", "sum",
    )  # fmt: skip
    assert run.code == 0, run
    assert lk.LadderForCausalLM.from_pretrained(output).config.ladder_config.merge == "sum"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--kind", "xladder", "--connected", 1, "--free", 2), ((2,), (), ())),
        (("--every", 2), ((2,),)),
        (("--rungs", "[[0, 2], [], [1]]"), ((0, 2), (), (1,))),
    ],
)
def test_ladder_shapes(call, base, data, tmp_path, flags, expected):
    output = tmp_path / "out"
    run = call(
        "train", "--model", base, "--data", data, "--output", output, *SMALL, *flags, "--json"
    )
    assert (run.code, run.stderr) == (0, ""), run
    shape = lk.LadderForCausalLM.from_pretrained(output).config.ladder_config
    assert shape.resolve(2) == expected


def test_progress_can_be_left_out(spawn, base, data, tmp_path):
    run = spawn(
        "train", "--model", base, "--data", data, "--output", tmp_path / "out", *SMALL,
        "--no-progress",
    )  # fmt: skip
    assert (run.code, run.stderr) == (0, "")
    assert "saved to" in run.stdout


def test_a_budget_says_what_it_chose(call, base, data, tmp_path):
    common = ("train", "--model", base, "--data", data, *SMALL)
    run = call(*common, "--output", tmp_path / "out", "--budget", "601 MB")
    assert run.code == 0, run
    assert run.stderr.startswith("within 601 MB: ")
    assert "planned" in run.stderr.splitlines()[0]
    refused = call(*common, "--output", tmp_path / "none", "--budget", "1MB")
    refused.assert_refused("budget: found 0.01 GB", "at least")
    assert not (tmp_path / "none").exists()
