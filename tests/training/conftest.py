"""A tiny base model with a tokenizer of its own, and data for it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import ladder_kernels
from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.training.packing import pack_rows

CONTEXT = 32
TEXTS = [
    "a ladder climbs beside a frozen model",
    "the quick brown fox jumps over the lazy dog",
    "every rung taps the residual stream of a layer",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs, with an end-of-sequence and a padding token, and ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what ``datasets`` caches out of the user's home."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products on several threads only wait for each other, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of a tiny llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_model(base: Path) -> Callable[..., LadderForCausalLM]:
    def make(**options: Any) -> LadderForCausalLM:
        config = LadderConfig.lst(**{"reduction": 4, **options})
        return LadderForCausalLM.from_pretrained(base, ladder=config)

    return make


def make_documents(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents of any length, of which a part is learned, from none to nearly all of it."""
    draw = random.Random(seed)
    documents = []
    for _ in range(count):
        length = draw.randint(3, 40)
        ids = [draw.randint(3, 300) for _ in range(length)]
        learned = draw.randint(1, length - 1)
        documents.append({"input_ids": ids, "labels": [-100] * (length - learned) + ids[-learned:]})
    return documents


def train_plain(
    base: Path, rows: datasets.Dataset, output: Path, *, resume: str | None = None, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor], Trainer]:
    """Train with transformers' own Trainer, nothing of ours but model and rows.

    Gives the loss of each step, the trained weights, and the trainer.
    """
    options = {"max_steps": 6, "per_device_train_batch_size": 1, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=str(output),
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
        **options,
    )
    # Rounding of taps to bfloat16 would turn differences of rounding into larger ones.
    model = LadderForCausalLM.from_pretrained(
        base, ladder=LadderConfig.lst(reduction=4), tap_dtype="float32"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}, trainer


@pytest.fixture
def plain() -> Callable[..., Any]:
    return train_plain


@pytest.fixture
def packed() -> datasets.Dataset:
    """Rows of :data:`CONTEXT` tokens with unequal numbers of learned tokens."""
    documents = datasets.Dataset.from_list(make_documents(90))
    return pack_rows(documents, CONTEXT, pad_token_id=0)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as jsonl and give the file."""

    def to(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return to


class Worker:
    """``worker.py`` in processes of its own, with as many threads as there are here."""

    def __init__(self, spec: dict[str, Any], folder: Path, *, processes: int = 1) -> None:
        folder.mkdir()
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        self.errors = folder / "errors"
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}"]
        command += [str(Path(__file__).with_name("worker.py")), str(folder / "spec.json")]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(ladder_kernels.__file__).parents[1]),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def wait_for(self, line: str) -> None:
        """Wait until it prints a line."""
        assert self.process.stdout is not None
        assert any(found == f"{line}\n" for found in self.process.stdout), self.errors.read_text()

    def kill(self) -> None:
        """Kill -9."""
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        self.process.communicate(timeout=120)
        assert self.process.returncode == 0, self.errors.read_text()

    def close(self) -> None:
        """End it, should it still run; torchrun ends its own processes."""
        with self.process:
            self.process.terminate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def launch(spec: dict[str, Any], *, processes: int = 1) -> Worker:
        workers.append(Worker(spec, tmp_path / f"worker{len(workers)}", processes=processes))
        return workers[-1]

    yield launch
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def packed_base(base: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Folder of a tiny llama in NF4, which can be streamed."""
    folder = tmp_path_factory.mktemp("packed") / "base"
    load_backbone(base).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
