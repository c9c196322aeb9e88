"""Whole models on a GPU, where there is one.

Against the same models on the CPU in float32; and with all that saves memory against the plain
model, by bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2Config

import ladder_kernels as lk
from bench.random_weights import random_backbone
from ladder_kernels.memory.taps_host import HostTaps, _Copies
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.training.freeing import GradientFreeing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LADDERS = {
    "every layer": lk.LadderConfig.lst(every=1, reduction=4),
    "MLP blocks": lk.LadderConfig.lst(every=2, reduction=4, block="mlp", merge="channel"),
    "recommended": lk.LadderConfig.recommended(),
    "adapters": lk.LadderConfig.adapters(2, 4),
}


def base():
    """A backbone in float32, on the CPU."""
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return random_backbone(config, dtype=torch.float32)


def made(ladder, dtype, activations="exact") -> Any:
    """A model with random weights, made on the CPU: the same in every dtype."""
    backbone = base()
    model = beside(backbone, ladder, activations=activations)
    backbone.to(dtype)
    return model


def beside(backbone, ladder, **options) -> Any:
    """A model in training mode."""
    model = lk.LadderForCausalLM.from_backbone(backbone, LADDERS[ladder], **options)
    # From the start, no gradient would reach what is below the output.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(
            parameter.device
        )
    return model.train()


def batch(kind, device="cpu", size=(2, 40)):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(256, size, generator=generator)
    given = {"input_ids": ids, "labels": ids.clone()}
    if kind == "packed":
        given["position_ids"] = (torch.arange(size[1]) % 17).expand(size)
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


# What saves memory ------------------------------------------------------------------------------

WEIGHTS = {"weights", "embeddings"}
SAVING = {
    "weights on the host": {"weights": "host"},
    "weights in a file": {"weights": "streamed", "embeddings": "device"},
    "embeddings on the host": {"embeddings": "host"},
    "taps on the host": {"taps": "host"},
    "taps on disk": {"taps": "disk"},
    "recomputed": {"recompute": True},
    "recomputed, taps on the host": {"taps": "host", "recompute": True},
    "recomputed, taps on disk": {"taps": "disk", "recompute": True},
    "all on the host": {
        "weights": "host", "embeddings": "host", "taps": "host", "recompute": True
    },
    "all in files": {"weights": "streamed", "taps": "disk", "recompute": True},
}  # fmt: skip
# Longer than the host takes for a layer, so that nothing is in time by luck: 5 ms and 3 ms.
SLEEP = {"the computation": 10_000_000, "copies": 6_000_000}


class SlowStream(torch.cuda.Stream):
    """A stream for copies that sleeps after whatever it waits for."""

    def wait_event(self, event):
        super().wait_event(event)
        with torch.cuda.stream(self):
            torch.cuda._sleep(SLEEP["copies"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base in an NF4 file."""
    place = tmp_path_factory.mktemp("base") / "base"
    base().to(torch.bfloat16).save_pretrained(place)
    return place


def placed(folder, ladder, cache, *, late="", recompute=False, taps="device", **options):
    """A model whose layers or whose copies are slow, if those are late."""
    chosen = {name: options.pop(name) for name in WEIGHTS & options.keys()}
    backbone: Any = load_backbone(folder, device="cuda", dtype=torch.bfloat16, **chosen)
    store: Any = HostTaps() if taps == "host" else taps
    model = beside(
        backbone, ladder, taps=store, tap_cache=cache if taps == "disk" else None, **options
    )
    model.gradient_checkpointing = recompute
    if late == "the computation":
        for block in backbone.blocks:
            block.q.register_forward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP[late]))
    if late == "copies":
        if backbone.streams:
            backbone._stream._side = SlowStream(backbone.device)
        if taps == "host":
            store._copies[backbone.device] = copies = _Copies(backbone.device)
            copies._stream = SlowStream(backbone.device)
    return model


def trained(model, batches, *, prefill=False):
    """Losses and gradients of several steps; the GPU is not waited for before the last."""
    seen = []
    parameters = [each for each in model.parameters() if each.requires_grad]
    if prefill:
        model.prefill(batches)
    for given in batches:
        loss = model(**given).loss
        grads = torch.autograd.grad(loss, parameters)
        seen.append([loss.detach(), *(grad.clone() for grad in grads)])
        with torch.no_grad():
            # A prefilled pass does not depend on what is trained.
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= 0.1 * grad
    return seen


def assert_same_bits(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        for mine, plain in zip(one, other, strict=True):
            assert torch.isfinite(plain).all()
            assert torch.equal(mine, plain)


@pytest.fixture(scope="module")
def batches():
    """Some batches, twice in a row."""
    return [batch(kind, "cuda") for kind in ("plain", "packed", "padded")] * 2


@pytest.fixture(scope="module")
def plain(folder, batches):
    """What the plain model with a ladder gives."""
    known = {}

    def get(ladder, **options):
        key = (ladder, *sorted(options.items()))
        if key not in known:
            known[key] = trained(placed(folder, ladder, None, **options), batches)
        return known[key]

    return get


@pytest.mark.parametrize("late", SLEEP)
@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("ladder", ["every layer", "MLP blocks", "recommended"])
def test_what_saves_memory_gives_the_same_bits(
    folder, batches, plain, tmp_path, ladder, saving, late
):
    model = placed(folder, ladder, tmp_path, late=late, **SAVING[saving])
    assert_same_bits(trained(model, batches), plain(ladder))
    model.backbone.close()


@pytest.mark.parametrize("late", SLEEP)
@pytest.mark.parametrize("saving", ["weights on the host", "all on the host", "all in files"])
def test_frozen_passes_of_several_batches_together(folder, batches, plain, tmp_path, saving, late):
    model = placed(folder, "every layer", tmp_path, late=late, **SAVING[saving])
    found = trained(model, batches[:3], prefill=True)
    found += trained(model, batches[3:], prefill=True)
    assert_same_bits(found, plain("every layer"))


@pytest.mark.parametrize("late", SLEEP)
@pytest.mark.parametrize("taps", ["host", "disk"])
def test_taps_in_int8_are_the_same_wherever_they_wait(folder, batches, plain, tmp_path, taps, late):
    options = {"late": late, "taps": taps, "recompute": True, "tap_dtype": "int8"}
    model = placed(folder, "every layer", tmp_path, **options)
    assert_same_bits(trained(model, batches), plain("every layer", tap_dtype="int8"))


@pytest.mark.parametrize("saving", ["recomputed", "all on the host", "all in files"])
def test_slices_of_tokens(folder, tmp_path, saving):
    """Fewer rows may take another kernel, whose sums are in another order: not the same bits."""
    size = (1, 300)
    exact_loss, exact = step(made("every layer", torch.float32), batch("plain", size=size))
    given = batch("plain", "cuda", size)
    results = []
    for options in ({}, SAVING[saving], SAVING[saving]):
        model = placed(folder, "every layer", tmp_path, **options)
        model.backbone.slice_tokens = 128
        results.append(step(model, given))
    for loss, grads in results:
        assert (loss - exact_loss).abs() <= 1e-3 * exact_loss
        assert (grads - exact).norm() <= 0.03 * exact.norm()
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grads, results[0][1])


@pytest.mark.parametrize("bits", [32, 8])
def test_gradients_that_are_freed_as_they_are_applied(folder, batches, bits):
    weights = []
    for freed in (False, True):
        model = placed(folder, "every layer", None)
        parameters = [each for each in model.parameters() if each.requires_grad]
        if bits == 8:
            kind = pytest.importorskip("bitsandbytes").optim.AdamW8bit
            optimizer = kind(parameters, lr=1e-3, min_8bit_size=256)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        if freed:
            GradientFreeing(optimizer, lambda: True)
        for given in batches:
            model(**given).loss.backward()
            assert freed == all(each.grad is None for each in parameters)
            optimizer.step()
            optimizer.zero_grad()
        weights.append([each.detach().clone() for each in parameters])
    assert_same_bits(weights[1:], weights[:1])
