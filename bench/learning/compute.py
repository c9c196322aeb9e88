"""How many floating-point operations a trial trains with: counted, not measured.

A frozen matrix multiplies each token once on the way up and, above the layer that a ladder
re-enters below, once more on the way back, for the gradient that passes through it; a trained one a
third time, for its own gradient. Two operations a number and product. The head does so for tokens
with a label. Attention between tokens, norms and the optimizer are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.learning.methods import method_of
from bench.learning.results import Result

__all__ = ["LAYERS", "operations"]

LAYERS: Mapping[str, int] = {"calibrated": 30, "cut": 22}
"""Layers of the bases that sizes are compared on."""

_D, _KEYS, _INNER, _VOCABULARY = 576, 192, 1536, 49152
_LAYER = 2 * _D * _D + 2 * _D * _KEYS + 3 * _D * _INNER
_HEAD = _D * _VOCABULARY
_LABELLED = 400 / 2048
"""Share of the tokens that the docstrings have labels for."""


def operations(result: Result) -> float:
    """Floating-point operations of a trial's training.

    Args:
        result: Of a trial on one of :data:`LAYERS`, on docstrings.
    """
    layers = LAYERS[result.trial.base]
    above = method_of(result.trial.method).config(layers, 0).reentry_layers(layers)
    frozen = (layers + above) * _LAYER + 2 * _LABELLED * _HEAD
    return 2.0 * result.tokens * (frozen + 3 * result.trained_parameters)
