"""Whole models on a GPU, where there is one, against the same models on the CPU in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config

import ladder_kernels as lk
from bench.random_weights import random_backbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LADDERS = {
    "every layer": lk.LadderConfig.lst(every=1, reduction=4),
    "MLP blocks": lk.LadderConfig.lst(every=2, reduction=4, block="mlp", merge="channel"),
    "recommended": lk.LadderConfig.recommended(),
    "adapters": lk.LadderConfig.adapters(2, 4),
}


def made(ladder, dtype, activations="exact"):
    """A model with random weights, made on the CPU: the same in every dtype."""
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    backbone = random_backbone(config, device="cpu", dtype=torch.float32)
    model = lk.LadderForCausalLM.from_backbone(backbone, LADDERS[ladder], activations=activations)
    # From the start, no gradient would reach what is below the output.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    backbone.to(dtype)
    return model.train()


def batch(kind, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(256, (2, 40), generator=generator)
    given = {"input_ids": ids, "labels": ids.clone()}
    if kind == "packed":
        given["position_ids"] = (torch.arange(40) % 17).expand(2, 40)
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        given |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: value.to(device) for name, value in given.items()}


def step(model, given):
    """The loss, and the gradients of all parameters in one row."""
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    grads = [p.grad.float().flatten() for p in model.parameters() if p.requires_grad]
    return loss.detach().float().cpu(), torch.cat(grads).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_losses_and_gradients(ladder, dtype, kind):
    exact_loss, exact = step(made(ladder, torch.float32), batch(kind))
    model = made(ladder, dtype).to("cuda")
    loss, grads = step(model, batch(kind, "cuda"))
    again, grads_again = step(model, batch(kind, "cuda"))
    assert torch.equal(loss, again)
    assert torch.equal(grads, grads_again)
    allowed = {torch.float32: 1e-5, torch.float16: 3e-4, torch.bfloat16: 1e-3}[dtype]
    assert (loss - exact_loss).abs() <= allowed * exact_loss
    assert (grads - exact).norm() <= 30 * allowed * exact.norm()


def test_activations_in_int8():
    loss, grads = step(made("every layer", torch.float32, "int8"), batch("plain"))
    model = made("every layer", torch.bfloat16, "int8").to("cuda")
    ours, ours_grads = step(model, batch("plain", "cuda"))
    assert (ours - loss).abs() <= 1e-3 * loss
    assert (ours_grads - grads).norm() <= 0.04 * grads.norm()


def test_recomputed_layers_give_the_same_bits():
    results = []
    for recompute in (False, True):
        model = made("recommended", torch.bfloat16).to("cuda")
        model.gradient_checkpointing = recompute
        results.append(step(model, batch("plain", "cuda")))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_generation_is_that_of_the_cpu():
    ids = batch("plain")["input_ids"][:, :7]
    texts = [
        made("every layer", torch.float32)
        .eval()
        .to(device)
        .generate(ids.to(device), max_new_tokens=12, do_sample=False)
        .cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*texts)
