"""A tiny base model with a tokenizer of its own, and data for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.models.loading import backbone_from_transformers, load_backbone
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
def _own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep what ``datasets`` caches out of the user's home."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


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
