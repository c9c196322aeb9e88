"""A ladder model without its ladder, and without its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import UnsupportedModelError
from ladder_kernels.models.loading import backbone_from_transformers

IDS = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(2, 10, dtype=torch.long)
LEFT[1, :3] = 0


def trained(backbone: Any, **options: Any) -> LadderForCausalLM:
    """A ladder that changes what the base says."""
    # Narrower taps would make a large difference of the smallest one: of a neighbour after rounding.
    model = LadderForCausalLM.from_backbone(
        backbone, LadderConfig(reduction=4, **options), tap_dtype="float32"
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "options", [{}, {"output": "side"}, {"kind": "xladder", "connected": 2, "free": 1}]
)
def test_a_disabled_ladder_leaves_the_base_by_bits(
    family: str, options: dict[str, Any], pair: Callable[[str], Any], logits: Callable[..., Any]
):
    base = pair(family)[0]
    model = trained(base, **options)
    with torch.no_grad():
        tuned = model(IDS, attention_mask=LEFT, labels=IDS, return_logits=True)
        with model.disable_ladder():
            plain = model(IDS, attention_mask=LEFT, labels=IDS, return_logits=True)
        again = model(IDS, attention_mask=LEFT, labels=IDS, return_logits=True)
    expected = logits(base, IDS, attention_mask=LEFT)
    assert torch.equal(plain.logits, expected)
    assert not torch.equal(tuned.logits, expected)
    assert torch.equal(tuned.logits, again.logits)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert plain.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert plain.loss.item() != tuned.loss.item()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_without_the_ladder_is_the_bases(beams: int, pair: Callable[[str], Any]):
    base, theirs = pair("llama")
    model = trained(base)
    options = {
        "attention_mask": LEFT, "max_new_tokens": 8, "do_sample": False, "num_beams": beams,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    tuned = model.generate(IDS, **options)
    with model.disable_ladder():
        plain = model.generate(IDS, **options)
    assert torch.equal(plain, theirs.generate(IDS, **options))
    assert not torch.equal(plain, tuned)


def test_disabling_ends_after_an_error_and_nests(pair: Callable[[str], Any]):
    model = trained(pair("llama")[0])
    with torch.no_grad():
        tuned = model(IDS).logits
        with model.disable_ladder():
            with model.disable_ladder():
                plain = model(IDS).logits
            assert torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, tuned)

        def fail() -> None:
            with model.disable_ladder():
                model(IDS, labels=IDS[:1])

        with pytest.raises(ValueError, match="labels"):
            fail()
        assert torch.equal(model(IDS).logits, tuned)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi"])
def test_states_and_head_give_the_logits(family: str, pair: Callable[[str], Any]):
    model = trained(pair(family)[0])
    with torch.no_grad():
        states = model.base_model(input_ids=IDS, attention_mask=LEFT).last_hidden_state
        found = model.get_output_embeddings()(states)
        cap = getattr(model.config, "final_logit_softcapping", None)
        found = found if cap is None else cap * torch.tanh(found / cap)
        expected = model(IDS, attention_mask=LEFT).logits
    assert (cap is not None) == (family == "gemma2")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_states_continue_a_cache(pair: Callable[[str], Any]):
    model = trained(pair("llama")[0])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model.base_model(input_ids=IDS[:, :6], past_key_values=cache)
        second = model.base_model(input_ids=IDS[:, 6:], past_key_values=first.past_key_values)
        whole = model.base_model(input_ids=IDS).last_hidden_state
    joined = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    assert (joined - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_head_shares_memory_or_is_dequantised(make: Callable[..., Any]):
    dense = trained(backbone_from_transformers(make("llama")))
    head = dense.backbone.head
    assert isinstance(head, torch.Tensor)
    assert dense.get_output_embeddings().weight.data_ptr() == head.data_ptr()
    assert not dense.get_output_embeddings().weight.requires_grad

    quantised = trained(backbone_from_transformers(make("llama"), quantize_head=True))
    with torch.no_grad():
        states = quantised.base_model(input_ids=IDS).last_hidden_state
        found = quantised.get_output_embeddings()(states)
        expected = quantised(IDS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(UnsupportedModelError, match="head"):
        quantised.set_output_embeddings(torch.nn.Linear(2, 2))
