"""One row format for every result, in CSV files under ``bench/results/``."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from bench.timing import Quantiles

__all__ = [
    "RESULTS",
    "Row",
    "bytes_of",
    "commit",
    "cosines",
    "device_name",
    "figures_of",
    "perplexities",
    "read",
    "report",
    "seconds",
    "table",
    "versions",
    "write",
]

RESULTS = Path(__file__).parent / "results"
"""Where result files are."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured (or otherwise obtained) figure.

    Attributes:
        bench: The benchmark, such as ``"nf4_linear"``.
        candidate: What was measured: ours, or a rival with what it runs on.
        model: Model whose shapes these are, or "".
        shape: Sizes, such as ``"M=2048 N=3584 K=3584"``.
        dtype: Of the activations.
        metric: What ``low``, ``median`` and ``high`` are, with its unit.
        low: 20 % quantile.
        median: 50 % quantile.
        high: 80 % quantile.
        threads: CPU threads.
        device: Processor or GPU.
        evidence: "measured", "executed", "compiled" or "modelled".
        versions: Of what matters.
        commit: Of this repository; "+" marks uncommitted changes.
    """

    bench: str
    candidate: str
    model: str
    shape: str
    dtype: str
    metric: str
    low: float
    median: float
    high: float
    threads: int
    device: str
    evidence: str
    versions: str
    commit: str

    def key(self) -> tuple[object, ...]:
        """What a newer row replaces an older one by."""
        return (
            *(self.bench, self.candidate, self.model, self.shape, self.dtype, self.metric),
            *(self.threads, self.device, self.evidence),
        )


def seconds(timed: Mapping[str, Quantiles], *packages: str, **about: str) -> list[Row]:
    """Rows of what :func:`~bench.timing.alternate` measured.

    Args:
        timed: Quantiles by candidate.
        packages: Whose versions matter, beside torch's.
        about: ``bench``, ``model``, ``shape`` and ``dtype`` of :class:`Row`, and a ``note`` that is
            put behind the candidate's name, in brackets, unless it is empty.
    """
    figures = {name: (times.low, times.median, times.high) for name, times in timed.items()}
    return figures_of("seconds", figures, *packages, **about)


def bytes_of(measured: Mapping[str, int], *packages: str, **about: str) -> list[Row]:
    """Rows of bytes by candidate; arguments as of :func:`seconds`."""
    figures = {name: (number, number, number) for name, number in measured.items()}
    return figures_of("bytes", figures, *packages, **about)


def perplexities(measured: Mapping[str, float], *packages: str, **about: str) -> list[Row]:
    """Rows of perplexities by candidate; arguments as of :func:`seconds`."""
    figures = {name: (number, number, number) for name, number in measured.items()}
    return figures_of("perplexity", figures, *packages, **about)


def cosines(measured: Mapping[str, float], *packages: str, **about: str) -> list[Row]:
    """Rows of cosines of an angle by candidate; arguments as of :func:`seconds`."""
    figures = {name: (number, number, number) for name, number in measured.items()}
    return figures_of("cosine", figures, *packages, **about)


def figures_of(
    metric: str,
    figures: Mapping[str, tuple[float, float, float]],
    *packages: str,
    note: str = "",
    suffix: str = "",
    **about: str,
) -> list[Row]:
    """Measured rows of any metric.

    Args:
        metric: What the figures are, with its unit.
        figures: 20 %, 50 % and 80 % quantiles by candidate.
        packages: Whose versions matter, beside torch's.
        note: Put behind the candidate's name, in brackets, unless it is empty.
        suffix: Put behind the device's name.
        about: ``bench``, ``model``, ``shape`` and ``dtype`` of :class:`Row`.
    """
    return [
        Row(
            candidate=f"{candidate} [{note}]" if note else candidate,
            metric=metric,
            low=low,
            median=median,
            high=high,
            threads=torch.get_num_threads(),
            device=device_name() + suffix,
            evidence="measured",
            versions=versions("torch", *packages),
            commit=commit(),
            **about,
        )
        for candidate, (low, median, high) in figures.items()
    ]


def report(rows: Iterable[Row], file: str, header: list[str], lines: list[list[str]]) -> None:
    """Write rows, print a table and where the rows are."""
    path = write(rows, file)
    print("\n" + table(header, lines))
    print(f"\nrows in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def write(rows: Iterable[Row], file: str, folder: Path | None = None) -> Path:
    """Put rows into a results file; those already there with the same key are replaced.

    Args:
        rows: What to write.
        file: Its name.
        folder: Where it is; default :data:`RESULTS`.

    Returns:
        The file's path.
    """
    path = (folder or RESULTS) / file
    kept = {row.key(): row for row in (*read(file, folder), *rows)}
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".new")
    with beside.open("w", newline="", encoding="utf-8") as new:
        writer = csv.DictWriter(new, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in kept.values():
            values = asdict(row)
            for name in ("low", "median", "high"):
                values[name] = f"{values[name]:.6g}"
            writer.writerow(values)
    beside.replace(path)
    return path


def read(file: str, folder: Path | None = None) -> list[Row]:
    """The rows of a results file; none if there is no such file. Arguments as of :func:`write`."""
    path = (folder or RESULTS) / file
    if not path.exists():
        return []
    found = []
    with path.open(newline="", encoding="utf-8") as old:
        for values in csv.DictReader(old):
            numbers = {name: float(values[name]) for name in ("low", "median", "high")}
            found.append(Row(**{**values, **numbers, "threads": int(values["threads"])}))
    return found


def device_name() -> str:
    """The processor's (or GPU's) name and what distinguishes it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    family = f"family {names.get('cpu family', '?')} model {names.get('model', '?')}"
    flags = names.get("flags", "").split()
    best = next((f for f in ("avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return " ".join(f"{names.get('model name', platform.machine())} ({family}, {best})".split())


def versions(*packages: str) -> str:
    """Installed versions of ``packages``, in one string."""
    return " ".join(f"{name}={importlib.metadata.version(name)}" for name in packages)


def commit() -> str:
    """The repository's short commit; with "+" if files differ from it; "" outside git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
            )
        except OSError:  # there is no git
            return ""
        return done.stdout.strip()

    all_but_results = (":(top)", ":(top,exclude)bench/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *all_but_results)
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    text = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(text)
