"""Options of a run: documented, checked, and the ladder's among them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import ladder_kernels
from ladder_kernels import LadderConfig
from ladder_kernels.errors import ConfigError
from ladder_kernels.training.options import DataOptions, TrainOptions

NEEDED: dict[str, Any] = {"model": "m", "output": "o", "data": "d"}


@pytest.mark.parametrize("kind", [TrainOptions, DataOptions])
def test_every_option_has_help(kind: type):
    for option in fields(kind):
        assert option.metadata["help"].strip(), option.name


def test_the_ladders_options_are_those_of_its_configuration():
    """None is missing, and what is not set means what it means there."""
    ours = {option.name: option for option in fields(TrainOptions)}
    for option in fields(LadderConfig):
        name = "output_kind" if option.name == "output" else option.name
        assert ours[name].default == option.default, name
        assert ours[name].type == option.type, name
    assert TrainOptions(**NEEDED, seed=4).ladder_config() == LadderConfig.recommended(seed=4)
    assert TrainOptions(**NEEDED, every=1).ladder_config() == LadderConfig.lst(every=1)
    options = TrainOptions(**NEEDED, kind="xladder", free=2, output_kind="side", seed=3)
    assert options.ladder_config() == LadderConfig(kind="xladder", free=2, output="side", seed=3)
    assert TrainOptions(**NEEDED, seed=3).changed_ladder_fields() == []
    assert options.changed_ladder_fields() == ["kind", "free", "output_kind"]


def test_data_options():
    options = TrainOptions(**NEEDED, split="a", limit=3, text_column="body", pack=False)
    expected = {"text_column": "body", "pack": False}
    assert options.data_options() == DataOptions(source="d", split="a", limit=3, **expected)
    assert options.eval_data_options() is None
    options = TrainOptions(**NEEDED, eval_data="e", eval_limit=4)
    assert options.eval_data_options() == DataOptions(source="e", split="validation", limit=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context: found 1; it must be a whole number, 2 or more"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"slice_tokens": 127}, "slice_tokens: found 127; it must be a whole number, 128 or more"),
        (
            {"free_gradients": True},
            "free_gradients: found True with max_grad_norm 1.0, but a norm needs all gradients at "
            "once; allowed is max_grad_norm 0",
        ),
        ({"max_steps": 2.5}, "max_steps: found 2.5"),
        ({"learning_rate": 0}, "learning_rate: found 0; it must be a number above 0"),
        ({"warmup": -0.1}, "warmup: found -0.1; it must be a number 0 or more"),
        ({"epochs": float("nan")}, "epochs: found nan"),
        ({"schedule": "zigzag"}, "schedule: found 'zigzag'; allowed are cosine, linear"),
        ({"report_to": "wandb"}, "report_to: found 'wandb'; allowed are none, tensorboard"),
        ({"format": "poem"}, "format: found 'poem'; allowed are auto"),
        ({"eval_steps": 3}, "eval_steps: found 3, but there is no eval_data"),
        ({"checkpoint": "c"}, "checkpoint: found 'c', but resume is off"),
        ({"tap_cache": "c"}, "tap_cache: found 'c', but taps is 'device', not 'disk'"),
        ({"tap_cache_bytes": 9, "taps": "host"}, "tap_cache_bytes: found 9, but taps is 'host'"),
        ({"tap_cache_bytes": 0, "taps": "disk"}, "tap_cache_bytes: found 0; it must be a whole"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        TrainOptions(**NEEDED, **options)
    assert str(caught.value).startswith(message)


def test_taps_on_disk_are_in_the_output_unless_another_folder_is_named():
    assert TrainOptions(**NEEDED).tap_cache_folder is None
    assert TrainOptions(**NEEDED, taps="disk").tap_cache_folder == Path("o/taps")
    assert TrainOptions(**NEEDED, taps="disk", tap_cache="c").tap_cache_folder == Path("c")


def test_options_are_there_without_anything_heavy():
    code = (
        "import sys, ladder_kernels.training.run, ladder_kernels.training.data;"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    root = Path(ladder_kernels.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
