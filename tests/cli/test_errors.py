"""What a user can get wrong: one clear line on stderr and exit code 2, in a real process."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

UNREACHABLE = "http://127.0.0.1:9"  # the port of "discard": nothing listens there


@pytest.fixture
def train(base, data, tmp_path, spawn):
    """Train for a step with whatever a test changes."""

    def run(*arguments, model=base, rows=data, output=tmp_path / "out", **env):
        return spawn(
            "train", "--model", model, "--data", rows, "--output", output, "--context", 32,
            "--max-steps", 1, "--reduction", 4, *arguments, **env,
        )  # fmt: skip

    return run


@pytest.fixture
def copied(base, tmp_path) -> Path:
    """A copy of the base model to be damaged."""
    return Path(shutil.copytree(base, tmp_path / "copied"))


def test_missing_model_folder(train, tmp_path):
    missing = tmp_path / "nowhere" / "model" / "final"
    train(model=missing).assert_refused(str(missing), "does not exist")


def test_unknown_architecture(train, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "frobnicator"}))
    train(model=copied).assert_refused("'frobnicator'", "llama", "qwen2", "gpt2")
    assert not (tmp_path / "out").exists()


def test_truncated_weights(train, copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    train(model=copied).assert_refused(str(weights), "truncated or corrupt")


def test_corrupt_weights(train, copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(b"\xff" * 4096)
    train(model=copied).assert_refused(str(weights), "truncated or corrupt")


def test_saved_ladder_on_another_base(spawn, ladder, base, other_base):
    run = spawn("generate", "--model", ladder, "--base", other_base, "--raw", "hello")
    run.assert_refused(str(ladder), str(base), str(other_base), "fingerprint")


def test_context_longer_than_the_model_allows(train):
    train("--context", 65).assert_refused("context", "65", "64")


def test_empty_data(train, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    train(rows=empty).assert_refused(str(empty), "empty")


def test_data_without_the_named_column(train):
    train("--format", "text", "--text-column", "body").assert_refused("'body'", "text")


def test_missing_data(train, tmp_path):
    train(rows=tmp_path / "no.jsonl").assert_refused("no.jsonl", "does not exist")


def test_output_folder_that_is_not_empty(train, tmp_path, snapshot):
    output = tmp_path / "out"
    (output / "inner").mkdir(parents=True)
    (output / "config.json").write_text("{}")
    (output / "inner" / "thesis.txt").write_text("three years of work")
    before = snapshot(output)
    train(output=output).assert_refused(str(output), "not empty")
    assert snapshot(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_output_below_a_file(train, tmp_path):
    (tmp_path / "file").write_text("a file")
    train(output=tmp_path / "file" / "out").assert_refused(str(tmp_path / "file"))


def test_unknown_yaml_key(train, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning-rat: 1e-3\n")
    train("--config", config).assert_refused(
        str(config), "'learning-rat'", "did you mean 'learning_rate'?"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("context: long\n", ("context: found 'long'", "a whole number")),
        ("context: 16.5\n", ("context: found 16.5", "a whole number")),
        ("pack: 1\n", ("pack: found 1", "true or false")),
        ("learning_rate: [1]\n", ("learning_rate: found [1]", "a number")),
        ("seed: null\n", ("seed: found nothing", "a whole number")),
        ("- context: 16\n", ("must map option names to values",)),
        ("context: 16\ncontext: 32\n", ("'context'", "twice")),
        ("context: [16\n", ("not valid YAML in line 2",)),
        ("zzz: 1\n", ("'zzz'", "allowed are model, output, data")),
    ],
)
def test_wrong_yaml(call, tmp_path, text, parts):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    call("train", "--config", config).assert_refused(str(config), *parts)


def test_yaml_file_that_is_missing_or_no_text(call, tmp_path):
    call("train", "--config", tmp_path / "no.yaml").assert_refused("no.yaml", "does not exist")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    call("train", "--config", tmp_path / "bytes.yaml").assert_refused("bytes.yaml", "UTF-8")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("--model, --output, --data must be given", "--config")),
        (("--model", "m", "--data", "d"), ("--output must be given",)),
        (("--contxt", "12"), ("--contxt", "--context", "train --help")),
        (("--context", "twelve"), ("--context", "integer")),
        (("--context",), ("--context",)),
        (("stray",), ("stray",)),
    ],
)
def test_wrong_usage(call, arguments, parts):
    call("train", *arguments).assert_refused(*parts)


def test_unknown_command(call):
    call("trian").assert_refused("trian", "train")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("schedule", "sine", "cosine"),
        ("format", "sonnet", "completion"),
        ("kind", "rope", "xladder"),
        ("merge", "glue", "channel"),
        ("init", "zen", "orthogonal"),
        ("dtype", "int3", "bfloat16"),
        ("tap-dtype", "int3", "float16"),
        ("rungs", "[[1], [9]]", "0 to 2"),
        ("rungs", "[[1", "YAML"),
        ("rungs", "up", "list of rungs"),
        ("blocksize", 63, "64"),
        ("device", "abacus", "cpu"),
        ("report-to", "pigeon", "tensorboard"),
        ("optimizer", "hope", "adamw_torch"),
        ("resume", None, "resume"),
    ],
)
def test_values_that_are_not_allowed(call, base, data, tmp_path, option, value, allowed):
    run = call(
        "train", "--model", base, "--data", data, "--output", tmp_path / "out", "--context", 32,
        "--max-steps", 1, "--no-progress", f"--{option}", *(() if value is None else (value,)),
    )  # fmt: skip
    assert run.code == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert allowed in last
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_device_that_is_not_there(call, base, data, command):
    arguments = ("--data", data) if command == "evaluate" else ("hello",)
    run = call(command, "--model", base, "--device", "cuda:99", *arguments)
    run.assert_refused("'cuda:99'", "cpu")


def test_hub_model_without_network(train, tmp_path):
    start = time.monotonic()
    train(model="someone/some-model", HF_ENDPOINT=UNREACHABLE).assert_refused(
        "someone/some-model", "cannot be reached"
    )
    assert time.monotonic() - start < 40  # the hub's client alone would retry for longer


def test_hub_data_without_network(spawn, base):
    spawn(
        "evaluate", "--model", base, "--data", "someone/some-data", HF_ENDPOINT=UNREACHABLE
    ).assert_refused("someone/some-data")


def test_evaluation_context_longer_than_the_model_allows(call, base, data):
    call("evaluate", "--model", base, "--data", data, "--context", 65).assert_refused("65", "64")


def test_prompts_that_cannot_be(call, base, other_base):
    generate = ("generate", "--model")
    call(*generate, base, "   ").assert_refused("prompt", "empty")
    call(*generate, base, "--raw", "x" * 64).assert_refused("64 tokens", "context of 64")
    call(*generate, base, "--raw", "--system", "be kind", "hi").assert_refused("system", "raw")
    call(*generate, other_base, "--chat", "hi").assert_refused("chat template", "--raw")
    call(*generate, base, "--top-p", "1.5", "hi").assert_refused("--top-p")
