"""The gated half of a SwiGLU MLP with frozen NF4 weights in whole numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import _checks, _nf4_args
from ladder_kernels.ops._dispatch import call, run
from ladder_kernels.ops._numeric import flatten_rows
from ladder_kernels.ops.nf4_linear_int8 import check_no_gradient, check_whole_blocks

__all__ = ["nf4_swiglu_int8"]

_OP = "nf4_swiglu_int8"


def nf4_swiglu_int8(x: Tensor, w_gate: NF4Weight, w_up: NF4Weight) -> Tensor:
    """Compute about ``silu(x @ Wg^T) * (x @ Wu^T)`` in whole numbers, neither product in memory.

    Both products are those of :func:`nf4_linear_int8`, of the same rounded x. For passes that carry
    no gradient. Under autocast ``x`` is cast to its dtype.

    Args:
        x: ``[..., K]``, float16, bfloat16, float32 or float64.
        w_gate: ``[N, K]``; ``K`` must be a multiple of its blocksize.
        w_up: ``[N, K]``, of the same blocksize.

    Returns:
        ``[..., N]`` in x's dtype, without gradient.

    Raises:
        ConfigError: a shape, dtype, blocksize or device does not fit, or x requires a gradient.
        BackendError: a backend forced by name cannot run this call.
    """
    x = _nf4_args.checked_gated_input(_OP, x, w_gate, w_up)
    if w_up.blocksize != w_gate.blocksize:
        raise _checks.refuse(
            _OP,
            "w_up",
            f"has blocksize {w_up.blocksize}",
            f"it must be {w_gate.blocksize}, as w_gate",
        )
    check_whole_blocks(_OP, "w_gate", w_gate)
    check_no_gradient(_OP, x=x)
    return call(_swiglu, x, *_nf4_args.flatten(w_gate), *_nf4_args.flatten(w_up))


_WEIGHTS = f"{_nf4_args.schema('gate_')}, {_nf4_args.schema('up_')}"


@torch.library.custom_op(
    "ladder_kernels::nf4_swiglu_int8", mutates_args=(), schema=f"(Tensor x, {_WEIGHTS}) -> Tensor"
)
def _swiglu(x: Tensor, *args: Any) -> Tensor:
    w_gate = _nf4_args.rebuild(args[: _nf4_args.COUNT], x.dtype)
    w_up = _nf4_args.rebuild(args[_nf4_args.COUNT :], x.dtype)
    out = run(_OP, "nf4_swiglu_int8", flatten_rows(x), w_gate, w_up)
    return out.view(*x.shape[:-1], w_gate.shape[0])


@_swiglu.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    shape = args[_nf4_args.COUNT - 2]
    return x.new_empty((*x.shape[:-1], shape[0]))
