"""A tiny model with a tokenizer, a ladder saved beside it, and two ways to run the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ladder_kernels as lk
from ladder_kernels.cli import main

CONTEXT = 64
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass
class Run:
    """What a run of the command line did."""

    code: int
    stdout: str
    stderr: str

    def assert_refused(self, *parts: str) -> None:
        """It ended in exit code 2, with one line that holds ``parts``, and nothing else."""
        assert self.code == 2, self
        assert self.stderr.startswith("error: "), self
        assert self.stderr.count("\n") == 1, self
        assert self.stderr.endswith("\n"), self
        assert self.stdout == "", self
        for part in parts:
            assert part in self.stderr, self


def make_base(folder: Path, *, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """A random llama of two layers with a tokenizer of bytes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "other", seed=1, template=None)


@pytest.fixture(scope="session")
def ladder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder on ``base`` that changes what it says."""
    model = lk.LadderForCausalLM.from_pretrained(base, ladder=lk.LadderConfig.lst(reduction=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("models") / "ladder"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts as jsonl."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": f"the number {n} is followed by the number {n + 1}."} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., Run]:
    """Run the command line in a process of its own, as a user does."""

    def run(*arguments: object, code: str | None = None, stdin: str = "", **env: str) -> Run:
        start = ["-m", "ladder_kernels"] if code is None else ["-c", code]
        done = subprocess.run(
            [sys.executable, *start, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(**env),
            timeout=120,
            check=False,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return run


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process that imports the package under test from anywhere."""
    root = str(Path(lk.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run the command line in this process, which is quicker."""

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.setattr(os, "environ", dict(os.environ, COLUMNS="100"))
            with pytest.raises(SystemExit) as exit_:
                main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file below a folder, with its bytes and time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(name="snapshot")
def _snapshot() -> Callable[[Path], dict[str, Any]]:
    return snapshot


@pytest.fixture(name="environment")
def _environment() -> Callable[..., dict[str, str]]:
    return environment
