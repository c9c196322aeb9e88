"""The frozen models of the study: the same weights, quantised in different ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.quantization import float_backbone, topics
from ladder_kernels.demo import find_weights
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.training.data import load_tokenizer

if TYPE_CHECKING:
    from ladder_kernels.models.backbone import Backbone

__all__ = ["BASES", "CALIBRATED", "load_base"]

CALIBRATED = Path("build/learning/calibrated")
"""Where the calibrated base is kept once it has been made, which takes some minutes."""

_CALIBRATION_TOKENS = 16384
_DTYPE = torch.bfloat16


def _calibrated() -> Backbone:
    if not CALIBRATED.is_dir():
        tokenizer = load_tokenizer(find_weights())
        rows = topics(tokenizer, _CALIBRATION_TOKENS)
        load_backbone(find_weights(), calibration=rows).save_pretrained(CALIBRATED)
    return load_backbone(CALIBRATED, dtype=_DTYPE)


BASES: Mapping[str, Callable[[], Backbone]] = {
    "nearest": lambda: load_backbone(find_weights(), dtype=_DTYPE),
    "calibrated": _calibrated,
    "float": lambda: float_backbone(_DTYPE),
}
"""SmolLM2-135M-Instruct by name: in NF4, rounded to nearest or calibrated, and in float."""


def load_base(name: str) -> Backbone:
    """The base of that name; ``ValueError`` names those that there are."""
    if name not in BASES:
        raise ValueError(f"base {name!r}: there are {', '.join(BASES)}")
    return BASES[name]()
