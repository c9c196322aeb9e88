"""The ways of fine-tuning that the study compares, by name.

Each is a :class:`~ladder_kernels.LadderConfig` and learning rates. QLoRA is the re-entry below all
layers with adapters on each (a test shows that loss and gradients are PEFT's), on this library's
kernels: that is faster than PEFT on bitsandbytes, so that equal wall time is the harder race.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ladder_kernels import LadderConfig

__all__ = ["METHODS", "Method", "method_of"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A ladder and how fast it learns.

    Attributes:
        config: Makes the configuration for a backbone of so many layers, and a seed.
        rate: Learning rate of the rungs, at its highest.
        adapter_rate: That of the adapters.
        tap_dtype: What taps are kept in.
    """

    config: Callable[[int, int], LadderConfig]
    rate: float = 3e-3
    adapter_rate: float = 1e-3
    tap_dtype: str = "bfloat16"


def _spaced(below: int, rungs: int) -> tuple[tuple[int, ...], ...]:
    """``rungs`` rungs of one tap each, evenly spaced from layer ``below`` down."""
    rungs = min(rungs, below)
    return tuple((round(below * (i + 1) / rungs),) for i in range(rungs))


def _ladder(
    share: float = 0.0, *, rank: int = 0, rungs: int = 6, width: int = 72, block: str = "mlp"
) -> Callable[[int, int], LadderConfig]:
    def config(layers: int, seed: int) -> LadderConfig:
        reentry = round(share * layers)
        return LadderConfig(
            rungs=_spaced(layers - reentry, rungs),
            width=width,
            block=block,
            reentry=reentry,
            adapter_rank=rank,
            seed=seed,
        )

    return config


def _adapters(share: float, *, rank: int = 16) -> Callable[[int, int], LadderConfig]:
    def config(layers: int, seed: int) -> LadderConfig:
        return LadderConfig.adapters(round(share * layers), rank, seed=seed)

    return config


def _lst(**options: object) -> Callable[[int, int], LadderConfig]:
    def config(layers: int, seed: int) -> LadderConfig:
        return LadderConfig.lst(seed=seed, **options)  # type: ignore[arg-type]

    return config


def _xladder(
    connected: int, free: int, width: int, share: float = 0.0
) -> Callable[[int, int], LadderConfig]:
    def config(layers: int, seed: int) -> LadderConfig:
        reentry = round(share * layers)
        return LadderConfig.xladder(connected, free, width=width, reentry=reentry, seed=seed)

    return config


METHODS: Mapping[str, Method] = {
    # Adapters on the top share of the layers, nothing else; on all of them: QLoRA.
    "qlora": Method(config=_adapters(1.0)),
    "qlora r4": Method(config=_adapters(1.0, rank=4)),
    "qlora r1": Method(config=_adapters(1.0, rank=1)),
    "qlora r64": Method(config=_adapters(1.0, rank=64)),
    "adapters 1/2": Method(config=_adapters(0.5), adapter_rate=2e-3),
    # Ladders that give back to h[L] only.
    "ladder": Method(config=_ladder(0.0, rungs=10)),
    "ladder, attention": Method(config=_lst(every=3, width=72)),
    "probe": Method(config=_ladder(0.0, rungs=1, width=144)),
    "ladder, int8 taps": Method(config=_ladder(0.0, rungs=10), tap_dtype="int8"),
    # Ladders that re-enter below the top share of the layers.
    "re-entry 1/4": Method(config=_ladder(0.25)),
    "re-entry 1/2": Method(config=_ladder(0.5)),
    "re-entry 1/2 + r16": Method(config=_ladder(0.5, rank=16), adapter_rate=2e-3),
    "re-entry 1/2 + r16, int8 taps": Method(
        config=_ladder(0.5, rank=16), adapter_rate=2e-3, tap_dtype="int8"
    ),
    "re-entry 3/4 + r16": Method(config=_ladder(0.75, rank=16), adapter_rate=2e-3),
    # Sizes of the same ladder, for the slopes.
    "re-entry 1/2 d18": Method(config=_ladder(0.5, width=18)),
    "re-entry 1/2 d36": Method(config=_ladder(0.5, width=36)),
    "re-entry 1/2 d144": Method(config=_ladder(0.5, width=144)),
    "re-entry 1/2 d288": Method(config=_ladder(0.5, width=288)),
    # Eight connected rungs against four connected and four free ones, of about equal size; then,
    # with the widths that make them equal (2.82 M and 2.81 M), below a re-entry.
    "lst of 8": Method(config=_lst(every=4, width=144)),
    "xladder 4+4": Method(config=_xladder(4, 4, 160)),
    "lst of 8, re-entry 1/2": Method(config=_ladder(0.5, rungs=8, width=144, block="transformer")),
    "xladder 4+4, re-entry 1/2": Method(config=_xladder(4, 4, 154, 0.5)),
}
"""Every method by the name that rows of results have."""


def method_of(name: str) -> Method:
    """The method of that name; ``ValueError`` names those that there are."""
    if name not in METHODS:
        raise ValueError(f"method {name!r}: there are {', '.join(METHODS)}")
    return METHODS[name]
