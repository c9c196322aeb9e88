"""``ladder-kernels info``: what is installed, what the machine has, and which kernels run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ladder_kernels import __version__
from ladder_kernels.cli.console import Verbose, print_json, table

__all__ = ["command"]

_PACKAGES = (
    "torch", "triton", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors",
    "tokenizers", "huggingface_hub", "gguf", "peft", "trl", "numpy", "tensorboard", "typer", "rich",
)  # fmt: skip

# Those that kernels here or in torch ask for, by the names of Linux.
_CPU_FEATURES = (
    "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp",
    "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip

_VARIABLES = (
    "LADDER_KERNELS_CPU_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE",
)  # fmt: skip


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show versions, backends, CPU features, threads and GPUs: what a bug report needs."""
    found = {
        "versions": _versions(),
        "cpu": _cpu(),
        "threads": _threads(),
        "memory": _memory(),
        "gpus": _gpus(),
        "native": _native(),
        "operations": _operations(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    if as_json:
        print_json(found)
    else:
        _show(found)


def _versions() -> dict[str, str | None]:
    """Versions by name, ``None`` for what is not installed; nothing is imported for it."""
    versions: dict[str, str | None] = {
        "ladder_kernels": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu() -> dict[str, Any]:
    import torch

    name, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
                break
    elif sys.platform == "darwin":
        brand = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(brand, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "name": name,
        "architecture": platform.machine(),
        "features": [feature for feature in _CPU_FEATURES if feature in flags],
        "torch": torch.backends.cpu.get_cpu_capability(),
    }


def _threads() -> dict[str, int | None]:
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "cpus": os.cpu_count(),
        "cpus_allowed": allowed,
        "torch": torch.get_num_threads(),
        "torch_interop": torch.get_num_interop_threads(),
    }


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": memory.total, "available": memory.available}


def _gpus() -> dict[str, Any]:
    """The GPUs that torch can use, and if there are none, why."""
    import torch

    built_for = None
    if torch.version.cuda is not None:
        built_for = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        built_for = f"ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        reason = "no GPU with a working driver was found"
        if built_for is None:
            reason = f"torch {torch.__version__} is built without GPU support"
        return {"built_for": built_for, "devices": [], "reason": reason}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "architecture": getattr(properties, "gcnArchName", None)
                or f"sm_{properties.major}{properties.minor}",
                "memory": properties.total_memory,
                "processors": properties.multi_processor_count,
            }
        )
    return {"built_for": built_for, "devices": devices, "reason": None}


def _native() -> dict[str, Any]:
    """The library of CPU kernels."""
    from ladder_kernels import native

    status = native.status()
    return {
        "available": status.available,
        "version": status.version,
        "isa": status.isa,
        "isas": list(status.isas),
        "shares_threads": status.shares_threads,
        "reason": status.reason,
    }


def _operations() -> dict[str, dict[str, dict[str, str | None]]]:
    """For each operation and kind of device: what runs in the mode "auto", and why not better."""
    import torch

    from ladder_kernels import native, ops

    status = native.status()
    without_native = None if status.available else status.reason
    without_triton = None
    if importlib.util.find_spec("triton") is None:
        without_triton = "triton is not installed"
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        if not module.ispkg:
            continue
        found[module.name] = {
            "cpu": _backend(module.name, "cpu", "cpu", without_native),
            "gpu": _backend(module.name, "gpu", "triton", without_triton)
            if torch.cuda.is_available()
            else {"backend": None, "reason": "no GPU"},
        }
    return found


def _backend(op: str, file: str, name: str, unavailable: str | None) -> dict[str, str | None]:
    reason = unavailable
    if importlib.util.find_spec(f"ladder_kernels.ops.{op}.{file}") is None:
        kind = "native" if file == "cpu" else "Triton"
        reason = f"this release has no {kind} kernel for it"
    return {"backend": name if reason is None else "reference", "reason": reason}


def _show(found: dict[str, Any]) -> None:
    cpu, threads, memory, gpus, native = (
        found[name] for name in ("cpu", "threads", "memory", "gpus", "native")
    )
    table(
        ("versions", ""),
        [(name, version or "not installed") for name, version in found["versions"].items()],
    )
    print()
    pool = "PyTorch's threads" if native["shares_threads"] else "threads of its own"
    library = (
        f"version {native['version']}, uses {native['isa']} and {pool}, "
        f"has {_joined(native['isas'])}"
    )
    rows = [
        ("CPU", cpu["name"]),
        ("CPU features", _joined(cpu["features"])),
        ("torch's CPU kernels", cpu["torch"]),
        ("native library", library if native["available"] else f"none: {native['reason']}"),
        (
            "threads",
            f"{threads['torch']} (and {threads['torch_interop']} between operations), on "
            f"{threads['cpus_allowed'] or threads['cpus']} of {threads['cpus']} CPUs",
        ),
        ("memory", f"{memory['available'] / 1e9:.1f} GB free of {memory['total'] / 1e9:.1f} GB"),
    ]
    if gpus["reason"]:
        rows.append(("GPU", f"none: {gpus['reason']}"))
    rows += [
        (
            f"GPU {index}",
            f"{gpu['name']} ({gpu['architecture']}, {gpu['memory'] / 1e9:.1f} GB, "
            f"{gpu['processors']} processors, {gpus['built_for']})",
        )
        for index, gpu in enumerate(gpus["devices"])
    ]
    rows += [(name, value) for name, value in found["environment"].items()]
    table(("machine", ""), rows)
    print()
    table(
        ("operation", "on a CPU", "on a GPU"),
        [
            (name, _described(places["cpu"]), _described(places["gpu"]))
            for name, places in found["operations"].items()
        ],
    )


def _joined(names: list[str]) -> str:
    return ", ".join(names) or "none known"


def _described(choice: dict[str, str | None]) -> str:
    if choice["backend"] is None:
        return choice["reason"] or ""
    return choice["backend"] + (f" ({choice['reason']})" if choice["reason"] else "")
