"""Quantising to NF4 and back on a CPU, against bitsandbytes and against plain PyTorch.

    python -m bench.nf4_quantize                 on the best instruction set that there is
    python -m bench.nf4_quantize --isa avx2      our kernels held to AVX2 (bitsandbytes' are not)

Candidates take turns in one run; before ours are timed, their bits must be those that bitsandbytes
has on one thread. Bytes are those read and written, once each, without what the system does to hand
out fresh memory (which is most of the time where a result of many megabytes is made).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = {
    "SmolLM2-135M gate, up": (1536, 576),
    "Qwen2.5-7B q, o": (3584, 3584),
    "Qwen2.5-7B down": (3584, 18944),
}
"""``[N, K]`` of the layers that are timed, by name."""

_BITSANDBYTES = "bitsandbytes"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--isa", choices=["avx2", "baseline"], help="hold our kernels to it")
    parser.add_argument("--layer", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each layer and dtype")
    options = parser.parse_args()
    if options.isa:
        os.environ["LADDER_KERNELS_CPU_ISA"] = options.isa
    _run(options.layer, options.seconds, options.isa)


def _run(layers: list[str], seconds: float, isa: str | None) -> None:
    import torch

    from bench import rows as results
    from bench.peak import Peak
    from bench.timing import alternate

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    threads = torch.get_num_threads()
    peak = Peak.measure(threads).bytes_read
    print(f"{results.device_name()}, {threads} threads: {peak / 1e9:.0f} GB/s read")
    lines: list[list[str]] = []
    found: list[results.Row] = []
    for layer in layers:
        for dtype in (torch.float32, torch.bfloat16):
            N, K = LAYERS[layer]
            name = str(dtype).removeprefix("torch.")
            weight = torch.randn(N, K).to(dtype)
            for bench, candidates in (
                ("nf4_quantize", _quantisers(weight)),
                ("nf4_dequantize", _dequantisers(weight)),
            ):
                _verify(bench, candidates)
                timed = alternate(candidates, seconds=seconds, at_least=5)
                found += results.seconds(
                    timed,
                    "bitsandbytes",
                    bench=bench,
                    model=layer,
                    shape=f"N={N} K={K}",
                    dtype=name,
                    note=f"ours held to {isa}" if isa else "",
                )
                ours = timed["ladder_kernels"].median
                moved = weight.nbytes + weight.numel() * (0.5 + 1 / 64)
                lines.append(
                    [
                        *(layer, bench, name, f"{ours * 1e3:.2f} ms"),
                        f"{timed[_BITSANDBYTES].median / ours:.1f}x",
                        f"{timed['plain PyTorch'].median / ours:.1f}x",
                        f"{moved / ours / 1e9:.1f}",
                        f"{100 * moved / ours / peak:.0f} %",
                    ]
                )
                print(" ".join(lines[-1]), flush=True)
    header = ["layer", "what", "dtype", "ours", "bitsandbytes / ours", "plain PyTorch / ours"]
    results.report(found, "nf4_quantize.csv", [*header, "GB/s moved", "of read peak"], lines)


def _quantisers(weight: Tensor) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """With double quantisation, blocks of 64; each returns packed bytes and all scales."""
    from bitsandbytes.functional import quantize_4bit

    import ladder_kernels as lk

    def ours(backend: str) -> tuple[Tensor, ...]:
        with lk.use_backend(backend):
            return tuple(lk.quantize_nf4(weight).tensors().values())

    def theirs() -> tuple[Tensor, ...]:
        packed, state = quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        second = state.state2
        return packed.view(-1), state.absmax, second.absmax, second.code, state.offset

    return {
        "ladder_kernels": lambda: ours("cpu"),
        _BITSANDBYTES: theirs,
        "plain PyTorch": lambda: ours("reference"),
    }


def _dequantisers(weight: Tensor) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    from bitsandbytes.functional import dequantize_4bit

    import ladder_kernels as lk

    quantised = lk.quantize_nf4(weight)
    packed, state = quantised.to_bitsandbytes()

    def ours(backend: str) -> tuple[Tensor, ...]:
        with lk.use_backend(backend):
            return (quantised.dequantize(),)

    return {
        "ladder_kernels": lambda: ours("cpu"),
        _BITSANDBYTES: lambda: (dequantize_4bit(packed, state),),
        "plain PyTorch": lambda: ours("reference"),
    }


def _verify(bench: str, candidates: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """Refuse to time what does not give bitsandbytes' bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bit of bitsandbytes' offset depends on their number
    wanted = candidates[_BITSANDBYTES]()
    torch.set_num_threads(threads)
    for name, call in candidates.items():
        if name == _BITSANDBYTES:
            continue
        for ours, theirs in zip(call(), wanted, strict=True):
            bits = [value.reshape(-1).view(torch.uint8) for value in (ours, theirs)]
            if not torch.equal(*bits):
                raise RuntimeError(f"{bench}: {name} gives other bits; not timed")


if __name__ == "__main__":
    main()
