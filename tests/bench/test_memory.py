"""The memory study: the same step for real and traced, and plots that anyone can read."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

import ladder_kernels as lk
from bench import memory
from ladder_kernels.models.shapes import config_of


@pytest.fixture
def config():
    config = config_of("SmolLM2-135M")
    config.num_hidden_layers = 2
    config.vocab_size = 1024
    return config


@pytest.mark.parametrize("untied", [False, True])
def test_for_real_and_traced(config, untied):
    config.tie_word_embeddings = not untied
    options: dict[str, Any] = {"context": 128, "answers": 4}
    ladder = lk.LadderConfig.lst(every=1, reduction=16)
    here = memory.measure(config, ladder, device="cpu", **options)
    there = memory.measure(config, ladder, **options)
    assert here.loss is not None
    assert here.loss == pytest.approx(torch.tensor(1024.0).log().item(), rel=0.5)
    assert here.anonymous is not None
    assert here.anonymous > here.peak.usage.total
    assert (there.loss, there.anonymous) == (None, None)
    for part in ("weights", "taps", "ladder"):
        assert getattr(here.largest, part) == getattr(there.largest, part)


def test_anonymous_memory_is_sampled():
    samples = memory.AnonymousMemory()
    big = torch.ones(100_000_000, dtype=torch.uint8)
    held = memory.process_bytes("RssAnon")
    assert held > big.nbytes
    with samples.sampled():
        # The first sample comes before anything else does.
        time.sleep(0.1)
    assert samples.most > 0.98 * held
    del big


def test_command_line(monkeypatch, capsys, tmp_path):
    arguments = ["SmolLM2-135M", "--context", "64", "--steps", "1", "--plot", str(tmp_path / "a")]
    monkeypatch.setattr(sys, "argv", ["bench.memory", *arguments])
    memory.main()
    said = capsys.readouterr().out
    assert "SmolLM2-135M, 1 x 64 tokens, step 1, traced for sm_86" in said
    for name in ("weights", "taps", "transients", "ladder", "optimizer", "peak"):
        assert f"\n{name}" in said
    assert {file.name for file in tmp_path.iterdir()} == {"a-light.png", "a-dark.png"}
