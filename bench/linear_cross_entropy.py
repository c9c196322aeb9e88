"""linear_cross_entropy on a CPU, loss and gradient, against F.linear with F.cross_entropy.

    python -m bench.linear_cross_entropy                on the best instruction set that there is
    python -m bench.linear_cross_entropy --isa avx2     ours and torch's kernels held to AVX2

An NF4 head; torch has it dequantised already. 2,048 tokens, all of which count. Candidates take
turns in one run, verified against float64 on some tokens first. The memory of a candidate (the
largest resident set beyond inputs, loss and gradient) is that of one call in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.nf4_linear import HELD_TO

if TYPE_CHECKING:
    from torch import Tensor

HEADS = {
    "SmolLM2-135M": (49152, 576),
    "Qwen2.5-7B": (152064, 3584),
}
"""``[V, D]`` of the heads that are timed, by name."""

_TOKENS = 2048
_OURS, _REFERENCE, _TORCH = "ladder_kernels", "our reference in PyTorch", "torch, dequantised"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--isa", choices=sorted(HELD_TO), help="hold every candidate to it")
    parser.add_argument("--model", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each head and dtype")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(HELD_TO.get(options.isa, {}))
    if options.memory_of:
        print(_memory(*options.memory_of))
        return
    _run(options.model, options.seconds, options.isa)


def _run(models: list[str], seconds: float, isa: str | None) -> None:
    import torch

    from bench import rows as results
    from bench.timing import alternate

    torch.manual_seed(0)
    print(f"{results.device_name()}, {torch.get_num_threads()} threads")
    lines: list[list[str]] = []
    found: list[results.Row] = []
    for model in models:
        for dtype in (torch.float32, torch.bfloat16):
            V, D = HEADS[model]
            name = str(dtype).removeprefix("torch.")
            about = {
                "bench": "linear_cross_entropy",
                "model": model,
                "shape": f"T={_TOKENS} V={V} D={D}",
                "dtype": name,
                "note": isa or "",
            }
            candidates = _candidates(V, D, dtype)
            _verify(candidates)
            timed = alternate(candidates, seconds=seconds, at_least=3)
            del candidates
            found += results.seconds(timed, **about)
            memory = {candidate: _memory_apart(model, name, candidate, isa) for candidate in timed}
            found += results.bytes_of(memory, **about)
            ours = timed[_OURS].median
            for candidate, quantiles in timed.items():
                line = [model, name, candidate, f"{quantiles.median:.3f} s"]
                line += [f"{quantiles.median / ours:.2f}x", f"{memory[candidate] / 1e6:,.0f} MB"]
                lines.append(line)
                print(" ".join(line), flush=True)
    header = ["head", "dtype", "candidate", "loss and gradient", "time, ours = 1", "memory beyond"]
    results.report(found, "linear_cross_entropy.csv", header, lines)


def _candidates(V: int, D: int, dtype: Any) -> dict[str, Callable[..., list[Tensor]]]:
    """Each returns the loss and the gradient of ``hidden``, of the first ``count`` tokens."""
    import torch
    import torch.nn.functional as F

    import ladder_kernels as lk

    head = lk.quantize_nf4(torch.randn(V, D) / D**0.5)
    hidden = torch.randn(_TOKENS, D).to(dtype)
    labels = torch.randint(V, (_TOKENS,))
    dense: list[Tensor] = []

    def ours(backend: str, count: int) -> list[Tensor]:
        rows = hidden[:count].requires_grad_()
        with lk.use_backend(backend):
            loss = lk.linear_cross_entropy(rows, head, labels[:count])
        return [loss.detach(), *torch.autograd.grad(loss, rows)]

    def theirs(count: int, exact: bool = False) -> list[Tensor]:
        if not dense:
            dense.append(head.dequantize(dtype))
        rows, matrix = hidden[:count], dense[0]
        if exact:
            rows, matrix = rows.double(), matrix.double()
        rows = rows.detach().requires_grad_()
        loss = F.cross_entropy(F.linear(rows, matrix), labels[:count])
        return [loss.detach(), *torch.autograd.grad(loss, rows)]

    return {
        _OURS: lambda count=_TOKENS: ours("cpu", count),
        _REFERENCE: lambda count=_TOKENS: ours("reference", count),
        _TORCH: lambda count=_TOKENS, exact=False: theirs(count, exact),
    }


def _verify(candidates: dict[str, Callable[..., list[Tensor]]]) -> None:
    """Refuse to time what is less accurate than the plain expression, on 48 tokens."""
    from bench.timing import verified

    same, exact = candidates[_TORCH](48), candidates[_TORCH](48, exact=True)
    for name, call in candidates.items():
        for got, plain, true in zip(call(48), same, exact, strict=True):
            verified(name, got, plain, true)


def _memory_apart(model: str, dtype: str, candidate: str, isa: str | None) -> int:
    command = [sys.executable, "-m", "bench.linear_cross_entropy"]
    command += ["--memory-of", model, dtype, candidate, *(("--isa", isa) if isa else ())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def _memory(model: str, dtype: str, candidate: str) -> int:
    """Of one call, the first of any size in this process."""
    import torch

    from bench.memory import bytes_beyond

    wanted = getattr(torch, dtype)
    _candidates(256, 64, wanted)[candidate](16)  # libraries and threads are there then
    call = _candidates(*HEADS[model], wanted)[candidate]
    if candidate == _TORCH:
        call(1)  # its head is an input
    return bytes_beyond(call)


if __name__ == "__main__":
    main()
