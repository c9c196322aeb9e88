"""A side pass that keeps what enters each rung: the same gradients, in a bounded memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from ladder_kernels import LadderConfig, LadderForCausalLM, use_backend
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.frozen_pass import FrozenPass
from ladder_kernels.models.ladder import Ladder
from ladder_kernels.models.loading import backbone_from_transformers
from ladder_kernels.nn.attention import SequenceLayout

BATCH, LENGTH = 2, 24
IDS = torch.randint(3, 128, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))
MASK = torch.ones(BATCH, LENGTH, dtype=torch.long)
MASK[1, :5] = 0
PACKED = torch.cat((torch.arange(9), torch.arange(LENGTH - 9))).expand(BATCH, LENGTH)

CONFIGS = {
    "lst": LadderConfig.lst(every=1, reduction=4),
    "mlp": LadderConfig.lst(every=1, reduction=4, block="mlp", merge="gate"),
    "xladder": LadderConfig.xladder(connected=2, free=2, reduction=4, merge="channel"),
    "two_taps": LadderConfig(
        kind="explicit", rungs=((1,), (2, 3), ()), reduction=4, output="side", merge="gate"
    ),
    "interpolate": LadderConfig.lst(every=2, reduction=4, output="interpolate"),
}
configs = pytest.mark.parametrize("name", CONFIGS)


class Store(Mapping[int, torch.Tensor]):
    """Hands out a copy of a tap at each look-up, and notes which are still alive then."""

    def __init__(self, taps: Mapping[int, torch.Tensor]) -> None:
        self.taps = taps
        self.handed: list[weakref.ref[torch.Tensor]] = []
        self.order: list[int] = []
        self.most = 0

    def alive(self) -> int:
        return sum(tap() is not None for tap in self.handed)

    def __getitem__(self, layer: int) -> torch.Tensor:
        tap = self.taps[layer].clone()
        self.handed.append(weakref.ref(tap))
        self.order.append(layer)
        self.most = max(self.most, self.alive())
        return tap

    def __iter__(self) -> Iterator[int]:
        return iter(self.taps)

    def __len__(self) -> int:
        return len(self.taps)

    def __contains__(self, layer: object) -> bool:
        return layer in self.taps


@pytest.fixture(scope="module")
def backbone(make: Callable[..., Any]) -> Backbone:
    return backbone_from_transformers(make("llama"), dtype=torch.bfloat16)


def ignoring(live_floats: Any, *owners: Any) -> Any:
    """A count of live bytes in which views of what there is already are nothing new."""
    watch = live_floats()
    for owner in owners:
        tensors = owner.parameters() if isinstance(owner, torch.nn.Module) else owner.taps.values()
        watch.known.update(tensor.untyped_storage()._cdata for tensor in tensors)
        if isinstance(owner, FrozenPass):
            watch.known.add(owner.hidden.untyped_storage()._cdata)
    return watch


def ladder_for(config: LadderConfig, backbone: Backbone) -> Ladder:
    ladder = Ladder.for_backbone(config, backbone)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ladder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ladder


def frozen_for(backbone: Backbone, ladder: Ladder, layout: SequenceLayout) -> FrozenPass:
    return backbone.frozen_pass(
        IDS, layout=layout, tap_layers=ladder.tap_layers, tap_dtype=torch.bfloat16
    )


def layout_of(kind: str) -> SequenceLayout:
    positions = PACKED if kind == "packed" else None
    mask = MASK if kind == "left" else None
    return SequenceLayout.build(BATCH, LENGTH, attention_mask=mask, position_ids=positions)


@configs
@pytest.mark.parametrize("kind", ["plain", "left", "packed", "select"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_plain_pass(
    name: str, kind: str, autocast: bool, backbone: Backbone
):
    ladder, layout = ladder_for(CONFIGS[name], backbone), layout_of(kind)
    frozen = frozen_for(backbone, ladder, layout)
    select = MASK.nonzero(as_tuple=True) if kind == "select" else None
    found = []
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = ladder(frozen.taps, frozen.hidden, layout, select=select, recompute=recompute)
        along = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y.dtype)
        grads = torch.autograd.grad(y, list(ladder.parameters()), along)
        found.append([y.detach(), *grads])
    assert all(grad.abs().max() > 0 for grad in found[0])
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(plain, ours)


@configs
def test_a_rung_holds_its_own_taps_and_no_others(name: str, backbone: Backbone):
    ladder, layout = ladder_for(CONFIGS[name], backbone), layout_of("plain")
    frozen = frozen_for(backbone, ladder, layout)
    store = Store(frozen.taps)
    at_once = max(1, *(len(layers) for layers in ladder.rung_taps))
    upwards = [0, *(layer for layers in ladder.rung_taps for layer in layers)]
    y = ladder(store, frozen.hidden, layout, recompute=True)
    assert store.order == upwards
    assert store.alive() == 0
    assert store.most <= at_once
    store.order.clear()
    y.float().square().sum().backward()
    assert store.order == [
        *(layer for layers in reversed(ladder.rung_taps) for layer in layers),
        0,
    ]
    assert store.alive() == 0
    assert store.most <= at_once


@configs
def test_the_plain_pass_does_hold_them(name: str, backbone: Backbone):
    """So that the test above can fail."""
    ladder, layout = ladder_for(CONFIGS[name], backbone), layout_of("plain")
    frozen = frozen_for(backbone, ladder, layout)
    store = Store(frozen.taps)
    y = ladder(store, frozen.hidden, layout)
    assert store.alive() > max(1, *(len(layers) for layers in ladder.rung_taps))
    del y


@configs
@pytest.mark.parametrize("some", [False, True])
def test_what_is_kept_between_the_passes(
    name: str, some: bool, backbone: Backbone, live_floats: Any
):
    ladder, layout = ladder_for(CONFIGS[name], backbone), layout_of("plain")
    frozen = frozen_for(backbone, ladder, layout)
    tokens = BATCH * LENGTH
    select = (slice(None), slice(4, None)) if some else None
    selected = BATCH * (LENGTH - 4) if some else tokens
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    store = Store(frozen.taps)
    gc.collect()
    with (
        ignoring(live_floats, ladder, frozen) as watch,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        y = ladder(store, frozen.hidden, layout, select=select, recompute=True)
    # s_0 to s_{n-1} enter the rungs, s_n the output; the residual keeps a number a token besides.
    width = ladder.shape.width
    kept = 4 * (len(ladder.rung_taps) * tokens * width + selected * (width + 1))
    places = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in saved}
    assert sum(places.values()) <= kept
    assert backbone.hidden_size not in [tensor.shape[-1] for tensor in saved]
    # Nor does anything else hold more: s_n as a whole, y, and what a pass shares, the angles.
    saved.clear()
    angles = 2 * 4 * tokens * (ladder.shape.head_dim // 2)
    frozen_part = y.nbytes if CONFIGS[name].output == "interpolate" and some else 0
    assert watch.live <= kept + y.nbytes + angles + frozen_part + 4 * tokens * width


@pytest.mark.parametrize("block", ["transformer", "mlp"])
def test_the_inside_of_one_rung_exists_at_a_time(
    block: str, make: Callable[..., Any], live_floats: Any
):
    """A further rung costs the backward pass its input and its gradients, nothing else."""
    backbone = backbone_from_transformers(make("llama", num_hidden_layers=12))
    layout = SequenceLayout.build(BATCH, LENGTH)
    peaks, gradients = {}, {}
    for rungs in (4, 12):
        config = LadderConfig(
            kind="explicit",
            rungs=tuple((layer,) for layer in range(1, rungs + 1)),
            reduction=4,
            block=block,
        )
        ladder = ladder_for(config, backbone)
        frozen = frozen_for(backbone, ladder, layout)
        gradients[rungs] = 4 * sum(parameter.numel() for parameter in ladder.parameters())
        for recompute in (False, True):
            gc.collect()
            with ignoring(live_floats, ladder, frozen) as watch:
                y = ladder(Store(frozen.taps), frozen.hidden, layout, recompute=recompute)
                y.square().sum().backward()
            peaks[rungs, recompute] = watch.peak
            ladder.zero_grad()
    an_input = 4 * BATCH * LENGTH * 16
    growth = 8 * an_input + gradients[12] - gradients[4]
    assert peaks[12, True] - peaks[4, True] <= growth
    assert peaks[12, False] - peaks[4, False] > growth


def test_rungs_run_again_on_the_backend_of_the_forward_pass(backbone: Backbone):
    ladder, layout = ladder_for(CONFIGS["lst"], backbone), layout_of("plain")
    frozen = frozen_for(backbone, ladder, layout)
    found = []
    for recompute in (False, True):
        with use_backend("reference"):
            y = ladder(frozen.taps, frozen.hidden, layout, recompute=recompute)
        found.append(torch.autograd.grad(y.sum(), list(ladder.parameters())))
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing|is_gradient).*:FutureWarning")
@configs
def test_transformers_own_switch_turns_it_on(name: str, backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, CONFIGS[name]).train()
    wide: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] == (backbone.hidden_size,) and tensor.dim() > 1:
            wide.append(tensor.shape[0])
        return tensor

    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        wide.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(IDS, labels=IDS).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append(([loss.detach(), *grads], [*wide]))
    (plain, more), (ours, fewest) = found
    assert all(torch.equal(one, other) for one, other in zip(plain, ours, strict=True))
    # The state that the final norm saw and the loss's gradient behind it: no backward pass can do
    # without those two.
    assert fewest == [BATCH * (LENGTH - 1)] * 2
    assert len(more) > 2


def test_nothing_to_learn_has_gradients_of_zero(backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, CONFIGS["lst"]).train()
    model.gradient_checkpointing = True
    loss = model(IDS, labels=torch.full_like(IDS, -100)).loss
    loss.backward()
    assert loss == 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_model_that_is_not_training_recomputes_nothing(backbone: Backbone):
    model = LadderForCausalLM.from_backbone(backbone, CONFIGS["lst"]).eval()
    model.gradient_checkpointing = True
    model.requires_grad_(True)
    runs = []
    model.ladder.steps()[0].register_forward_hook(lambda *_: runs.append(1))
    model(IDS, labels=IDS).loss.backward()
    assert runs == [1]
    cached = model.train()(IDS, use_cache=True)
    assert runs == [1, 1]
    cached.logits.float().sum().backward()  # a cache must not be written to twice
    assert runs == [1, 1]
