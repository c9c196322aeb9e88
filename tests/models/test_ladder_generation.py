"""Text from a ladder: with a cache as without, in batches with padding, by every usual strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.models.loading import backbone_from_transformers

pytestmark = pytest.mark.filterwarnings(
    "ignore::ladder_kernels.models.hooked_backbone.SlowerBackboneWarning"
)
CONFIGS = {
    "lst": LadderConfig.lst(reduction=4),
    "xladder": LadderConfig.xladder(connected=2, free=2, reduction=4, merge="gate"),
    "mlp": LadderConfig(rungs=((0, 1), (3,)), reduction=4, merge="channel", block="mlp"),
    "side": LadderConfig.lst(every=2, reduction=2, output="side"),
}
IDS = torch.randint(3, 128, (3, 7), generator=torch.Generator().manual_seed(4))
MASK = torch.ones(3, 7, dtype=torch.long)
MASK[1, :3] = 0
MASK[2, :6] = 0


def trained(backbone: Any, config: LadderConfig, **options: Any) -> LadderForCausalLM:
    """A model after a few noisy updates, so that its ladder matters."""
    model = LadderForCausalLM.from_backbone(backbone, config, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    generator = torch.Generator().manual_seed(9)
    for _ in range(4):
        ids = torch.randint(3, 128, (2, 16), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def model_of(make: Callable[..., Any]) -> Callable[..., LadderForCausalLM]:
    made: dict[Any, LadderForCausalLM] = {}

    def get(family: str, name: str, tap_dtype: str = "float32") -> LadderForCausalLM:
        key = family, name, tap_dtype
        if key not in made:
            base = backbone_from_transformers(make(family))
            made[key] = trained(base, CONFIGS[name], tap_dtype=tap_dtype)
        return made[key]

    return get


def greedy(model: LadderForCausalLM, count: int = 12, **options: Any) -> torch.Tensor:
    options = {"input_ids": IDS, "attention_mask": MASK, **options}
    return model.generate(**options, max_new_tokens=count, do_sample=False, eos_token_id=None)


CASES = [
    ("llama", "lst", "float32"),
    ("llama", "xladder", "float32"),
    ("llama", "xladder", "bfloat16"),
    ("llama", "mlp", "float32"),
    ("llama", "side", "float32"),
    ("qwen2", "xladder", "float32"),
    ("gpt2", "lst", "float32"),
    ("gemma2", "xladder", "float32"),
]


@pytest.mark.parametrize(("family", "name", "taps"), CASES)
def test_greedy_with_cache_equals_without(
    family: str, name: str, taps: str, model_of: Callable[..., LadderForCausalLM]
):
    model = model_of(family, name, taps)
    cached = greedy(model, use_cache=True)
    assert cached.shape == (3, 19)
    assert torch.equal(cached, greedy(model, use_cache=False))
    # Each row alone, without its padding, says the same.
    for row in range(3):
        alone = IDS[row : row + 1, MASK[row].bool()]
        text = greedy(model, input_ids=alone, attention_mask=torch.ones_like(alone))
        assert torch.equal(text[0, alone.shape[1] :], cached[row, 7:])


def test_the_ladder_matters(model_of: Callable[..., LadderForCausalLM]):
    model = model_of("llama", "lst")
    base = LadderForCausalLM.from_backbone(model.backbone, CONFIGS["lst"])
    assert not torch.equal(greedy(model), greedy(base))


@pytest.mark.parametrize("name", ["xladder", "mlp"])
def test_a_cache_continues(name: str, model_of: Callable[..., LadderForCausalLM]):
    model = model_of("llama", name)
    with torch.no_grad():
        whole = model(IDS, attention_mask=MASK).logits
        cache, parts = None, []
        for start, stop in ((0, 3), (3, 4), (4, 7)):
            out = model(
                IDS[:, start:stop],
                attention_mask=MASK[:, :stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            parts.append(out.logits)
    real = MASK.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-4, atol=1e-4)
    assert cache is not None
    assert cache.get_seq_length() == 7


def test_a_cache_may_grow_lazily(model_of: Callable[..., LadderForCausalLM]):
    model = model_of("llama", "xladder")
    cache = DynamicCache()
    out = model(IDS, past_key_values=cache, use_cache=True)
    assert out.past_key_values is cache
    assert len(cache) == model.config.num_hidden_layers == 3 + 4


def test_generate_continues_a_cache(model_of: Callable[..., LadderForCausalLM]):
    model = model_of("llama", "lst")
    ids = IDS[:1]
    first = model.generate(
        ids, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    more = model.generate(
        first.sequences,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
    )
    whole = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(more, whole)


def test_beams(model_of: Callable[..., LadderForCausalLM]):
    model = model_of("llama", "xladder")
    options = {"num_beams": 3, "num_return_sequences": 2}
    cached = greedy(model, **options, use_cache=True)
    assert cached.shape == (6, 19)
    assert torch.equal(cached, greedy(model, **options, use_cache=False))


def test_sampling(model_of: Callable[..., LadderForCausalLM]):
    model = model_of("llama", "lst")

    def sample() -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(
            IDS, attention_mask=MASK, max_new_tokens=8, do_sample=True, top_k=20, top_p=0.9,
            num_return_sequences=2, eos_token_id=None,
        )  # fmt: skip

    first = sample()
    assert first.shape == (6, 15)
    assert int(first.max()) < 128
    assert torch.equal(first, sample())
    assert not torch.equal(first[0], first[1])


def test_prompt_lookup_rolls_the_cache_back(model_of: Callable[..., LadderForCausalLM]):
    model = model_of("llama", "xladder")
    ids = IDS[:1].repeat(1, 3)
    plain = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    looked_up = model.generate(
        ids, max_new_tokens=10, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=3
    )
    assert torch.equal(looked_up, plain)


def test_generation_stops_at_the_end_of_text(model_of: Callable[..., LadderForCausalLM]):
    model = model_of("llama", "lst")
    end = int(greedy(model)[0, 9])
    out = model.generate(
        IDS[:1], max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    assert int(out[0, -1]) == end
    assert out.shape[1] <= 10
    assert model.generation_config.eos_token_id == 2
