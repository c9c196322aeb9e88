"""The frozen models of the study: one, quantised in different ways, and what was cut from it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from bench.quantization import float_backbone, topics
from ladder_kernels.demo import find_weights
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.training.data import load_tokenizer

if TYPE_CHECKING:
    from ladder_kernels.models.backbone import Backbone

__all__ = ["BASES", "CALIBRATED", "CUT", "load_base"]

CALIBRATED = Path("build/learning/calibrated")
"""Where the calibrated base is kept once it has been made, which takes some minutes."""

CUT = Path("build/learning/cut")
"""Where the cut model is kept, in float."""

_CALIBRATION_TOKENS = 16384
# In the middle, where layers can be missed most (arXiv:2403.17887 leaves out deep ones of models
# that are larger): without any four of these, the loss rises by 0.2 to 0.3 nats.
_LEFT_OUT = range(12, 20)
_DTYPE = torch.bfloat16


def _calibrated() -> Backbone:
    if not CALIBRATED.is_dir():
        tokenizer = load_tokenizer(find_weights())
        rows = topics(tokenizer, _CALIBRATION_TOKENS)
        load_backbone(find_weights(), calibration=rows).save_pretrained(CALIBRATED)
    return load_backbone(CALIBRATED, dtype=_DTYPE)


def _cut() -> Backbone:
    if not CUT.is_dir():
        whole = float_backbone()
        places: dict[int, int] = {}
        for layer in range(whole.num_layers):
            if layer not in _LEFT_OUT:
                places[layer] = len(places)
        beside = CUT.with_suffix(".new")
        config = copy.deepcopy(whole.config)
        config.num_hidden_layers, config.layer_types = len(places), None
        config.save_pretrained(beside)
        kept = {}
        for name, weight in whole.named_weights():
            layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
            if layer is None:
                kept[name] = weight
            elif int(layer[1]) in places:
                kept[f"model.layers.{places[int(layer[1])]}.{layer[2]}"] = weight
        save_file(kept, beside / "model.safetensors", metadata={"format": "pt"})
        beside.rename(CUT)
    return load_backbone(CUT, dtype=_DTYPE)


BASES: Mapping[str, Callable[[], Backbone]] = {
    "nearest": lambda: load_backbone(find_weights(), dtype=_DTYPE),
    "calibrated": _calibrated,
    "float": lambda: float_backbone(_DTYPE),
    "cut": _cut,
}
"""SmolLM2-135M-Instruct by name: in NF4, rounded to nearest or calibrated, and in float; and
without eight of its thirty layers, in NF4 rounded to nearest."""


def load_base(name: str) -> Backbone:
    """The base of that name; ``ValueError`` names those that there are."""
    if name not in BASES:
        raise ValueError(f"base {name!r}: there are {', '.join(BASES)}")
    return BASES[name]()
