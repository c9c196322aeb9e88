"""Every Triton kernel on this GPU, at the shapes of a 7B model and 2,048 tokens.

    python -m bench.triton_kernels                          measure, on a GPU
    python -m bench.triton_kernels --only nf4_linear        cases whose name begins so
    python -m bench.triton_kernels --processes 12           compile in so many processes first
    python -m bench.triton_kernels --dry-run executed       without a GPU: check the list, small

The calls are those of ``ladder-kernels audit``. Each result is verified against the reference, in
float64 too, before it is timed; beside each time is the one that the audit models for the device,
if it knows the device. The model knows this library's kernels: where a weight is unpacked, the
product itself is cuBLAS' and not in it. A dry run verifies the same calls on small tensors, and
times nothing: the compiled code is *executed* on the CPU, or *interpreted* in float32.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from bench import rows as results
from bench.timing import Quantiles
from ladder_kernels.launch import architecture, missing

_FILE = "triton_kernels.csv"
_DRY_RUNS = ("executed", "interpreted")
_CACHE_BYTES = 256 << 20
# About a millisecond: longer than the host takes to issue any of the calls that the GPU is done
# with sooner.
_SLEEP_CYCLES, _SLEEP_SECONDS = 2_000_000, 1.2e-3
_FEWEST = 10
_HEADER = ["case", "low", "median", "high", "modelled", "measured / modelled"]

Timer = Callable[[Callable[[], object]], Quantiles]
"""Times a call."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns how many calls gave a wrong result."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of cases")
    parser.add_argument("--dry-run", choices=_DRY_RUNS, help="verify small tensors on the CPU")
    parser.add_argument("--processes", type=int, default=1, help="that compile at once")
    parser.add_argument(
        "--measured-only", action="store_true", help="leave out the audit's times, which take time"
    )
    parser.add_argument(
        "--compare", action="store_true", help="model times for the rows in bench/results/"
    )
    options = parser.parse_args(arguments)
    reason = missing()
    if reason is not None:
        print(f"Nothing to do: {reason}.")
        return 0
    only = tuple(options.only)
    if options.compare:
        compare(only)
        return 0
    if options.dry_run:
        return dry_run(options.dry_run, only)
    if not torch.cuda.is_available():
        print(
            "There is no GPU here, so nothing was measured: `ladder-kernels audit` gives modelled "
            "times, and --dry-run checks the list on the CPU."
        )
        return 0
    if options.processes > 1:
        compile_at_once(only, options.processes)
    return measure(only, model=not options.measured_only)


def compile_at_once(only: tuple[str, ...], processes: int) -> None:
    """Call what will be measured once, in several processes: Triton keeps what it has compiled.

    What fails there fails again where it is measured, and is counted then.
    """
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=call_once, args=(only, place, processes))
        for place in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def call_once(only: tuple[str, ...], place: int, processes: int) -> None:
    """Call every so manyth of the calls whose names begin so, from a place on, on the GPU."""
    from bench.kernel_calls import calls

    device = torch.device("cuda", torch.cuda.current_device())
    chosen = [each for each in calls(architecture(device)) if each.name.startswith(only)]
    for call in chosen[place::processes]:
        try:
            made = call.on(device)
            if made.unsupported() is None:
                made()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{call.name}: {type(error).__name__}: {error}", flush=True)


def measure(only: tuple[str, ...], *, model: bool = True) -> int:
    """Verify and time calls on the GPU.

    Args:
        only: Beginnings of their names.
        model: Whether to model the times as well.

    Returns:
        How many are wrong.
    """
    from bench.kernel_calls import calls

    device = torch.device("cuda", torch.cuda.current_device())
    name = results.device_name()
    found: list[results.Row] = []
    lines: list[list[str]] = []
    wrong = 0
    for call in calls(architecture(device)):
        if not call.name.startswith(only):
            continue
        try:
            quantiles = timed(call.on(device), do_bench)
        except torch.OutOfMemoryError:
            print(f"{call.name}: the GPU's memory is too small to verify it; not timed", flush=True)
            continue
        except Exception as error:  # whatever a compiler or a driver raises
            wrong += 1
            print(f"wrong: {call.name}: {type(error).__name__}: {error}", flush=True)
            continue
        if quantiles is None:
            continue
        found += rows_of(call.name, quantiles)
        results.write(found, _FILE)
        seconds = modelled(call.case, name) if model else None
        lines.append(line_of(call.name, quantiles, seconds))
        print(" ".join(lines[-1]), flush=True)
    results.report(found, _FILE, _HEADER, lines)
    return wrong


def compare(only: tuple[str, ...]) -> None:
    """Print the measured rows of cases whose names begin so beside the times that are modelled."""
    from ladder_kernels.audit.catalogue import cases

    known = {case.name: case for case in cases()}
    found = [row for row in results.read(_FILE) if row.shape.startswith(only)]
    lines = []
    for row in found:
        if row.shape in known:
            quantiles = Quantiles(low=row.low, median=row.median, high=row.high, calls=0)
            seconds = modelled(known[row.shape], row.device)
            lines.append([row.device, *line_of(row.shape, quantiles, seconds)])
    print(results.table(["device", *_HEADER], lines))


def timed(call: Any, timer: Timer) -> Quantiles | None:
    """Time a call of a launcher if its result is right; ``None`` if it does not take the call.

    Args:
        call: A :class:`~bench.kernel_calls.Call` with numbers.
        timer: What times it.

    Raises:
        RuntimeError: The result is wrong; nothing was timed.
    """
    reason = call.unsupported()
    if reason is not None:
        print(f"{call.name}: not taken here: {reason}")
        return None
    call.verify()
    return timer(call)


def do_bench(call: Callable[[], object], *, rep: int = 300) -> Quantiles:
    """Time calls on the GPU, each on a cold cache, for about ``rep`` milliseconds.

    The GPU sleeps before each call while the host issues it, so that what is measured is the GPU's
    time and not the host's.
    """
    cache = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - start + _SLEEP_SECONDS
    count = max(_FEWEST, round(rep / 1e3 / once))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in marks:
        cache.zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    milliseconds = [begin.elapsed_time(end) for begin, end in marks]
    low, median, high = np.quantile(milliseconds, (0.2, 0.5, 0.8)) / 1e3
    return Quantiles(low=low, median=median, high=high, calls=count)


def rows_of(case: str, quantiles: Quantiles) -> list[results.Row]:
    """A measured row."""
    about = {"bench": "triton_kernels", "model": "Qwen2.5-7B", "shape": case, "dtype": "bfloat16"}
    return results.seconds({"ladder_kernels": quantiles}, "triton", **about)


def line_of(case: str, quantiles: Quantiles, seconds: float | None) -> list[str]:
    """A line of the table: measured, modelled, and the one over the other."""
    times = (quantiles.low, quantiles.median, quantiles.high)
    line = [case, *(f"{each * 1e6:,.1f} us" for each in times)]
    if seconds is None:
        return [*line, "", ""]
    return [*line, f"{seconds * 1e6:,.1f} us", f"{quantiles.median / seconds:.2f}"]


def modelled(case: Any, device_name: str) -> float | None:
    """Seconds that the audit models for a case on a device; ``None`` if it has no such device.

    Args:
        case: Of the audit's catalogue.
        device_name: As the driver gives it, such as ``"NVIDIA GeForce RTX 4090"``.
    """
    from ladder_kernels.audit.audit import audit
    from ladder_kernels.audit.targets import DEVICES, target_of

    names = device_name.replace("-", " ").split()
    for device in DEVICES:
        wanted = device.name.split()
        # A "4070 Ti" is no "4070".
        begins = [i for i in range(len(names)) if names[i : i + len(wanted)] == wanted]
        if not begins or names[begins[0] + len(wanted) :][:1] in (["Ti"], ["SUPER"], ["Laptop"]):
            continue
        findings = list(audit([target_of(device.target)], [case]))
        parts = [finding.seconds.get(device.name) for finding in findings]
        if all(parts):
            return sum(max(each.values()) for each in parts if each)
    return None


def dry_run(kind: str, only: Iterable[str] = ("",)) -> int:
    """Verify the calls whose names begin so on small tensors on the CPU; returns how many fail."""
    from bench.kernel_calls import calls, shrunk
    from ladder_kernels.audit import executing, interpreting

    half = torch.bfloat16 if kind == "executed" else torch.float32
    wrong = done = 0
    for call in calls():
        if not call.name.startswith(tuple(only)):
            continue
        host: AbstractContextManager[object]
        host = executing(86, lockstep=False) if kind == "executed" else interpreting()
        with host:
            small = call.on("cpu", size=shrunk, half=half)
            reason = small.unsupported()
            if reason is not None:
                print(f"{call.name}: not taken here: {reason}")
                continue
            done += 1
            try:
                part = small.verify()
            except RuntimeError as error:
                wrong += 1
                print(f"wrong: {error}", flush=True)
                continue
        print(f"{kind}: {call.name}: {part:.0%} of the allowed error", flush=True)
    print(f"{done} calls {kind} at small shapes, {wrong} wrong; no times")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
