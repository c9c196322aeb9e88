"""A frozen pass in slices of tokens: the same bits, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import ConfigError
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.frozen_pass import FrozenPass
from ladder_kernels.models.loading import SUPPORTED_NATIVE, backbone_from_transformers
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.linear import FrozenLinear
from ladder_kernels.nn.slices import SMALLEST_SLICE

LENGTH = 290
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def backbones(make: Callable[..., Any]) -> Callable[..., Backbone]:
    """A backbone of a family and dtype, made once."""
    made: dict[tuple[Any, ...], Backbone] = {}

    def get(family: str, dtype: torch.dtype, **sizes: int) -> Backbone:
        key = family, dtype, *sizes.items()
        if key not in made:
            made[key] = backbone_from_transformers(make(family, **sizes), dtype=dtype)
        return made[key]

    return get


def in_slices(
    backbone: Backbone, slice_tokens: int | None, tokens: torch.Tensor, **options: Any
) -> FrozenPass:
    backbone.slice_tokens = slice_tokens
    try:
        return backbone.frozen_pass(tokens, tap_layers=(0, 1, 3), **options)
    finally:
        backbone.slice_tokens = None


def assert_same(one: FrozenPass, other: FrozenPass) -> None:
    assert torch.isfinite(one.hidden).all()
    assert torch.equal(one.hidden, other.hidden)
    assert all(torch.equal(tap, other.taps[layer]) for layer, tap in one.taps.items())


def layout_of(kind: str, batch: int, length: int) -> SequenceLayout:
    mask = torch.ones(batch, length, dtype=torch.long)
    positions = None
    if kind == "left":
        mask[-1, : length // 3] = 0
    elif kind == "right":
        mask[0, length // 2 :] = 0
    elif kind == "interrupted":
        mask[0, length // 3 : length // 2] = 0
    elif kind == "packed":
        cut = length // 5 + 1
        row = torch.cat((torch.arange(cut), torch.arange(length - cut)))
        positions = row.expand(batch, length)
    return SequenceLayout.build(batch, length, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize("kind", ["plain", "left", "right", "interrupted", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", SUPPORTED_NATIVE)
def test_the_bits_do_not_change(family: str, dtype: torch.dtype, kind: str, backbones: Any):
    backbone = backbones(family, dtype)
    tokens = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    layout = layout_of(kind, 2, LENGTH)
    whole = in_slices(backbone, None, tokens, layout=layout)
    assert_same(in_slices(backbone, 150, tokens, layout=layout), whole)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([1, 2, 3, 5, 40, 200]),
    length=st.integers(1, 420),
    slice_tokens=st.integers(SMALLEST_SLICE, 300),
    dtype=st.sampled_from(DTYPES),
    activations=st.sampled_from(["exact", "int8"]),
)
def test_the_bits_do_not_change_with_shapes(
    batch: int,
    length: int,
    slice_tokens: int,
    dtype: torch.dtype,
    activations: str,
    backbones: Any,
):
    """Depths of several slices of the products, and batches of which one position is a slice."""
    backbone = backbones("qwen2", dtype, hidden_size=64, intermediate_size=1600)
    length = max(1, min(length, 900 // batch))
    tokens = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(2))
    options = {"layout": layout_of("plain", batch, length), "activations": activations}
    whole = in_slices(backbone, None, tokens, **options)
    assert_same(in_slices(backbone, slice_tokens, tokens, **options), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_bits_do_not_change_with_a_cache(family: str, dtype: torch.dtype, backbones: Any):
    backbone = backbones(family, dtype)
    tokens = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    found = []
    for slice_tokens in (None, 130):
        cache: Any = DynamicCache(config=backbone.config)
        passes, start = [], 0
        for stop in (200, 201, LENGTH):
            layout = SequenceLayout.build(2, stop - start, past_length=start)
            part = tokens[:, start:stop]
            passes.append(in_slices(backbone, slice_tokens, part, layout=layout, cache=cache))
            start = stop
        found.append((passes, [layer.keys for layer in cache.layers]))
    (whole, keys), (sliced, same_keys) = found
    for one, other in zip(sliced, whole, strict=True):
        assert_same(one, other)
    assert all(torch.equal(one, other) for one, other in zip(keys, same_keys, strict=True))


def test_a_block_with_layers_in_float_takes_all_tokens_at_once(backbones: Any, monkeypatch: Any):
    """Another number of rows could be summed in another order by PyTorch."""
    backbone = backbones("qwen2", torch.float32)
    tokens = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    rows: list[int] = []
    block = backbone.blocks[1]
    down = FrozenLinear(block.down.weight.dequantize(torch.float32))
    down.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    monkeypatch.setitem(block._modules, "down", down)
    in_slices(backbone, 150, tokens, layout=layout_of("plain", 1, LENGTH))
    assert rows == [LENGTH]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_only_the_stream_and_the_keys_grow_with_the_context(
    family: str, backbones: Any, live_floats: Any
):
    """The widest parts of a block are those of one slice, whatever the context."""
    sizes = {"hidden_size": 64, "intermediate_size": 1600}
    backbone = backbones(family, torch.float32, **sizes)
    heads, of_keys = backbone.config.num_attention_heads, backbone.config.num_key_value_heads
    head_dim = getattr(backbone.config, "head_dim", None) or 64 // heads
    peaks = {}
    for slice_tokens in (None, 128):
        for length in (512, 1024):
            tokens = torch.randint(3, 128, (1, length))
            layout = layout_of("plain", 1, length)
            # Beforehand: the native library loads, the layout finds who sees whom.
            in_slices(backbone, slice_tokens, tokens, layout=layout)
            with live_floats() as watch:
                in_slices(backbone, slice_tokens, tokens, layout=layout)
            peaks[slice_tokens, length] = watch.peak
    # Three taps and the last state are results; the stream, keys and values, and the angles of
    # positions are what the pass itself needs.
    a_token = 4 * (4 * 64 + 64 + 2 * of_keys * head_dim + 4 * head_dim)
    assert peaks[128, 1024] - peaks[128, 512] <= 512 * a_token
    assert peaks[None, 1024] - peaks[None, 512] >= 512 * 4 * 1600
    # Inside a block: the MLP's width, twice where a bias keeps it from being fused, and few more.
    assert peaks[128, 1024] <= 1024 * a_token + 128 * 4 * (1600 + 4 * 64 + 2 * heads * head_dim)


def test_a_model_learns_the_same_in_slices(backbones: Any):
    backbone = backbones("qwen2", torch.bfloat16)
    config = LadderConfig.lst(every=1, reduction=4, reentry=1, adapter_rank=4)
    tokens = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    found = []
    for slice_tokens in (None, 128):
        backbone.slice_tokens = slice_tokens
        model = LadderForCausalLM.from_backbone(backbone, config).train()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    backbone.slice_tokens = None
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("value", [127, 0, -1, 200.0, True, "128"])
def test_what_is_no_slice_is_refused(value: Any, backbones: Any):
    backbone = backbones("qwen2", torch.float32)
    with pytest.raises(ConfigError, match=r"slice_tokens: found .*128 or more, or None"):
        backbone.slice_tokens = value
    assert backbone.slice_tokens is None


def test_a_model_that_runs_on_transformers_has_no_slices(make: Any):
    backbone = backbone_from_transformers(make("gpt2"))
    with pytest.raises(ConfigError, match=r"slice_tokens: found 128, but 'gpt2' runs on transform"):
        backbone.slice_tokens = 128
    backbone.slice_tokens = None
