"""Built-in shapes are those of the published models."""

from __future__ import annotations

import json

import pytest

from ladder_kernels.errors import CheckpointError, MissingFileError
from ladder_kernels.models.loading import backbone_from_config
from ladder_kernels.models.shapes import KNOWN, config_of

# As the models' pages count them, tied embeddings once.
PARAMETERS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Mistral-7B": 7_248_023_552,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


def test_all_are_known():
    assert KNOWN.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    assert backbone_from_config(config_of(name), device="meta").num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("meta-llama/Meta-Llama-3.1-70B", "Llama-3.1-70B"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("qwen3-8b", "Qwen3-8B"),
    ],
)
def test_names_as_the_hub_has_them(given, known):
    assert config_of(given).to_dict() == config_of(known).to_dict()


def test_any_other_model(tmp_path):
    values = {**KNOWN["SmolLM2-135M"], "num_hidden_layers": 7}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for given in (tmp_path, tmp_path / "config.json"):
        assert config_of(str(given)).num_hidden_layers == 7


def test_what_is_no_model(tmp_path):
    with pytest.raises(MissingFileError, match=r"found neither.*known are Llama-2-7B"):
        config_of("Qwen2.5-70B")
    for text in ("{", "[]", '{"model_type": "no such"}', "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="found no configuration"):
            config_of(str(tmp_path))
