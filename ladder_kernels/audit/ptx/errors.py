"""What can go wrong while PTX runs here."""

from __future__ import annotations

from ladder_kernels.errors import LadderKernelsError

__all__ = ["BarrierError", "MemoryAccessError", "PTXError", "UnsupportedInstructionError"]


class PTXError(LadderKernelsError, RuntimeError):
    """A kernel did what it must not do, or cannot be run.

    Attributes:
        kernel: The kernel's name, once it is known.
        source: File and line of the kernel's source, as the compiler noted them.
        instruction: The instruction that failed.
        argument: The kernel's argument whose memory was touched, if any.
        offset: The byte of that argument, or of shared memory.
    """

    def __init__(
        self, message: str, *, argument: str | None = None, offset: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.argument = argument
        self.offset = offset
        self.kernel: str | None = None
        self.source: str | None = None
        self.instruction: str | None = None

    def locate(self, kernel: str, source: str, instruction: str) -> None:
        """Say where it happened; the first place that is named stays."""
        if self.instruction is None:
            self.kernel, self.source, self.instruction = kernel, source, instruction

    def __str__(self) -> str:
        if self.instruction is None:
            return self.message
        source = self.source or "an unknown line"
        return f"{self.kernel}: {self.message}, at {source}: {self.instruction}"


class UnsupportedInstructionError(PTXError):
    """An instruction, or a form of one, that is not modelled."""


class MemoryAccessError(PTXError):
    """An access out of bounds, misaligned, or to memory that may not be written."""


class BarrierError(PTXError):
    """Threads of one block do not meet at the same barrier."""
