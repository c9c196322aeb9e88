"""``generate``: what it prints is what the model says."""

from __future__ import annotations

import io
import shutil
import sys

import pytest
import torch
from transformers import AutoTokenizer

import ladder_kernels as lk

PROMPT = "once upon"


def _says(folder, text: str, *, count: int = 12, ladder: bool = True, special: bool = True) -> str:
    """Greedy, token by token, without a cache."""
    model = lk.LadderForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder if (folder / "tokenizer.json").exists() else model.backbone.name_or_path
    )
    tokens = tokenizer(text, add_special_tokens=special)["input_ids"]
    start = len(tokens)
    for _ in range(count):
        with torch.no_grad():
            if ladder:
                logits = model(torch.tensor([tokens]), use_cache=False).logits
            else:
                with model.disable_ladder():
                    logits = model(torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[start:], skip_special_tokens=True) + "\n"


def test_raw_prompt(call, ladder):
    run = call("generate", "--model", ladder, "--raw", "--max-new-tokens", 12, PROMPT)
    assert (run.code, run.stderr) == (0, "")
    assert run.stdout == _says(ladder, PROMPT)


def test_without_the_ladder_the_base_answers(call, ladder, base):
    raw = ("--raw", "--max-new-tokens", 12, PROMPT)
    without = call("generate", "--model", ladder, "--no-ladder", *raw).stdout
    assert without == _says(ladder, PROMPT, ladder=False)
    assert without == call("generate", "--model", base, *raw).stdout
    assert without != call("generate", "--model", ladder, *raw).stdout


def test_chat_is_the_default_where_there_is_a_template(call, ladder, base, other_base):
    short = ("--max-new-tokens", 12, PROMPT)
    expected = _says(ladder, f"[user]{PROMPT}</s>[assistant]", special=False)
    assert call("generate", "--model", ladder, *short).stdout == expected
    assert call("generate", "--model", ladder, "--chat", *short).stdout == expected
    system = _says(ladder, f"[system]be brief</s>[user]{PROMPT}</s>[assistant]", special=False)
    assert call("generate", "--model", ladder, "--system", "be brief", *short).stdout == system
    plain = call("generate", "--model", other_base, *short)
    assert plain.stdout == call("generate", "--model", other_base, "--raw", *short).stdout


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_prompt_from_stdin(call, ladder, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    run = call("generate", "--model", ladder, "--raw", "--max-new-tokens", 12, *arguments)
    assert run.stdout == _says(ladder, PROMPT)


def test_streaming_prints_the_same(call, ladder):
    options = ("generate", "--model", ladder, "--raw", "--max-new-tokens", 20, PROMPT)
    assert call(*options, "--no-stream").stdout == call(*options, "--stream").stdout != "\n"


def test_sampling_follows_the_seed(call, ladder):
    def sample(*options):
        run = call(
            "generate", "--model", ladder, "--raw", "--max-new-tokens", 20, "--temperature", 1.5,
            *options, PROMPT,
        )  # fmt: skip
        assert (run.code, run.stderr) == (0, "")
        return run.stdout

    assert sample("--seed", 1) == sample("--seed", 1)
    assert len({sample("--seed", seed) for seed in range(4)}) > 1
    greedy = _says(ladder, PROMPT, count=20)
    assert sample("--top-k", 1) == greedy
    assert sample("--top-p", 0.0001) == greedy
    assert sample("--min-p", 1.0) == greedy


def test_the_answer_ends_with_the_context(call, base):
    run = call("generate", "--model", base, "--raw", "--no-stream", "x" * 60)
    assert (run.code, run.stderr) == (0, "")


def test_stop_text(call, ladder):
    options = ("generate", "--model", ladder, "--raw", "--max-new-tokens", 30, PROMPT)
    whole = call(*options).stdout
    stop = next(letter for letter in whole[2:] if letter.isascii() and letter.isprintable())
    cut = call(*options, "--stop", stop).stdout.rstrip("\n")
    assert cut == whole[: whole.index(stop) + 1]


def test_a_base_that_has_moved(call, ladder, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    options = ("generate", "--model", ladder, "--raw", "--max-new-tokens", 12, PROMPT)
    assert call(*options, "--base", moved).stdout == call(*options).stdout
