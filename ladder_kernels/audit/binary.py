"""From a kernel's launch to machine code, and what that says: registers, spills, instructions.

Triton compiles for any of its targets without a GPU. For NVIDIA its wheel brings ``cuobjdump`` and
``nvdisasm``; AMD's assembly is text with the same facts in comments and directives.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladder_kernels.audit.targets import Target
from ladder_kernels.errors import BackendError

__all__ = ["Binary", "Instructions", "compile_kernel", "read_amd", "read_nvidia"]

_SECONDS = 120
# What an instruction is, by how its name begins; the first that fits counts.
_NVIDIA_MATRIX = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
_AMD_MATRIX = ("v_mfma", "v_wmma", "v_swmmac", "v_smfmac")
_NVIDIA_CLASSES = (
    ("matrix", _NVIDIA_MATRIX),
    ("local", ("LDL", "STL")),
    ("global", ("LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG", "ATOMG", "RED")),
    ("shared", ("LDS", "STS", "LDSM", "STSM", "ATOMS")),
    ("shuffle", ("SHFL",)),
    ("barrier", ("BAR", "SYNCS", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "UTCBAR")),
    ("branch", ("BRA", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BREAK")),
)  # fmt: skip
_AMD_CLASSES = (
    ("matrix", _AMD_MATRIX),
    ("local", ("scratch_", "buffer_store_dword_spill")),
    ("global", ("global_", "buffer_", "flat_")),
    ("shared", ("ds_",)),
    ("shuffle", ("v_permlane", "v_readlane", "v_writelane", "v_mov_b32_dpp")),
    ("barrier", ("s_barrier", "s_waitcnt", "s_wait_")),
    ("branch", ("s_cbranch", "s_branch", "s_endpgm", "s_setpc")),
)


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Instructions of a stretch of code.

    Attributes:
        total: How many.
        classes: How many of each: "matrix", "global", "shared", "local" (spills), "shuffle",
            "barrier", "branch", "other".
        names: How many of each name, with its modifiers.
    """

    total: int
    classes: Mapping[str, int]
    names: Mapping[str, int]

    @property
    def matrix(self) -> int:
        """Those that multiply matrices."""
        return self.classes.get("matrix", 0)

    @property
    def matrix_kinds(self) -> Mapping[str, int]:
        """How many of each name multiply matrices."""
        return {
            name: count
            for name, count in self.names.items()
            if _is(name.split(".")[0], _NVIDIA_MATRIX if name.isupper() else _AMD_MATRIX)
        }

    @property
    def load_bits(self) -> Mapping[int, int]:
        """How many global loads there are of each width, in bits of a thread; widest first."""
        found: Counter[int] = Counter()
        for name, count in self.names.items():
            bits = _load_bits(name)
            if bits:
                found[bits] += count
        return dict(sorted(found.items(), reverse=True))


@dataclass(frozen=True, kw_only=True)
class Binary:
    """What a compiled kernel needs.

    Attributes:
        registers: 32-bit registers of a thread.
        spilled: Instructions that move registers to and from local memory, or (AMD) spilled ones.
        stack: Bytes of local memory of a thread.
        shared: Bytes of shared memory of a program.
        whole: All instructions.
        loop: Those of the innermost loop that does the work: the one with the most matrix
            instructions, else the longest; ``None`` if there is no loop.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    whole: Instructions
    loop: Instructions | None

    def resident_warps(self, target: Target, warps: int) -> int:
        """Warps of this kernel, of so many a program, that fit a multiprocessor at once."""
        # Registers are given to a warp in portions of eight for each of its threads.
        of_a_warp = -(-self.registers // 8) * 8 * target.warp
        programs = [target.most_warps // warps, target.registers // (of_a_warp * warps)]
        if self.shared:
            programs.append(target.shared_size // self.shared)
        return min(programs) * warps


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: Target,
    *,
    attributes: Mapping[tuple[int, ...], Any],
    options: Mapping[str, Any],
) -> Binary:
    """Compile a kernel for a target and read the result.

    Args:
        kernel: A ``@triton.jit`` function.
        signature: Types of its arguments by name, in order; ``"constexpr"`` for constants.
        constants: Values of those.
        target: What for.
        attributes: What is known of arguments, by their place, as Triton writes it.
        options: ``num_warps``, ``num_stages``.

    Raises:
        BackendError: It does not compile, or the machine code cannot be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target.vendor == "nvidia":
        machine = GPUTarget("cuda", int(target.name.removeprefix("sm_")), target.warp)
    else:
        machine = GPUTarget("hip", target.name, target.warp)
    source = ASTSource(kernel, dict(signature), dict(constants), dict(attributes))
    try:
        compiled: Any = triton.compile(source, target=machine, options=dict(options))
    except Exception as error:  # whatever a compiler raises is its word on this kernel
        raise BackendError(
            f"{kernel.__name__} for {target.name}: it does not compile ({error})"
        ) from error
    shared = compiled.metadata.shared
    if target.vendor == "amd":
        return read_amd(compiled.asm["amdgcn"], shared=shared)
    return read_nvidia(compiled.asm["cubin"], shared=shared)


def read_nvidia(cubin: bytes, *, shared: int) -> Binary:
    """Read a cubin with one kernel.

    Args:
        cubin: The file's bytes.
        shared: Bytes of shared memory that a launch asks for.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        code = _tool("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise BackendError("cuobjdump: found no register count in what it says of a kernel")
    lines = list(_nvidia_lines(code))
    whole = _count([name for name, _ in lines if name], _NVIDIA_CLASSES)
    return Binary(
        registers=int(found[1]),
        spilled=whole.classes.get("local", 0),
        stack=int(found[2]),
        shared=shared,
        whole=whole,
        loop=_loop(lines, _NVIDIA_CLASSES),
    )


def read_amd(assembly: str, *, shared: int) -> Binary:
    """Read AMD's assembly of one kernel; arguments as of :func:`read_nvidia`."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise BackendError(f"AMD's assembly: found no '.{key}'")
        return int(found[1])

    lines = list(_amd_lines(assembly))
    return Binary(
        registers=number("vgpr_count"),
        spilled=number("vgpr_spill_count") + number("sgpr_spill_count"),
        stack=number("private_segment_fixed_size"),
        shared=shared,
        whole=_count([name for name, _ in lines if name], _AMD_CLASSES),
        loop=_loop(lines, _AMD_CLASSES),
    )


def _tool(name: str, *arguments: Any) -> str:
    import triton.backends.nvidia

    tool = Path(str(triton.backends.nvidia.__file__)).parent / "bin" / name
    done = subprocess.run(
        [tool, *arguments], capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    if done.returncode:
        raise BackendError(f"{name}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


Line = tuple[str, str]
"""An instruction's name and the label that it may go to; or "" and a label that stands here."""

_NVIDIA_LINE = re.compile(
    r"/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9]*(?:\.[A-Za-z0-9_]+)*)(.*)"
)
_AMD_LINE = re.compile(r"\s+([a-z][a-z0-9]*_[a-z0-9_]+)\b(.*)")


def _nvidia_lines(code: str) -> Iterator[Line]:
    for line in code.splitlines():
        label = re.match(r"(\.L[\w$]+):", line)
        if label is not None:
            yield "", label[1]
            continue
        found = _NVIDIA_LINE.search(line)
        if found is not None and found[1] != "NOP":
            goal = re.search(r"`\((\.L[\w$]+)\)", found[2]) if found[1].startswith("BRA") else None
            yield found[1], goal[1] if goal else ""


def _amd_lines(assembly: str) -> Iterator[Line]:
    for line in assembly.partition("s_endpgm\n\t.section")[0].splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label is not None:
            yield "", label[1]
            continue
        found = _AMD_LINE.match(line)
        if found is not None and found[1] != "s_nop":
            goal = re.match(r"\s+(\.LBB\w+)", found[2]) if "branch" in found[1] else None
            yield found[1], goal[1] if goal else ""


def _loop(lines: Sequence[Line], classes: Any) -> Instructions | None:
    """The innermost loop with the most matrix instructions, or the longest without any."""
    standing = {label: place for place, (name, label) in enumerate(lines) if not name}
    loops = [
        (standing[goal], place + 1)
        for place, (name, goal) in enumerate(lines)
        # A program's end is a jump to itself: that is no loop.
        if name and standing.get(goal, place) < place - 1
    ]
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    counted = [
        _count([name for name, _ in lines[start:end] if name], classes) for start, end in inner
    ]
    return max(counted, key=lambda each: (each.matrix, each.total), default=None)


def _count(names: Sequence[str], classes: Any) -> Instructions:
    kinds: Counter[str] = Counter()
    for name in names:
        base = name.split(".")[0]
        kinds[next((kind for kind, known in classes if _is(base, known)), "other")] += 1
    return Instructions(total=len(names), classes=dict(kinds), names=dict(Counter(names)))


_AMD_BITS = (
    (128, "x4|b128"),
    (96, "x3|b96"),
    (64, "x2|b64"),
    (16, "short|[ui]16|b16"),
    (8, "byte|[ui]8"),
    (32, "dword|b32"),
)


def _load_bits(name: str) -> int:
    """Bits that an instruction loads from global memory to each thread; 0 if it does not."""
    if name.startswith(("LDG.", "LDGSTS.")):
        width = re.search(r"\.(?:[US](8|16)|(64|128|256))(?:\.|$)", name)
        return int(width[1] or width[2]) if width else 32
    found = re.match(r"(?:global|buffer|flat)_load_(\w+)", name)
    if found is None:
        return 0
    return next(bits for bits, pattern in _AMD_BITS if re.search(pattern, found[1]))


def _is(base: str, known: Sequence[str]) -> bool:
    # NVIDIA's names are whole words, AMD's are beginnings.
    return base in known if base.isupper() else base.startswith(tuple(known))
