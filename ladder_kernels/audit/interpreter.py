"""The library's Triton kernels in Triton's interpreter: their numerics on a CPU, at any shape.

The interpreter runs a kernel's Python with numpy. It is quick and finds wrong masks, indices and
formulas. It knows nothing of what a compiler does, and it miscomputes bfloat16 (arithmetic in that
type and ``tl.dot`` of it; stores to it are cut, not rounded): what kernels do in bfloat16 is shown
by :mod:`ladder_kernels.audit.ptx`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ladder_kernels.backend import use_backend
from ladder_kernels.launch import on_host

__all__ = ["interpreting"]


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it, operations on CPU tensors run their Triton kernels in the interpreter.

    Also any other ``@triton.jit`` kernel that is launched on CPU tensors. Not for several threads
    at once.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **options)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        # One jitted function calls another: a part of the same kernel. Triton's own call would
        # leave its language patched, and nothing could be compiled afterwards.
        scope = _patch_lang(self.fn)
        try:
            return InterpretedFunction(self.fn).rewrite()(*args, **options)
        finally:
            scope.restore()

    before = JITFunction.run, JITFunction.__call__
    JITFunction.run, JITFunction.__call__ = run, call
    try:
        with on_host("interpreter"), use_backend("triton"):
            yield
    finally:
        JITFunction.run, JITFunction.__call__ = before
