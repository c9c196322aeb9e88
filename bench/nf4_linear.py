"""nf4_linear on a CPU against bitsandbytes and against already dequantised weights.

    python -m bench.nf4_linear                   on the best instruction set that there is
    python -m bench.nf4_linear --isa avx2        ours and the rivals' kernels held to AVX2

Candidates take turns in one run; each result is verified against float64 before it is timed.
Weights that are dequantised already are multiplied by torch and, where there are many rows of
float32, by NumPy (OpenBLAS, whose threads are told to sleep soon after a product: by default they
hold their cores for milliseconds of the next candidate's time). The peaks of multiply-adds and of
reading memory come from small loops (``peak.cpp``) in the same run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

HELD_TO = {
    "avx2": {
        "LADDER_KERNELS_CPU_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "OPENBLAS_CORETYPE": "Haswell",
    }
}
"""Environment that holds everyone's kernels to an instruction set; read when libraries load."""

MANY_ROWS = 64
"""Rows from which on NumPy is timed too, and reading the weights is no bound."""

_TORCH, _NUMPY = "torch, dequantised", "NumPy, dequantised"

SHAPES = {
    "SmolLM2-135M q, o": (576, 576),
    "SmolLM2-135M gate, up": (1536, 576),
    "SmolLM2-135M down": (576, 1536),
    "Qwen2.5-1.5B q, o": (1536, 1536),
    "Qwen2.5-1.5B gate, up": (8960, 1536),
    "Qwen2.5-1.5B down": (1536, 8960),
    "Qwen2.5-7B q, o": (3584, 3584),
    "Qwen2.5-7B gate, up": (18944, 3584),
    "Qwen2.5-7B down": (3584, 18944),
}
"""``[N, K]`` of the layers that are timed, by name."""


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--isa", choices=sorted(HELD_TO), help="hold every candidate to it")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 16, 4, 1], help="M")
    parser.add_argument("--layer", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each layer and M")
    options = parser.parse_args()
    os.environ.update(HELD_TO.get(options.isa, {}))
    os.environ["OPENBLAS_THREAD_TIMEOUT"] = "16"  # log2 of cycles
    _run(options.rows, options.layer, options.seconds, options.isa)


def _run(all_rows: list[int], layers: list[str], seconds: float, isa: str | None) -> None:
    import torch

    from bench import rows as results
    from bench.peak import Peak
    from bench.timing import alternate, verified

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    threads = torch.get_num_threads()
    peak = Peak.measure(threads, isa)
    print(
        f"{results.device_name()}, {threads} threads: {peak.flops / 1e9:.0f} GFLOP/s, "
        f"{peak.bytes_read / 1e9:.0f} GB/s read"
    )
    lines: list[list[str]] = []
    found: list[results.Row] = []
    for layer in layers:
        for M in all_rows:
            for dtype in (torch.float32, torch.bfloat16):
                N, K = SHAPES[layer]
                name = str(dtype).removeprefix("torch.")
                candidates, expected = _candidates(M, N, K, dtype)
                for candidate, call in candidates.items():
                    verified(candidate, call(), *expected)
                del expected
                timed = alternate(candidates, seconds=seconds)
                found += results.seconds(
                    timed,
                    *("bitsandbytes", "numpy"),
                    bench="nf4_linear",
                    model=layer,
                    shape=f"M={M} N={N} K={K}",
                    dtype=name,
                    note=isa or "",
                )
                ours = timed["ladder_kernels"].median
                rate = 2 * M * N * K / ours
                read = N * K / 2 / ours
                lines.append(
                    [
                        layer,
                        *(f"{M}", name, f"{ours * 1e3:.2f} ms"),
                        f"{timed['bitsandbytes matmul_4bit'].median / ours:.2f}x",
                        f"{timed[_TORCH].median / ours:.2f}x",
                        f"{timed[_NUMPY].median / ours:.2f}x" if _NUMPY in timed else "",
                        f"{100 * rate / peak.flops:.0f} %",
                        f"{100 * read / peak.bytes_read:.0f} %" if M < MANY_ROWS else "",
                    ]
                )
                print(" ".join(lines[-1]), flush=True)
    header = [
        *("layer", "M", "dtype", "ours", "bitsandbytes / ours", "dequantised torch / ours"),
        *("dequantised NumPy / ours", "of FMA peak", "packed bytes of read peak"),
    ]
    results.report(found, "nf4_linear.csv", header, lines)


def _candidates(M: int, N: int, K: int, dtype: object) -> tuple[dict[str, Callable], tuple]:
    """What to time, by name, and what verifies it: the same expression in torch, and exactly."""
    import torch
    import torch.nn.functional as F
    from bitsandbytes.autograd._functions import matmul_4bit

    import ladder_kernels as lk

    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype} is no dtype")
    weight = lk.quantize_nf4(torch.randn(N, K) / K**0.5)
    packed, state = weight.to_bitsandbytes()
    packed = packed.t()
    dense = weight.dequantize(dtype)
    x = torch.randn(M, K).to(dtype)
    candidates = {
        "ladder_kernels": lambda: lk.nf4_linear(x, weight),
        "bitsandbytes matmul_4bit": lambda: matmul_4bit(x, packed, state),
        _TORCH: lambda: F.linear(x, dense),
    }
    if dtype == torch.float32 and M >= MANY_ROWS:
        rows, columns = x.numpy(), dense.numpy().T
        candidates[_NUMPY] = lambda: torch.from_numpy(rows @ columns)
    return candidates, (F.linear(x, dense), F.linear(x.double(), dense.double()))


if __name__ == "__main__":
    main()
