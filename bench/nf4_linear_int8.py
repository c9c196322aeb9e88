"""Products in whole numbers (``activations="int8"``) on a CPU: their error and their time.

    python -m bench.nf4_linear_int8                    on the best instruction set that there is
    python -m bench.nf4_linear_int8 --isa avx2         held to one of LADDER_KERNELS_CPU_ISA

Errors are those of the layers of SmolLM2-135M on its own activations, of Python's documentation,
relative to the exact product with the same NF4 weight (Frobenius norm), beside those of a scale for
each whole token, which a block's scale replaces; then the loss of the whole model. Times are those
of ``nf4_linear`` and ``nf4_linear_int8`` in turns, each verified against its reference first.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
from typing import Any

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


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--isa", help="hold the kernels to this variant")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 16, 1], help="M")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each layer and M")
    parser.add_argument("--no-errors", action="store_true", help="times only")
    options = parser.parse_args()
    if options.isa:
        os.environ["LADDER_KERNELS_CPU_ISA"] = options.isa
    import torch

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if not options.no_errors:
        _errors()
    _times(options.rows, options.seconds, options.isa)


def _errors() -> None:
    """Of each kind of layer of SmolLM2, and of the model's loss."""
    import torch

    from bench import rows as results
    from ladder_kernels.demo import find_weights
    from ladder_kernels.models.loading import load_backbone
    from ladder_kernels.nn.attention import SequenceLayout
    from ladder_kernels.training.data import load_tokenizer

    weights = find_weights()
    backbone = load_backbone(weights, dtype=torch.float32)
    tokenizer: Any = load_tokenizer(str(weights))
    modules = [importlib.import_module(name) for name in _DOCUMENTED]
    classes = [c for m in modules for c in vars(m).values() if inspect.isclass(c)]
    text = "\n\n".join(inspect.getdoc(documented) or "" for documented in [*modules, *classes])
    ids = torch.tensor([tokenizer(text)["input_ids"][: _CONTEXT + 1]])
    layout = SequenceLayout.build(1, _CONTEXT)
    labels = ids[0, 1:]

    found: dict[str, list[tuple[float, float]]] = {}
    with _watched(backbone, found):
        backbone.frozen_pass(ids[:, :-1], layout=layout)
    losses = {}
    for activations in ("exact", "int8"):
        hidden = backbone.frozen_pass(ids[:, :-1], layout=layout, activations=activations).hidden
        logits = backbone.logits(hidden)[0]
        losses[activations] = torch.nn.functional.cross_entropy(logits, labels).item()
    lines, rows = [], []
    for kind, pairs in found.items():
        ours, tokens = (sorted(column) for column in zip(*pairs, strict=True))
        middle = len(ours) // 2
        figures = {
            "scale a block": (ours[0], ours[middle], ours[-1]),
            "scale a token": (tokens[0], tokens[middle], tokens[-1]),
        }
        lines.append([kind, *(f"{100 * x:.2f} %" for triple in figures.values() for x in triple)])
        rows += [
            results.Row(
                bench="nf4_linear_int8",
                candidate=candidate,
                model="SmolLM2-135M-Instruct",
                shape=f"layers {kind} S={_CONTEXT}",
                dtype="float32",
                metric="relative error (least, median, most of the layers)",
                low=triple[0],
                median=triple[1],
                high=triple[2],
                threads=torch.get_num_threads(),
                device=results.device_name(),
                evidence="measured",
                versions=results.versions("torch"),
                commit=results.commit(),
            )
            for candidate, triple in figures.items()
        ]
    header = ["layer", "a block: least", "median", "most", "a token: least", "median", "most"]
    results.report(rows, "nf4_linear_int8.csv", header, lines)
    exact, rounded = losses["exact"], losses["int8"]
    print(
        f"mean loss of {_CONTEXT} tokens: exact {exact:.4f} (perplexity {math.exp(exact):.3f}), "
        f"int8 {rounded:.4f} ({math.exp(rounded):.3f})"
    )


def _watched(backbone: Any, found: dict[str, list[tuple[float, float]]]) -> Any:
    """While it lasts, note errors of each NF4 layer, by its kind: of a block's, a token's scale."""
    from contextlib import contextmanager

    from ladder_kernels import ops
    from ladder_kernels.nn.linear import NF4Linear

    layers = [
        (name.rpartition(".")[2], module)
        for name, module in backbone.named_modules()
        if isinstance(module, NF4Linear) and name != "nf4_head"
    ]

    def note(kind: str) -> Any:
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

    @contextmanager
    def watch() -> Any:
        blocks = [module for module in backbone.modules() if hasattr(module, "fused")]
        fused = [block.fused for block in blocks]
        for block in blocks:
            block.fused = False  # gate and up are layers of their own then
        handles = [module.register_forward_hook(note(kind)) for kind, module in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, was in zip(blocks, fused, strict=True):
                block.fused = was

    return watch()


def _times(all_rows: list[int], seconds: float, isa: str | None) -> None:
    import torch

    from bench import rows as results
    from bench.nf4_linear import MANY_ROWS, SHAPES
    from bench.peak import Peak
    from bench.timing import alternate, verified
    from ladder_kernels import native, ops
    from ladder_kernels.nf4 import quantize_nf4

    threads = torch.get_num_threads()
    read = Peak.measure(threads).bytes_read
    used = native.status().isa
    print(f"{results.device_name()}, {threads} threads, {used}: {read / 1e9:.0f} GB/s read")
    lines, found = [], []
    for layer, (N, K) in SHAPES.items():
        weight = quantize_nf4(torch.randn(N, K) / K**0.5)
        for M in all_rows:
            x = torch.randn(M, K)
            candidates = {
                "nf4_linear": lambda x=x, w=weight: ops.nf4_linear(x, w),
                "nf4_linear_int8": lambda x=x, w=weight: ops.nf4_linear_int8(x, w),
            }
            few, columns = x[:64], slice(0, 256)
            for name, call in candidates.items():
                operation = getattr(ops, name)
                with ops.use_backend("reference"):
                    plain, exact = operation(few, weight), operation(few.double(), weight)
                verified(name, call()[:64, columns], plain[:, columns], exact[:, columns])
            timed = alternate(candidates, seconds=seconds)
            found += results.seconds(
                timed,
                bench="nf4_linear_int8",
                model=layer,
                shape=f"M={M} N={N} K={K}",
                dtype="float32",
                note=isa or "",
            )
            exact_time, ours = (timed[name].median for name in candidates)
            packed = N * K / 2 / read
            lines.append(
                [
                    *(layer, f"{M}", f"{exact_time * 1e3:.2f} ms", f"{ours * 1e3:.2f} ms"),
                    f"{exact_time / ours:.2f}x",
                    *(
                        f"{100 * packed / t:.0f} %" if M < MANY_ROWS else ""
                        for t in (exact_time, ours)
                    ),
                ]
            )
            print(" ".join(lines[-1]), flush=True)
    header = ["layer", "M", "exact", "int8", "exact / int8"]
    header += ["exact: packed bytes of read peak", "int8"]
    results.report(found, "nf4_linear_int8.csv", header, lines)


if __name__ == "__main__":
    main()
