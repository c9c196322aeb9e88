"""Short pieces of PTX, run for one warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ladder_kernels.audit.ptx import Kernel, execute

_REGISTERS = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}


def _kernel(body: str, parameters: int, declarations: str = "") -> Kernel:
    names = ", ".join(f".param .u64 p{index}" for index in range(parameters))
    return Kernel.parse(
        f"""
        {declarations}
        .visible .entry piece({names})
        {{
        .reg .b16 %h<20>; .reg .b32 %r<20>; .reg .b64 %d<20>; .reg .pred %p<9>;
        .reg .b64 %a<20>; .reg .b32 %t;
        mov.u32 %t, %tid.x;
        {body}
        ret;
        }}
        """
    )


@pytest.fixture(scope="session")
def piece() -> Callable[..., Kernel]:
    """``piece(body, parameters, declarations)``: a kernel around some instructions.

    Registers are %h (16 bits), %r (32), %d (64), %p and %a (64, for addresses); %t is the thread.
    """
    return _kernel


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., np.ndarray]:
    """``evaluate(body, *inputs, bits=32)``: what each thread of a warp has in register 9.

    Inputs are unsigned arrays of 32; the first is in register 0 of its width, and so on.
    """

    def run(body: str, *inputs: np.ndarray, bits: int = 32) -> np.ndarray:
        lines = []
        for index, values in enumerate(inputs):
            width = 8 * values.itemsize
            lines += [
                f"ld.param.b64 %a{index}, [p{index}];",
                f"mad.wide.u32 %a{index}, %t, {width // 8}, %a{index};",
                f"ld.global.b{width} {_REGISTERS[width]}{index}, [%a{index}];",
            ]
        last = len(inputs)
        lines += [
            f"ld.param.b64 %a{last}, [p{last}];",
            f"mad.wide.u32 %a{last}, %t, {bits // 8}, %a{last};",
            body,
            f"st.global.b{bits} [%a{last}], {_REGISTERS[bits]}9;",
        ]
        result = np.zeros(32, f"u{bits // 8}")
        arguments: list[Any] = [*inputs, result]
        kernel = _kernel("\n".join(lines), len(arguments))
        execute(kernel, arguments, (1,), warps=1, shared_bytes=0)
        return result

    return run
