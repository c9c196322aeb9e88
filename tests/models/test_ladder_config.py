"""The shape of a ladder: what resolves to what, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladder_kernels import LadderConfig
from ladder_kernels.errors import ConfigError
from ladder_kernels.models.config import LadderModelConfig, tap_dtype_of


@pytest.mark.parametrize(
    ("config", "layers", "rungs"),
    [
        (LadderConfig.lst(), 3, ((1,), (2,), (3,))),
        (LadderConfig.lst(every=2), 5, ((1,), (3,), (5,))),
        (LadderConfig.lst(every=3), 8, ((2,), (5,), (8,))),
        (LadderConfig.lst(every=4), 4, ((4,),)),
        (LadderConfig.xladder(connected=2, free=3), 5, ((4,), (5,), (), (), ())),
        (LadderConfig.xladder(connected=3, free=0), 3, ((1,), (2,), (3,))),
        (LadderConfig(rungs=((1,), (2, 3), ())), 3, ((1,), (2, 3), ())),
        (LadderConfig(rungs=[[0, 3], [], [1]]), 3, ((0, 3), (), (1,))),  # type: ignore[arg-type]
    ],
)
def test_resolve(config: LadderConfig, layers: int, rungs: tuple[tuple[int, ...], ...]):
    assert config.resolve(layers) == rungs


@given(every=st.integers(1, 12), layers=st.integers(1, 40))
def test_lst_is_evenly_spaced_and_ends_at_the_top(every: int, layers: int):
    if every > layers:
        with pytest.raises(ConfigError, match=rf"every: found {every}.*{layers} layers"):
            LadderConfig.lst(every=every).resolve(layers)
        return
    rungs = [layer for (layer,) in LadderConfig.lst(every=every).resolve(layers)]
    assert rungs[-1] == layers
    assert 1 <= rungs[0] <= every
    assert all(b - a == every for a, b in itertools.pairwise(rungs))


@given(connected=st.integers(1, 8), free=st.integers(0, 8), layers=st.integers(1, 12))
def test_xladder_taps_the_top(connected: int, free: int, layers: int):
    config = LadderConfig.xladder(connected=connected, free=free)
    if connected > layers:
        with pytest.raises(ConfigError, match="connected"):
            config.resolve(layers)
        return
    rungs = config.resolve(layers)
    assert [rung for rung in rungs if rung] == [
        (layer,) for layer in range(layers - connected + 1, layers + 1)
    ]
    assert rungs[connected:] == ((),) * free


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "tree"}, "kind: found 'tree'; allowed are 'auto', 'lst', 'xladder', 'explicit'"),
    ({"every": 0}, "every: found 0; it must be a whole number, 1 or more"),
    ({"every": 1.5}, "every: found 1.5"),
    ({"every": True}, "every: found True"),
    ({"kind": "xladder", "connected": 0}, "connected: found 0"),
    ({"kind": "xladder", "free": -1}, "free: found -1"),
    ({"kind": "xladder", "every": 2}, "every: found 2; only a ladder of kind 'lst' has it"),
    ({"kind": "lst", "free": 2}, "free: found 2; only a ladder of kind 'xladder' has it"),
    ({"kind": "lst", "rungs": [[1]]}, "rungs: .*only a ladder of kind 'explicit' has it"),
    ({"kind": "explicit"}, "rungs: found None; it must be a list of rungs"),
    ({"rungs": []}, r"rungs: found \[\]"),
    ({"rungs": [[], []]}, "at least one rung must tap a layer"),
    ({"rungs": [1, 2]}, r"rungs\[0\]: found 1"),
    ({"rungs": "12"}, "rungs: found '12'"),
    ({"rungs": [["1"]]}, r"rungs\[0\]: found '1'"),
    ({"rungs": [[1], [-1]]}, r"rungs\[1\]: found -1"),
    ({"rungs": [[2, 2]]}, "at most once"),
    ({"reduction": 0}, "reduction: found 0"),
    ({"width": 0}, "width: found 0"),
    ({"tap": "keys"}, "tap: found 'keys'; allowed are 'residual'"),
    ({"merge": "add"}, "merge: found 'add'; allowed are 'sum', 'gate', 'channel'"),
    ({"output": "top"}, "output: found 'top'; allowed are 'residual', 'interpolate', 'side'"),
    ({"block": "rnn"}, "block: found 'rnn'; allowed are 'transformer', 'mlp'"),
    ({"init": "zero"}, "init: found 'zero'; allowed are 'orthogonal', 'xavier', 'he', 'pruned'"),
    ({"temperature": 0}, "temperature: found 0; it must be a number above 0"),
    ({"temperature": float("nan")}, "temperature: found nan"),
    ({"eps": -1e-6}, "eps: found"),
    ({"mlp_ratio": 0.0}, "mlp_ratio: found 0.0"),
    ({"head_dim": 3}, "head_dim: found 3; it must be even"),
    ({"head_dim": 0}, "head_dim: found 0"),
    ({"seed": -1}, "seed: found -1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_options(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        LadderConfig(**options)
    assert "\n" not in str(caught.value)


def test_a_tap_above_the_backbone_is_refused():
    config = LadderConfig(rungs=((1,), (2, 9)))
    with pytest.raises(
        ConfigError, match=r"rungs\[1\]: found 9; the taps that it can have are 0 to 3"
    ):
        config.resolve(3)


def test_unknown_field_names_the_allowed_ones():
    with pytest.raises(ConfigError, match=r"unknown 'gates'; allowed are kind, every.*seed"):
        LadderConfig.from_dict({"gates": 3})


@pytest.mark.parametrize(
    ("options", "width", "shape"),
    [
        ({"reduction": 16}, 576, (36, 36, 96)),
        ({"reduction": 16}, 3584, (224, 56, 597)),
        ({"reduction": 16}, 4096, (256, 64, 683)),
        ({"width": 48, "reduction": 5}, 576, (48, 48, 128)),
        ({"reduction": 8, "head_dim": 24}, 576, (72, 24, 192)),
        ({"reduction": 16, "mlp_ratio": 1.0}, 576, (36, 36, 36)),
        ({"reduction": 64, "block": "mlp"}, 576, (9, 0, 24)),
    ],
)
def test_side_shape(options: dict[str, Any], width: int, shape: tuple[int, int, int]):
    side = LadderConfig(**options).side_shape(width, width * 8 // 3)
    assert (side.width, side.head_dim, side.mlp_width) == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 7}, "reduction: found 7; it must divide the backbone's width 576.*6 and 8"),
        ({"reduction": 1000}, "the nearest that do are 576$"),
        ({"reduction": 64}, "reduction: found 64; it makes the ladder 9 wide.*even"),
        ({"width": 33}, "width: found 33; it makes the ladder 33 wide"),
        ({"head_dim": 10}, "head_dim: found 10; it must divide the ladder's width 36"),
    ],
)
def test_refused_shapes(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        LadderConfig(**options).side_shape(576, 1536)


def test_pruned_heads_are_no_larger_than_the_backbones():
    config = LadderConfig.lst(reduction=4, init="pruned")
    assert config.side_shape(512, 1024, 16).head_dim == 16
    assert config.side_shape(512, 1024).head_dim == 64


CONFIGS = [
    LadderConfig.lst(),
    LadderConfig.lst(every=3, merge="gate", temperature=0.5, seed=7),
    LadderConfig.xladder(connected=2, free=5, output="interpolate", width=64),
    LadderConfig(rungs=((1,), (2, 3), ()), block="mlp", mlp_ratio=2.0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_dict_round_trip(config: LadderConfig):
    assert LadderConfig.from_dict(config.to_dict()) == config
    assert dataclasses.replace(config) == config


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LadderConfig.lst().every = 2  # type: ignore[misc]


def test_every_field_is_described():
    for option in dataclasses.fields(LadderConfig):
        assert len(option.metadata["help"]) > 10, option.name


@pytest.mark.parametrize("config", CONFIGS)
def test_model_configuration_round_trip(config: LadderConfig):
    model = LadderModelConfig(
        ladder=config, base_name_or_path="some/base", base_fingerprint="f" * 64, vocab_size=99
    )
    again = LadderModelConfig.from_dict(model.to_dict())
    assert again.ladder_config == config
    assert (again.base_name_or_path, again.base_fingerprint) == ("some/base", "f" * 64)
    assert again.vocab_size == 99
    assert again.to_dict() == model.to_dict()


def test_tap_dtypes():
    import torch

    assert tap_dtype_of("float16") is torch.float16
    assert tap_dtype_of(torch.bfloat16) is torch.bfloat16
    assert tap_dtype_of("int8") is torch.int8
    with pytest.raises(ConfigError, match=r"'int4'; .* 'bfloat16', 'float16', 'float32', 'int8'"):
        tap_dtype_of("int4")


@pytest.mark.parametrize("reenters", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6, 30])
def test_the_recommended_ladder_fits_any_depth(layers, reenters):
    config = LadderConfig.recommended(seed=2)
    settled = config.settled(layers, reenters=reenters)
    assert settled.settled(layers) is settled
    assert (settled.seed, settled.reduction, settled.block) == (2, 8, "mlp")
    reentry = settled.reentry_layers(layers)
    assert reentry == (round(layers / 2) if reenters and layers > 1 else 0)
    assert bool(settled.adapter_rank) == bool(reentry)
    rungs = settled.resolve(layers)
    assert rungs[-1] == (layers - reentry,)
    if reenters:
        assert config.resolve(layers) == rungs
