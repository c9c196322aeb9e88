"""How far products in whole numbers are from exact ones (``activations="int8"``).

    python -m bench.ops.int8_error

Of the layers of SmolLM2-135M on its own activations, of Python's documentation: relative to the
exact product with the same NF4 weight (Frobenius norm), beside the error of a scale for each whole
token, which a block's scale replaces; then the perplexity of the whole model.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench import rows as results
from ladder_kernels import ops
from ladder_kernels.demo import find_weights
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.linear import NF4Linear
from ladder_kernels.training.data import load_tokenizer

_DOCUMENTED = (
    "argparse",
    "collections",
    "decimal",
    "logging",
    "pathlib",
    "socketserver",
    "zipfile",
)
_CONTEXT = 1024
_FILE = "ops.csv"
_BENCH, _MODEL = "ops/nf4_linear_int8", "SmolLM2-135M-Instruct"
_METRIC = "relative error (least, median, most of the layers)"

Errors = dict[str, list[tuple[float, float]]]
"""By kind of layer: for each layer the errors of a block's scale and of a token's."""


@torch.no_grad()
def main() -> None:
    """Measure, print and write rows."""
    weights = find_weights()
    backbone = load_backbone(weights, dtype=torch.float32)
    tokenizer: Any = load_tokenizer(str(weights))
    ids = torch.tensor([tokenizer(documentation())["input_ids"][: _CONTEXT + 1]])
    layout = SequenceLayout.build(1, _CONTEXT)
    found: Errors = {}
    with watched(backbone, found):
        backbone.frozen_pass(ids[:, :-1], layout=layout)
    perplexities = {}
    for activations in ("exact", "int8"):
        hidden = backbone.frozen_pass(ids[:, :-1], layout=layout, activations=activations).hidden
        logits = backbone.logits(hidden)[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
        perplexities[f"activations {activations}"] = math.exp(loss)
    about = {"bench": _BENCH, "model": _MODEL, "dtype": "float32"}
    rows = results.perplexities(perplexities, shape=f"S={_CONTEXT}", **about)
    lines = []
    for kind, pairs in found.items():
        figures = spread(pairs)
        rows += results.figures_of(_METRIC, figures, shape=f"layers {kind} S={_CONTEXT}", **about)
        lines.append([kind, *(f"{100 * x:.2f} %" for triple in figures.values() for x in triple)])
    header = ["layer", "a block: least", "median", "most", "a token: least", "median", "most"]
    results.report(rows, _FILE, header, lines)
    print(" ".join(f"{name}: perplexity {value:.3f};" for name, value in perplexities.items()))


def documentation() -> str:
    """Text that the model was not tuned to."""
    modules = [importlib.import_module(name) for name in _DOCUMENTED]
    classes = [c for m in modules for c in vars(m).values() if inspect.isclass(c)]
    return "\n\n".join(inspect.getdoc(documented) or "" for documented in [*modules, *classes])


def spread(pairs: list[tuple[float, float]]) -> dict[str, tuple[float, float, float]]:
    """Least, median and most of the layers."""
    columns = zip(*(pairs), strict=True)
    ordered = dict(zip(("scale a block", "scale a token"), map(sorted, columns), strict=True))
    return {name: (each[0], each[len(each) // 2], each[-1]) for name, each in ordered.items()}


@contextmanager
def watched(backbone: Any, found: Errors) -> Iterator[None]:
    """While it lasts, note errors of each NF4 layer, by its kind."""
    layers = [
        (name.rpartition(".")[2], module)
        for name, module in backbone.named_modules()
        if isinstance(module, NF4Linear) and name != "nf4_head"
    ]
    blocks = [module for module in backbone.modules() if hasattr(module, "fused")]
    fused = [block.fused for block in blocks]
    for block in blocks:
        block.fused = False  # gate and up are layers of their own then
    handles = [module.register_forward_hook(_noting(kind, found)) for kind, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block, was in zip(blocks, fused, strict=True):
            block.fused = was


def _noting(kind: str, found: Errors) -> Callable[..., None]:
    def hook(layer: Any, inputs: Any, output: Any) -> None:
        x = inputs[0]
        exact = ops.nf4_linear(x, layer.weight)
        block = ops.nf4_linear_int8(x, layer.weight)
        largest = x.abs().amax(-1, keepdim=True)
        token = ops.nf4_linear((x * (127 / largest)).round() * (largest / 127), layer.weight)
        size = exact.norm()
        errors = [float((y - exact).norm() / size) for y in (block, token)]
        found.setdefault(kind, []).append((errors[0], errors[1]))

    return hook


if __name__ == "__main__":
    main()
