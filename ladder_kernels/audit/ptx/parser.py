"""PTX text to instructions with registers, labels and parameters resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ladder_kernels.audit.ptx.errors import PTXError, UnsupportedInstructionError
from ladder_kernels.audit.ptx.operands import (
    Address,
    FloatBits,
    Immediate,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from ladder_kernels.audit.ptx.types import TYPES, PTXType

__all__ = ["Instruction", "Parameter", "Program", "Variable", "parse"]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: The part before the first dot.
        modifiers: The parts after it.
        operands: Destination first, as written.
        guard: The predicate that it depends on.
        source: File and line of the kernel's source.
        text: As written.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    source: str
    text: str

    @property
    def types(self) -> tuple[PTXType, ...]:
        """The types among the modifiers, in order."""
        return tuple(TYPES[name] for name in self.modifiers if name in TYPES)

    @property
    def type(self) -> PTXType:
        """The last type among the modifiers, which is what the instruction works on."""
        types = self.types
        if not types:
            raise UnsupportedInstructionError(f"{self.opcode} without a type is not modelled")
        return types[-1]

    def has(self, *modifiers: str) -> bool:
        """Whether it carries any of these modifiers."""
        return any(name in self.modifiers for name in modifiers)

    def one_of(self, *modifiers: str) -> str:
        """The first of these that it carries.

        Raises:
            UnsupportedInstructionError: It carries none.
        """
        for name in self.modifiers:
            if name in modifiers:
                return name
        raise UnsupportedInstructionError(
            f"this form of {self.opcode} is not modelled; it must be one of {', '.join(modifiers)}"
        )


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: where it lies among the parameters' bytes."""

    name: str
    offset: int
    type: PTXType
    nbytes: int


@dataclass(frozen=True)
class Variable:
    """A named piece of a state space; ``space`` is "shared", "local", "global" or "const"."""

    name: str
    space: str
    offset: int


@dataclass
class Program:
    """A kernel as parsed.

    Attributes:
        name: The entry's name.
        parameters: In order.
        parameter_bytes: Bytes of all of them.
        block_threads: Threads of a block that it was compiled for, if it says so.
        register_bits: The width of every register; 1 is a predicate.
        instructions: In order.
        labels: The index of the instruction that follows each label.
        variables: Shared, local, global and constant variables by name.
        shared_bytes: Statically declared shared memory.
        local_bytes: Local memory of each thread.
        module_data: What the module's global variables hold.
    """

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    parameter_bytes: int = 0
    block_threads: int | None = None
    register_bits: list[int] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    shared_bytes: int = 0
    local_bytes: int = 0
    module_data: bytearray = field(default_factory=bytearray)


_VARIABLE = re.compile(
    r"^\s*(?:\.visible\s+|\.extern\s+|\.weak\s+)*\.(shared|global|const|local)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*\{([^}]*)\})?",
    re.MULTILINE,
)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+[^/]*(?://\s*(.*))?$")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_ADDRESS = re.compile(r"([%$\w.]+)\s*(?:\+\s*(-?\w+))?$")
_INTEGER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?$")


def parse(ptx: str, name: str | None = None) -> Program:
    """Parse one entry of a PTX module.

    Args:
        ptx: The module's text.
        name: The entry's name; the first if None.

    Raises:
        PTXError: The text has no such entry, or is malformed.
    """
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    pattern = re.escape(name) if name else r"[\w$]+"
    entry = re.search(rf"\.entry\s+({pattern})\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise PTXError(f"the PTX has no entry {name or ''}".rstrip())
    program = Program(entry.group(1))
    _parse_parameters(program, entry.group(2))
    opening = ptx.index("{", entry.end())
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx[entry.end() : opening])
    program.block_threads = int(threads.group(1)) if threads else None
    body = ptx[opening + 1 : _closing(ptx, opening)]
    _parse_variables(program, ptx[: entry.start()] + body)
    files = {number: path.rsplit("/", 1)[-1] for number, path in _FILE.findall(ptx)}
    _Body(program, files).parse(body)
    return program


def _closing(text: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise PTXError("the PTX ends inside a kernel")


def _parse_parameters(program: Program, text: str) -> None:
    end = 0
    for declaration in _split(text):
        words = declaration.split()
        array = re.match(r"(.+)\[(\d+)\]$", words[-1])
        kind = next(TYPES[word[1:]] for word in words if word[1:] in TYPES)
        count = int(array.group(2)) if array else 1
        # A pointer's .align speaks of what it points to; an array's of the parameter itself.
        align = int(words[words.index(".align") + 1]) if array and ".align" in words else 1
        align = max(align, kind.nbytes)
        offset = -(-end // align) * align
        parameter_name = array.group(1) if array else words[-1]
        program.parameters.append(Parameter(parameter_name, offset, kind, kind.nbytes * count))
        end = offset + kind.nbytes * count
    program.parameter_bytes = end


def _parse_variables(program: Program, text: str) -> None:
    dynamic = []
    ends = {"shared": 0, "local": 0, "global": 0, "const": 0}
    for match in _VARIABLE.finditer(text):
        space, align, kind, name, count, values = match.groups()
        if ".extern" in match.group() or count == "":
            dynamic.append((name, space))
            continue
        start = -(-ends[space] // int(align or 1)) * int(align or 1)
        program.variables[name] = Variable(name, space, start)
        ends[space] = start + TYPES[kind].nbytes * int(count or 1)
        if space == "global":
            _initialise(program, start, ends[space], TYPES[kind], values or "")
    program.shared_bytes = -(-ends["shared"] // 16) * 16
    program.local_bytes = ends["local"]
    for name, space in dynamic:
        start = program.shared_bytes if space == "shared" else 0
        program.variables[name] = Variable(name, space, start)


def _initialise(program: Program, start: int, end: int, kind: PTXType, values: str) -> None:
    """Add a module's variable to the bytes that it brings; what is not given is zero."""
    program.module_data.extend(bytes(end - len(program.module_data)))
    numbers = [piece.strip() for piece in values.split(",") if piece.strip()]
    if not all(re.fullmatch(r"-?\w+", number) and _INTEGER.match(number) for number in numbers):
        return
    mask = (1 << kind.bits) - 1
    for position, number in enumerate(numbers):
        raw = (int(number, 0) & mask).to_bytes(kind.nbytes, "little")
        first = start + position * kind.nbytes
        program.module_data[first : first + kind.nbytes] = raw


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside every bracket."""
    pieces, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            pieces.append(current.strip())
            current = ""
        else:
            current += character
    return [*pieces, current.strip()] if current.strip() else pieces


class _Body:
    """Parses a kernel's body into a program."""

    def __init__(self, program: Program, files: Mapping[str, str]) -> None:
        self.program = program
        self.files = files
        self.scopes: list[dict[str, int]] = [{}]
        self.source = ""

    def parse(self, body: str) -> None:
        pending = ""
        for line in body.split("\n"):
            if line.lstrip().startswith(".loc"):
                self._location(line)
                continue
            text = line.split("//", 1)[0].strip()
            if text and not text.startswith((".file", ".section")):
                pending = self._consume(f"{pending} {text}".strip())
        if pending:
            raise PTXError(f"the PTX ends inside a statement: {pending}")

    def _location(self, line: str) -> None:
        match = _LOCATION.search(line.strip())
        if match is None:
            return
        file, row, comment = match.groups()
        self.source = comment.strip() if comment else f"{self.files.get(file, file)}:{row}"

    def _consume(self, text: str) -> str:
        """Take every whole statement off the text; what is left is an unfinished one."""
        while text:
            label = re.match(r"([$\w.%]+):(?!:)\s*", text)
            if label:
                self.program.labels[label.group(1)] = len(self.program.instructions)
                text = text[label.end() :]
            elif text[0] == "{":
                self.scopes.append({})
                text = text[1:].lstrip()
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:].lstrip()
            elif ";" in text:
                statement, text = (piece.strip() for piece in text.split(";", 1))
                self._statement(statement)
            else:
                break
        return text

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text and not text.startswith((".pragma", ".local", ".shared", ".param")):
            self._instruction(text)

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        # Registers of 8 bits do not exist: PTX holds them in 16.
        bits = 1 if kind == ".pred" else max(TYPES[kind[1:]].bits, 16)
        for name in _split(names):
            numbered = re.match(r"(.+)<(\d+)>$", name)
            stem, count = (numbered.group(1), int(numbered.group(2))) if numbered else (name, 0)
            for declared in [f"{stem}{i}" for i in range(count)] if numbered else [name]:
                self.scopes[-1][declared] = len(self.program.register_bits)
                self.program.register_bits.append(bits)

    def _instruction(self, text: str) -> None:
        guard, rest = None, text
        guarded = re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", text, re.DOTALL)
        if guarded:
            index = self._register(guarded.group(2))
            if index is None:
                raise PTXError(f"undeclared register in {text}")
            guard = Register(index, negated=bool(guarded.group(1)))
            rest = guarded.group(3)
        head, *tail = rest.split(None, 1)
        opcode, *modifiers = head.split(".")
        operands = tuple(self._operand(piece) for piece in _split(tail[0])) if tail else ()
        self.program.instructions.append(
            Instruction(opcode, tuple(modifiers), operands, guard, self.source, text)
        )

    def _register(self, name: str) -> int | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def _operand(self, text: str) -> Operand:
        if text[0] in "{(":
            return Vector(tuple(self._operand(piece) for piece in _split(text[1:-1])))
        if text[0] == "[":
            return self._address(text)
        if "|" in text:
            first, second = (piece.strip() for piece in text.split("|"))
            return Pair(self._operand(first), self._operand(second))
        if text == "_":
            return Sink()
        negated = text[0] == "!"
        index = self._register(text[1:].strip() if negated else text)
        if index is not None:
            return Register(index, negated)
        return self._constant(text)

    @staticmethod
    def _constant(text: str) -> Operand:
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return FloatBits(int(text[2:], 16), 32)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return FloatBits(int(text[2:], 16), 64)
        integer = _INTEGER.match(text)
        if integer:
            return Immediate(int(integer.group(1), 0))
        return Special(text) if text[0] == "%" else Symbol(text)

    def _address(self, text: str) -> Operand:
        inner = text[1:-1].strip()
        match = _ADDRESS.match(inner)
        if match is None:
            # Tensor maps and their coordinates: kept as a name that nothing can resolve.
            return Symbol(inner)
        name, offset = match.group(1), int(match.group(2) or "0", 0)
        index = self._register(name)
        return Address(Symbol(name) if index is None else Register(index), offset)
