"""What NF4 costs SmolLM2-135M in perplexity: rounded to nearest, and calibrated.

    python -m bench.quantization                             half an hour on one CPU core
    python -m bench.quantization --rows 2 --tokens 4096      a quick look

The calibration text is the documentation of the language that Python brings along
(``pydoc_data.topics``). Measured is text of other kinds, none of which is calibrated with: source
code of modules of the standard library, licences, and the answers of chats in which functions of
such modules are documented (:mod:`ladder_kernels.docstrings`); the rest of a chat is mostly the
same few words over and over. What is measured of NF4 was saved as a checkpoint for bitsandbytes and
loaded again.

"in 8 bits" takes some kinds of layer out of NF4 and rounds them to 8 bits a weight, with a scale a
row: what is won by spending more instead.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch

from bench import rows as results
from ladder_kernels.demo import find_weights
from ladder_kernels.docstrings import collect_docstrings, standard_library
from ladder_kernels.models.architecture import Architecture
from ladder_kernels.models.backbone import Backbone, Quantization
from ladder_kernels.models.gguf_source import GGUFSource
from ladder_kernels.models.loading import load_backbone
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.models.weights import WeightReader
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.linear import FrozenLinear
from ladder_kernels.ops import linear_cross_entropy
from ladder_kernels.training.data import calibration_rows, load_tokenizer
from ladder_kernels.training.formats import IGNORE, encode_rows

_CONTEXT = 1024
_LICENCES = Path("/usr/share/common-licenses")  # of Debian and its kin


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate with")
    parser.add_argument("--rows", type=int, default=10, help=f"of {_CONTEXT} tokens, of each text")
    options = parser.parse_args()
    tokenizer = load_tokenizer(find_weights())
    texts = {
        name: _spread(ids, counted, options.rows)
        for name, (ids, counted) in _texts(tokenizer).items()
    }
    measured: dict[str, dict[str, float]] = {}
    sizes: dict[str, int] = {}
    for name, make in _candidates(tokenizer, options.tokens).items():
        backbone = make()
        sizes[name] = _layer_bytes(backbone)
        measured[name] = {text: _perplexity(backbone, rows) for text, rows in texts.items()}
        print(name, {text: round(found, 3) for text, found in measured[name].items()}, flush=True)
    _report(measured, sizes, texts)


def _texts(tokenizer: Any) -> dict[str, tuple[list[int], list[bool]]]:
    """What is measured, by name: token ids, and whether their loss counts."""
    held_out = [example for example in collect_docstrings() if example.held_out]
    modules = dict.fromkeys(example.module for example in held_out)
    sources = [(standard_library() / name).read_text(encoding="utf-8") for name in modules]
    licences = [standard_library() / "LICENSE.txt"]
    if _LICENCES.is_dir():
        licences += sorted(path for path in _LICENCES.iterdir() if not path.is_symlink())
    written = {
        "source code": "\n\n".join(sources),
        "licences": "\n\n".join(path.read_text(encoding="utf-8") for path in licences),
    }
    texts = {
        name: tokenizer(text, add_special_tokens=False)["input_ids"]
        for name, text in written.items()
    }
    chats = datasets.Dataset.from_list([{"messages": each.messages()} for each in held_out])
    encoded = encode_rows(chats, tokenizer)
    answers = [label != IGNORE for labels in encoded["labels"] for label in labels]
    return {
        **{name: (ids, [True] * len(ids)) for name, ids in texts.items()},
        "answers in chats": ([token for ids in encoded["input_ids"] for token in ids], answers),
    }


def _spread(
    ids: list[int], counted: list[bool], count: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of :data:`_CONTEXT` tokens, evenly spread over a text, and what is predicted in them."""
    starts = range(0, len(ids) - _CONTEXT + 1, _CONTEXT)
    count = min(count, len(starts))
    chosen = [starts[index * len(starts) // count] for index in range(count)]
    row = torch.tensor(ids)
    labels = torch.where(torch.tensor(counted), row, IGNORE)
    parts = [slice(start, start + _CONTEXT) for start in chosen]
    return [(row[part], labels[part]) for part in parts]


def topics(tokenizer: Any, tokens: int) -> Any:
    """Rows of the language's documentation, the calibration text of the benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "topics.txt"
        path.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
        return calibration_rows([path], tokenizer, tokens=tokens, context=_CONTEXT)


def _candidates(tokenizer: Any, tokens: int) -> Mapping[str, Callable[[], Backbone]]:
    """How each candidate is made, by name; the first two are what others are compared with."""
    rows = topics(tokenizer, tokens)

    def saved(**options: Any) -> Backbone:
        with tempfile.TemporaryDirectory() as place:
            load_backbone(find_weights(), **options).save_pretrained(Path(place) / "base")
            return load_backbone(Path(place) / "base")

    return {
        "float32": float_backbone,
        "NF4 to nearest": saved,
        "NF4 calibrated": lambda: saved(calibration=rows),
        "NF4 to nearest, blocksize 32": lambda: saved(blocksize=32),
        "NF4 calibrated, blocksize 32": lambda: saved(blocksize=32, calibration=rows),
        "NF4 to nearest, k and v in 8 bits": lambda: _in_8_bits(saved(), "k", "v"),
        "NF4 to nearest, down in 8 bits": lambda: _in_8_bits(saved(), "down"),
    }


class _Unquantised(GGUFSource):
    prequantized = True  # as if its float layers were meant to stay so


def float_backbone(dtype: torch.dtype = torch.float32) -> Backbone:
    """SmolLM2-135M with its linear layers in float."""
    source, settings = _Unquantised(find_weights()), Quantization()
    architecture = Architecture.of(source.config)
    reader = WeightReader(
        source,
        shapes=architecture.shapes(tied=True),
        quantization=settings,
        dtype=dtype,
        device=torch.device("cpu"),
        tied=("lm_head.weight",),
    )
    return NativeBackbone(source.config, architecture, reader, quantization=settings)


def _in_8_bits(backbone: Backbone, *roles: str) -> Backbone:
    """Put float layers, rounded to 8 bits with a scale a row, in the place of NF4 ones."""
    exact: Any = float_backbone()
    changed: Any = backbone
    for block, twin in zip(changed.blocks, exact.blocks, strict=True):
        for role in roles:
            weight = getattr(twin, role).weight
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            setattr(block, role, FrozenLinear((weight / scale).round() * scale))
    return backbone


def _layer_bytes(backbone: Backbone) -> int:
    """Bytes of all linear layers; those of 8 bits as such, though the bench holds them in float."""
    total = 0
    of_nf4 = backbone.nf4_bytes() > 0
    for name, weight in backbone.named_weights():
        if isinstance(weight, NF4Weight):
            total += weight.nbytes
        elif name.startswith("model.layers.") and weight.dim() == 2:
            total += weight.numel() + 4 * weight.shape[0] if of_nf4 else weight.nbytes
    return total


@torch.inference_mode()
def _perplexity(backbone: Backbone, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    total = 0.0
    for row, labels in rows:
        layout = SequenceLayout.build(1, len(row))
        states = backbone.final_norm(backbone.frozen_pass(row[None], layout=layout).hidden)
        loss = linear_cross_entropy(states[0, :-1], backbone.head, labels[1:], reduction="sum")
        total += float(loss)
    return math.exp(total / _predicted(rows))


def _predicted(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """The number of tokens whose loss counts."""
    return sum(int((labels[1:] != IGNORE).sum()) for _, labels in rows)


def _report(
    measured: dict[str, dict[str, float]], sizes: dict[str, int], texts: dict[str, Any]
) -> None:
    about = {"bench": "quantization", "model": "SmolLM2-135M-Instruct", "dtype": "float32"}
    found = results.bytes_of(sizes, **about, shape="linear layers")
    for text, rows in texts.items():
        shape = f"{text}, {_predicted(rows)} tokens in {len(rows)} rows"
        by_candidate = {name: figures[text] for name, figures in measured.items()}
        found += results.perplexities(by_candidate, **about, shape=shape)
    exact, nearest = (measured[name] for name in list(measured)[:2])
    lines = []
    for name, figures in measured.items():
        line = [name, f"{sizes[name] / 1e6:.1f} MB"]
        for text, perplexity in figures.items():
            lost = (perplexity - exact[text]) / (nearest[text] - exact[text])
            line.append(f"{perplexity:.3f} ({lost:.0%})")
        lines.append(line)
    header = ["layers", "size", *(f"{text} (loss, to nearest = 100%)" for text in texts)]
    results.report(found, "quantization.csv", header, lines)


if __name__ == "__main__":
    main()
