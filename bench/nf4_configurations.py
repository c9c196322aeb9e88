"""Which configuration of a product with an NF4 weight is fastest on this GPU: for its table.

    python -m bench.nf4_configurations                      every product, rows of x and candidate
    python -m bench.nf4_configurations --only int8 --processes 12

The table is in ``ladder_kernels/ops/nf4_linear/configurations.py``; a row of it that follows what
is found here says "measured". Each candidate's result is compared with that of the unpacked way (in
int8, of the table's own configuration) before it is timed. The layers are those of Qwen2.5-7B.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import rows as results
from bench.random_weights import fill_nf4
from bench.triton_kernels import do_bench
from ladder_kernels.launch import missing
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops.nf4_linear.configurations import Configuration, Product, using

_ROWS = (16, 64, 128, 256, 512, 1024, 2048)
_LAYERS = {"q": (3584, 3584), "down": (3584, 18944), "gate": (18944, 3584)}
_OF_PRODUCT: dict[Product, tuple[str, ...]] = {
    "forward": ("q", "down"),
    "transposed": ("q", "down"),
    "gated": ("gate",),
    "int8": ("q", "down"),
    "gated_int8": ("gate",),
}
_LARGE = 160 << 20
_ALLOWED = 2e-2
_REP = 25
_HEADER = ["product", "layer", "M", "fastest", "its time", "the table's", "next, in us"]


def _fused(*tile: int, splits: Sequence[int] = (1,), parts: int = 1) -> list[Configuration]:
    m, n, k, warps, stages = tile
    return [
        Configuration("fused", m, n, k, parts, each, num_warps=warps, num_stages=stages)
        for each in splits
    ]


_UNPACKED = [Configuration("unpacked"), Configuration("unpacked", workspace_bytes=_LARGE)]
CANDIDATES: dict[Product, list[Configuration]] = {
    "forward": [
        *_UNPACKED,
        *_fused(16, 64, 64, 4, 3, splits=(1, 2, 4, 8)),
        *_fused(16, 128, 64, 4, 4, splits=(2, 8)),
        *_fused(32, 64, 64, 4, 4, splits=(1, 4)),
        *_fused(64, 64, 64, 4, 4, splits=(1, 2, 4, 8)),
        *_fused(64, 128, 64, 8, 3, splits=(1, 2, 4)),
        *_fused(128, 64, 64, 8, 3, splits=(1, 2, 4)),
        *_fused(128, 128, 64, 8, 3, splits=(1, 2, 4)),
        *_fused(128, 256, 64, 8, 3),
        *_fused(256, 128, 64, 8, 3),
    ],
    "transposed": [
        *_UNPACKED,
        *_fused(16, 64, 64, 4, 3, splits=(1, 2, 4, 8)),
        *_fused(32, 64, 64, 4, 4, splits=(1, 2, 4)),
        *_fused(64, 64, 64, 4, 4, splits=(1, 2, 4)),
        *_fused(64, 64, 128, 8, 3, splits=(1, 2)),
        *_fused(128, 64, 64, 8, 3, splits=(1, 2)),
        *_fused(128, 64, 128, 8, 3, splits=(1, 2)),
        *_fused(256, 64, 128, 8, 3),
    ],
    "gated": [
        *_UNPACKED,
        *_fused(16, 32, 64, 4, 3),
        *_fused(16, 64, 64, 4, 4),
        *_fused(32, 64, 64, 4, 4),
        *_fused(64, 64, 64, 4, 3),
        *_fused(64, 64, 64, 8, 3),
        *_fused(128, 64, 64, 8, 3),
        *_fused(128, 128, 64, 8, 3),
    ],
    "int8": [
        *_fused(16, 64, 64, 4, 3, splits=(1, 2, 4, 8)),
        *_fused(16, 128, 64, 4, 3, splits=(2, 4, 8)),
        *_fused(64, 128, 64, 8, 3, splits=(1, 2, 4)),
        *_fused(128, 64, 64, 4, 3, splits=(1, 2, 4)),
        *_fused(128, 128, 64, 8, 3, splits=(1, 2, 4)),
        *_fused(128, 128, 64, 8, 4),
        *_fused(256, 128, 64, 8, 3),
    ],
    "gated_int8": [
        *_fused(16, 64, 64, 4, 3),
        *_fused(64, 64, 64, 8, 3),
        *_fused(64, 64, 64, 4, 3),
        *_fused(128, 32, 64, 4, 3),
        *_fused(128, 64, 64, 8, 3),
        *_fused(128, 64, 64, 8, 4),
    ],
}
"""What is tried; a tile of many more rows than x has is left out."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One product to try candidates on."""

    product: Product
    layer: str
    rows: int

    @property
    def candidates(self) -> list[Configuration]:
        """Those that fit the rows."""
        most = max(16, self.rows)
        return [
            each
            for each in CANDIDATES[self.product]
            if each.way == "unpacked" or (each.block_m <= most and self.rows <= 16 * each.block_m)
        ]

    def call(self, device: torch.device | str) -> Callable[[], torch.Tensor]:
        """The product, with random numbers; on the device "meta", with none."""
        shape = _LAYERS[self.layer]
        tensors = [NF4Weight.empty(shape, device=device) for _ in range(2)]
        width = shape[0] if self.product == "transposed" else shape[1]
        x = torch.empty((self.rows, width), dtype=torch.bfloat16, device=device)
        if x.is_cuda:
            generator = torch.Generator(device).manual_seed(0)
            x.normal_(generator=generator)
            for weight in tensors:
                fill_nf4(weight, generator)
        return _CALLS[self.product](x, *tensors)


def _forward(x: torch.Tensor, weight: NF4Weight, _: NF4Weight) -> Callable[[], torch.Tensor]:
    from ladder_kernels.ops.nf4_linear import gpu

    return lambda: gpu.nf4_linear(x, weight)


def _transposed(x: torch.Tensor, weight: NF4Weight, _: NF4Weight) -> Callable[[], torch.Tensor]:
    from ladder_kernels.ops.nf4_linear import gpu

    return lambda: gpu.nf4_linear_transposed(x, weight)


def _gated(x: torch.Tensor, gate: NF4Weight, up: NF4Weight) -> Callable[[], torch.Tensor]:
    from ladder_kernels.ops.nf4_swiglu import gpu

    return lambda: gpu.nf4_swiglu(x, gate, up)


def _int8(x: torch.Tensor, weight: NF4Weight, _: NF4Weight) -> Callable[[], torch.Tensor]:
    from ladder_kernels.ops.nf4_linear_int8 import gpu

    return lambda: gpu.nf4_linear_int8(x, weight)


def _gated_int8(x: torch.Tensor, gate: NF4Weight, up: NF4Weight) -> Callable[[], torch.Tensor]:
    from ladder_kernels.ops.nf4_swiglu_int8 import gpu

    return lambda: gpu.nf4_swiglu_int8(x, gate, up)


_CALLS: dict[Product, Callable[..., Callable[[], torch.Tensor]]] = {
    "forward": _forward,
    "transposed": _transposed,
    "gated": _gated,
    "int8": _int8,
    "gated_int8": _gated_int8,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns how many candidates failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(_OF_PRODUCT), default=list(_OF_PRODUCT))
    parser.add_argument("--rows", nargs="+", type=int, default=list(_ROWS), help="of x")
    parser.add_argument("--processes", type=int, default=1, help="that compile at once")
    options = parser.parse_args(arguments)
    if missing() is not None or not torch.cuda.is_available():
        print("There is no GPU with Triton here, so nothing was measured.")
        return 0
    chosen = [trial for trial in trials(options.rows) if trial.product in options.only]
    if options.processes > 1:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=compile_some, args=(options.rows, options.only, place, options))
            for place in range(options.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    failed = 0
    lines = []
    found: list[results.Row] = []
    for trial in chosen:
        times, wrong = measured(trial)
        failed += wrong
        lines.append(line_of(trial, times))
        print(" | ".join(lines[-1]), flush=True)
        about = {
            "bench": "nf4_configurations",
            "model": "Qwen2.5-7B",
            "shape": f"{trial.product} {trial.layer} M={trial.rows}",
            "dtype": "bfloat16",
        }
        found += results.seconds(times, "triton", **about)
        results.write(found, "nf4_configurations.csv")
    results.report(found, "nf4_configurations.csv", _HEADER, lines)
    return failed


def trials(rows: Sequence[int] = _ROWS) -> Iterator[Trial]:
    """All products to try."""
    for product, layers in _OF_PRODUCT.items():
        for layer in layers:
            for each in rows:
                yield Trial(product=product, layer=layer, rows=each)


def compile_some(rows: Sequence[int], only: Sequence[str], place: int, options: Any) -> None:
    """Call every so manyth candidate once, from a place on: Triton keeps what it has compiled."""
    device = torch.device("cuda", torch.cuda.current_device())
    every = [
        (trial, candidate)
        for trial in trials(rows)
        if trial.product in only
        for candidate in trial.candidates
    ]
    for trial, candidate in every[place :: options.processes]:
        try:
            with using(candidate):
                trial.call(device)()
        except Exception as error:
            print(f"{trial}: {name_of(candidate)}: {type(error).__name__}: {error}", flush=True)


def measured(trial: Trial) -> tuple[dict[str, Any], int]:
    """Quantiles by candidate, that of the table as "table"; and how many failed."""
    device = torch.device("cuda", torch.cuda.current_device())
    call = trial.call(device)
    if trial.product in ("int8", "gated_int8"):
        expected = call().float()
    else:
        with using(_UNPACKED[0]):
            expected = call().float()
    times, wrong = {"table": do_bench(call, rep=_REP)}, 0
    for candidate in trial.candidates:
        name = name_of(candidate)
        try:
            with using(candidate):
                error = ((call().float() - expected).norm() / expected.norm()).item()
                if not error <= _ALLOWED:
                    raise RuntimeError(f"its error is {error:.3g}; not timed")
                times[name] = do_bench(call, rep=_REP)
        except Exception as error:  # whatever a compiler or a driver raises
            wrong += 1
            print(f"{trial}: {name}: {type(error).__name__}: {error}", flush=True)
    return times, wrong


def name_of(configuration: Configuration) -> str:
    """In one word."""
    if configuration.way == "unpacked":
        return f"unpacked/{configuration.workspace_bytes >> 20}MiB"
    tile = f"{configuration.block_m}x{configuration.block_n}x{configuration.block_k}"
    return f"{tile}/w{configuration.num_warps}/s{configuration.num_stages}/{configuration.splits}"


def line_of(trial: Trial, times: dict[str, Any]) -> list[str]:
    """A line of the table: the fastest, the table's own, and the next three."""
    table = times["table"].median
    others = sorted((q.median, name) for name, q in times.items() if name != "table")
    shown = [f"{name} {seconds * 1e6:,.0f}" for seconds, name in others]
    best = [others[0][1], f"{others[0][0] * 1e6:,.1f} us"] if others else ["", ""]
    return [
        trial.product, trial.layer, str(trial.rows), *best,
        f"{table * 1e6:,.1f} us", "; ".join(shown[1:5]),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(min(main(), 1))
