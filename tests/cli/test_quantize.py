"""``quantize``: a folder that is a base, from a model and texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Olmo2Config, Olmo2ForCausalLM

import ladder_kernels as lk
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.training.data import calibration_rows, load_tokenizer

ORDER = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.py"
    path.write_text("".join(f"# {n} and then {n + 1}.\n" for n in range(60)), encoding="utf-8")
    return path


def bits(backbone) -> list[torch.Tensor]:
    return [
        weight.tensors()[name]
        for _, weight in backbone.named_weights()
        if isinstance(weight, NF4Weight)
        for name in ORDER
        if name in weight.tensors()
    ]


def same(a, b) -> bool:
    left, right = bits(a), bits(b)
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_without_texts_it_rounds_to_nearest(call, base, tmp_path):
    run = call("quantize", base, tmp_path / "out", "--blocksize", 32, "--no-double-quant")
    assert (run.code, run.stderr) == (0, "")
    assert str(tmp_path / "out") in run.stdout
    written = load_backbone(tmp_path / "out")
    assert same(written, load_backbone(base, blocksize=32, double_quant=False))
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(base).get_vocab()


def test_what_it_writes_can_be_streamed(call, base, data, tmp_path):
    """A run from it ends in the same bits, and so do what is scored and what is said."""
    assert call("quantize", base, tmp_path / "packed").code == 0
    texts, scores, ladders = [], [], []
    for weights in ("resident", "streamed"):
        output = tmp_path / weights
        placed = ("--weights", weights, "--device", "cpu")
        run = call(
            "train", "--model", tmp_path / "packed", "--data", data, "--output", output, *placed,
            "--context", 48, "--max-steps", 3, "--gradient-accumulation", 2, "--reduction", 4,
            "--reentry", 1, "--adapter-rank", 2, "--learning-rate", "1e-2", "--json",
        )  # fmt: skip
        assert (run.code, run.stderr) == (0, ""), run
        ladders.append(load_file(output / "model.safetensors"))
        run = call(
            "evaluate", "--model", output, "--data", data, "--context", 48, "--json", *placed
        )
        scored = json.loads(run.stdout)
        scores.append([scored[name]["perplexity"] for name in ("base", "tuned")])
        run = call("generate", "--model", output, "--raw", "--max-new-tokens", 6, *placed, "the")
        assert (run.code, run.stderr) == (0, ""), run
        texts.append(run.stdout)
    assert all(torch.equal(ladders[0][name], ladders[1][name]) for name in ladders[0])
    assert scores[0] == scores[1]
    assert texts[0] == texts[1]


def test_float_weights_cannot_be_streamed(call, base, data, tmp_path):
    run = call(
        "train", "--model", base, "--data", data, "--output", tmp_path / "out", "--context", 48,
        "--weights", "streamed", "--device", "cpu",
    )  # fmt: skip
    run.assert_refused("weights: found 'streamed'", f"'ladder-kernels quantize {base} FOLDER'")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_no_room_for_the_file(spawn, base, tmp_path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "from ladder_kernels.cli import main; main(sys.argv[1:])"
    )
    run = spawn("quantize", base, tmp_path / "out", code=code)
    run.assert_refused("File too large", "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*transformers' own layers")
def test_layers_of_transformers_are_written_too(call, tmp_path):
    config = Olmo2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    Olmo2ForCausalLM(config).save_pretrained(tmp_path / "base")
    run = call("quantize", tmp_path / "base", tmp_path / "out", "--blocksize", 32)
    assert run.code == 0
    written, base = (load_backbone(tmp_path / name, blocksize=32) for name in ("out", "base"))
    assert same(written, base)


def test_texts_calibrate(call, base, data, prose, tmp_path):
    """With data files as well as with any text; the result carries a ladder, and is found again."""
    run = call(
        "quantize", base, tmp_path / "out", "--calibration", data, "--calibration", prose,
        "--tokens", 512, "--context", 32, "--quantize-head",
    )  # fmt: skip
    assert run.code == 0
    assert run.stderr.count("\n") == 1
    rows = calibration_rows([data, prose], load_tokenizer(base), tokens=512, context=32)
    assert f"{sum(map(len, rows)):,} tokens" in run.stderr
    written = load_backbone(tmp_path / "out")
    assert same(written, load_backbone(base, calibration=rows, quantize_head=True))
    assert not same(written, load_backbone(base, quantize_head=True))

    ladder = lk.LadderConfig.lst(reduction=4)
    lk.LadderForCausalLM.from_pretrained(tmp_path / "out", ladder=ladder).save_pretrained(
        tmp_path / "ladder"
    )
    run = call("generate", "--model", tmp_path / "ladder", "--raw", "--max-new-tokens", 4, "hello")
    assert (run.code, run.stderr) == (0, "")


def test_dtype(call, base, prose, tmp_path):
    run = call("quantize", base, tmp_path / "out", "--calibration", prose, "--dtype", "bfloat16")
    assert run.code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_without_tokenizer(call, base, prose, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(base / name)
    assert call("quantize", bare, tmp_path / "nearest").code == 0
    run = call("quantize", bare, tmp_path / "out", "--calibration", prose)
    run.assert_refused(str(bare), "tokenizer")
    assert not (tmp_path / "out").exists()


def test_rows_are_spread_over_each_source(base, data, prose):
    tokenizer = load_tokenizer(base)
    rows = calibration_rows([data, prose], tokenizer, tokens=200, context=20)
    assert [len(row) for row in rows] == [20] * 10
    text = prose.read_text()
    places = [text.find(tokenizer.decode(row)) for row in rows[5:]]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] > 0.7 * len(text)
    every = calibration_rows([prose], tokenizer, tokens=10**6, context=1000)
    assert tokenizer.decode([token for row in every for token in row]) == text + "</s>"
    assert len(calibration_rows([data, prose], tokenizer, tokens=1, context=20)) == 2


def test_an_output_that_exists(call, base, data):
    run = call("quantize", base, data.parent)
    run.assert_refused(str(data.parent), "not an empty folder")
    call("quantize", base, data).assert_refused(str(data), "not an empty folder")


def test_what_is_missing(call, base, tmp_path):
    missing = tmp_path / "nowhere" / "texts" / "file.txt"
    run = call("quantize", base, tmp_path / "out", "--calibration", missing)
    run.assert_refused(str(missing), "does not exist")
    call("quantize", missing, tmp_path / "out").assert_refused(str(missing), "does not exist")
    assert call("quantize", base).code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.md", b""), ("a.md", b" \n "), ("a.md", b"\xff\xfe\x00"), ("a.jsonl", b"")],
)
def test_texts_that_hold_none(call, base, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    run = call("quantize", base, tmp_path / "out", "--calibration", path)
    run.assert_refused(str(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--blocksize", "48"), ["blocksize is 48", "32, 64"]),
        (("--tokens", "100"), ["tokens", "--calibration"]),
        (("--context", "100"), ["context", "--calibration"]),
        (("--dtype", "int4"), ["dtype", "'int4'", "bfloat16"]),
        (("--device", "abacus"), ["device", "'abacus'"]),
    ],
)
def test_wrong_options(call, base, tmp_path, arguments, parts):
    call("quantize", base, tmp_path / "out", *arguments).assert_refused(*parts)
    assert not (tmp_path / "out").exists()


def test_a_context_longer_than_the_model_allows(call, base, prose, tmp_path):
    run = call(
        "quantize", base, tmp_path / "out", "--calibration", prose, "--context", 65, "--tokens", 65
    )
    run.assert_refused("context", "65", "64")


def test_a_model_that_is_quantised_already(call, base, prose, tmp_path):
    assert call("quantize", base, tmp_path / "once").code == 0
    run = call("quantize", tmp_path / "once", tmp_path / "twice", "--calibration", prose)
    assert run.code == 2
    assert "quantised already" in run.stderr
