"""What the audit calls: every Triton launcher, at the shapes of a 7B model and 2K tokens.

A case calls a launcher with tensors of the device "meta". What each kernel does, in matrix
operations and turns of its inner loop, is said here once for all launches of it; a kernel without
an entry is one that the audit does not know, and the gate says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ladder_kernels.audit.launches import Launch
from ladder_kernels.audit.model import Work
from ladder_kernels.nf4 import NF4Weight

__all__ = ["Case", "cases", "work_of"]

# Qwen2.5-7B: hidden size, width inside the MLP, keys of all heads, vocabulary, heads and their
# size; and its ladder at a reduction of 16.
_D, _INNER, _KEYS, _VOCABULARY = 3584, 18944, 512, 152064
_HEADS, _KEY_HEADS, _HEAD = 28, 4, 128
_NARROW = _D // 16
_NARROW_INNER = _INNER // 16
_TOKENS, _MANY_TOKENS = 2048, 8192
_BLOCKSIZE = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: Op, pass and shape.
        call: Calls it; its launches are what is audited.
    """

    name: str
    call: Callable[[], Any]


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _nf4(rows: int, columns: int) -> NF4Weight:
    return NF4Weight.empty((rows, columns), blocksize=_BLOCKSIZE, device="meta")


def cases() -> Iterator[Case]:
    """Every case. Needs Triton."""
    yield from _nf4_cases()
    yield from _int8_cases()
    yield from _rung_cases()
    yield from _side_cases()
    yield from _loss_cases()
    yield from _rowwise_cases()


def _call(module: Any, function: str, *args: Any) -> None:
    """Call a launcher, unless it says that it cannot run there."""
    if module.unsupported(*args) is None:
        getattr(module, function)(*args)


def _nf4_cases() -> Iterator[Case]:
    from ladder_kernels.nf4 import gpu as nf4
    from ladder_kernels.ops.nf4_linear import gpu as linear
    from ladder_kernels.ops.nf4_swiglu import gpu as swiglu

    for tokens in (1, 16, 128, _TOKENS):
        x, inner = _tensor(tokens, _D), _tensor(tokens, _INNER)
        yield Case(
            name=f"nf4_linear q M={tokens}",
            call=lambda x=x: linear.nf4_linear(x, _nf4(_D, _D), _tensor(_D), x),
        )
        yield Case(
            name=f"nf4_linear k M={tokens}",
            call=lambda x=x: linear.nf4_linear(x, _nf4(_KEYS, _D), _tensor(_KEYS)),
        )
        yield Case(
            name=f"nf4_linear down M={tokens}",
            call=lambda x=x, inner=inner: linear.nf4_linear(inner, _nf4(_D, _INNER), None, x),
        )
        yield Case(
            name=f"nf4_linear_transposed down M={tokens}",
            call=lambda x=x: linear.nf4_linear_transposed(x, _nf4(_D, _INNER)),
        )
        yield Case(
            name=f"nf4_swiglu M={tokens}",
            call=lambda x=x: swiglu.nf4_swiglu(x, _nf4(_INNER, _D), _nf4(_INNER, _D)),
        )
    # More tokens than any target fuses this for.
    many = _tensor(_MANY_TOKENS, _D)
    yield Case(
        name=f"nf4_swiglu M={_MANY_TOKENS}",
        call=lambda: swiglu.nf4_swiglu(many, _nf4(_INNER, _D), _nf4(_INNER, _D)),
    )
    yield Case(
        name=f"nf4_swiglu_backward M={_TOKENS}",
        call=lambda: swiglu.nf4_swiglu_backward(
            _tensor(_TOKENS, _INNER), _tensor(_TOKENS, _D), _nf4(_INNER, _D), _nf4(_INNER, _D)
        ),
    )
    yield Case(
        name="nf4 quantize 18944 x 3584",
        call=lambda: nf4.pack_blocks(_tensor(_INNER, _D), _BLOCKSIZE),
    )
    yield Case(
        name="nf4 dequantize 18944 x 3584",
        call=lambda: nf4.dequantize(_nf4(_INNER, _D), 0, _INNER * _D, torch.bfloat16),
    )


def _int8_cases() -> Iterator[Case]:
    from ladder_kernels.ops.nf4_linear_int8 import gpu as linear
    from ladder_kernels.ops.nf4_swiglu_int8 import gpu as swiglu

    for tokens in (1, 16, 128, _TOKENS):
        x, inner = _tensor(tokens, _D), _tensor(tokens, _INNER)
        yield Case(
            name=f"nf4_linear_int8 q M={tokens}",
            call=lambda x=x: _call(linear, "nf4_linear_int8", x, _nf4(_D, _D), _tensor(_D), x),
        )
        yield Case(
            name=f"nf4_linear_int8 down M={tokens}",
            call=lambda x=x, inner=inner: _call(
                linear, "nf4_linear_int8", inner, _nf4(_D, _INNER), None, x
            ),
        )
        yield Case(
            name=f"nf4_swiglu_int8 M={tokens}",
            call=lambda x=x: _call(
                swiglu, "nf4_swiglu_int8", x, _nf4(_INNER, _D), _nf4(_INNER, _D)
            ),
        )


def _rung_cases() -> Iterator[Case]:
    from ladder_kernels.ops.rung_merge import gpu as merge

    side, tap, down = _tensor(_TOKENS, _NARROW), _tensor(_TOKENS, _D), _tensor(_NARROW, _D)
    for mode, gate in (("sum", None), ("gate", _tensor(1)), ("channel", _tensor(_NARROW))):
        yield Case(
            name=f"rung_merge {mode}, two taps",
            call=lambda mode=mode, gate=gate: _call(
                merge, "rung_merge", side, [tap, tap], [down, down], gate, mode, 1e-6
            ),
        )
        yield Case(
            name=f"rung_merge_backward {mode}, two taps",
            call=lambda mode=mode, gate=gate: _call(
                merge, "rung_merge_backward", side, side, [tap, tap], [down, down], gate, mode,
                1e-6, True, [True, True], gate is not None,
            ),
        )  # fmt: skip


def _side_cases() -> Iterator[Case]:
    from ladder_kernels.ops.side_mlp import gpu as mlp

    # Streams beside smaller models too: other widths have other tiles.
    for d, m in ((36, 96), (72, 192), (_NARROW, _NARROW_INNER)):
        u, inner = _tensor(_TOKENS, d), _tensor(m, d)
        given = (u, _tensor(d), inner, inner, _tensor(d, m), 1e-6)
        yield Case(name=f"side_mlp d={d}", call=lambda given=given: _call(mlp, "side_mlp", *given))
        yield Case(
            name=f"side_mlp_backward d={d}",
            call=lambda u=u, given=given: _call(
                mlp, "side_mlp_backward", u, *given, True, True, True
            ),
        )


def _loss_cases() -> Iterator[Case]:
    from ladder_kernels.ops.linear_cross_entropy import gpu as loss

    hidden, labels = _tensor(_TOKENS, _D), _tensor(_TOKENS, dtype=torch.int64)
    for name, head in (("dense", _tensor(_VOCABULARY, _D)), ("NF4", _nf4(_VOCABULARY, _D))):
        yield Case(
            name=f"linear_cross_entropy, {name} head",
            call=lambda head=head: _call(
                loss, "linear_cross_entropy", hidden, head, labels, -100, None, 1.0, True
            ),
        )
    each = _tensor(_TOKENS, dtype=torch.float32)
    yield Case(
        name="linear_cross_entropy, gradient of the head",
        call=lambda: _call(
            loss, "head_grad", each, hidden, _tensor(_VOCABULARY, _D), labels, each, -100, None, 1.0
        ),
    )


def _rowwise_cases() -> Iterator[Case]:
    from ladder_kernels.ops.rms_norm import gpu as norm
    from ladder_kernels.ops.rotary import gpu as rotary

    x, weight = _tensor(_TOKENS, _D), _tensor(_D)
    yield Case(name="rms_norm", call=lambda: norm.rms_norm(x, weight, 1e-6))
    yield Case(name="rms_norm with residual", call=lambda: norm.add_rms_norm(x, x, weight, 1e-6))
    yield Case(
        name="rms_norm_backward", call=lambda: norm.rms_norm_backward(x, x, weight, 1e-6, True)
    )
    q, k = _tensor(1, _TOKENS, _HEADS, _HEAD), _tensor(1, _TOKENS, _KEY_HEADS, _HEAD)
    angle = _tensor(1, _TOKENS, 1, _HEAD // 2)
    yield Case(name="rotary", call=lambda: rotary.rotary_(q, k, angle, angle))


# Work -----------------------------------------------------------------------------------------


def _turns(length: str, *steps: str) -> Callable[[Launch], float]:
    """Turns of a loop along a size, in steps of a product of constants."""

    def turns(launch: Launch) -> float:
        step = math.prod(_number(launch, name) for name in steps)
        return max(1.0, math.ceil(_number(launch, length) / step))

    return turns


def _number(launch: Launch, name: str) -> int:
    value = launch.values.get(name, launch.constants.get(name))
    return int(value)  # type: ignore[arg-type]


def _product(*sizes: str, factor: int = 2) -> Callable[[Launch], float]:
    """Operations of a matrix product of these three sizes."""
    return lambda launch: factor * math.prod(_number(launch, name) for name in sizes)


def _nothing(launch: Launch) -> float:
    return 0.0


def _once(launch: Launch) -> float:
    return 1.0


@dataclass(frozen=True)
class _Kernel:
    """What a kernel does, from a launch of it: matrix operations, and turns of its loop."""

    operations: Callable[[Launch], float] = _nothing
    turns: Callable[[Launch], float] = _once
    int8: bool = False


_DECODED = _product("M", "N", "K")
_CHUNK = _product("block", "rows", "D")
_KERNELS = {
    "_nf4_linear_forward_kernel": _Kernel(_DECODED, _turns("share", "BLOCK_K", "PARTS")),
    "_nf4_linear_transposed_kernel": _Kernel(_DECODED, _turns("share", "BLOCK_N")),
    "_nf4_linear_rows_kernel": _Kernel(turns=_turns("K", "BLOCK_K")),
    "_nf4_linear_sum_kernel": _Kernel(turns=lambda launch: _number(launch, "splits")),
    "_nf4_swiglu_forward_kernel": _Kernel(
        _product("M", "N", "K", factor=4), _turns("K", "BLOCK_K", "PARTS")
    ),
    "_nf4_swiglu_join_kernel": _Kernel(),
    "_nf4_swiglu_backward_kernel": _Kernel(),
    "_nf4_linear_int8_quantize_kernel": _Kernel(),
    "_nf4_linear_int8_forward_kernel": _Kernel(_DECODED, _turns("share", "BLOCK_K"), int8=True),
    "_nf4_swiglu_int8_forward_kernel": _Kernel(
        _product("M", "N", "K", factor=4), _turns("K", "BLOCK_K"), int8=True
    ),
    "_nf4_dequantize_kernel": _Kernel(),
    "_nf4_quantize_kernel": _Kernel(),
    "_rung_merge_forward_kernel": _Kernel(_product("T", "d", "D"), _turns("D", "WIDE")),
    "_rung_merge_scale_kernel": _Kernel(turns=_turns("D", "BLOCK")),
    # Twice: the scaled gradient is split into two numbers.
    "_rung_merge_product_kernel": _Kernel(
        _product("T", "d", "D", factor=4), _turns("share", "TOKENS")
    ),
    "_rung_merge_down_kernel": _Kernel(
        turns=lambda launch: _turns("D", "BLOCK")(launch) * _number(launch, "splits")
    ),
    "_rung_merge_side_kernel": _Kernel(),
    # Products of blocks that are wider than the stream, where its width is no power of two.
    "_side_mlp_forward_kernel": _Kernel(
        _product("T", "m", "WIDTH", factor=6), _turns("m", "INNER")
    ),
    "_side_mlp_rows_kernel": _Kernel(_product("T", "m", "WIDTH", factor=10), _turns("m", "INNER")),
    "_side_mlp_matrices_kernel": _Kernel(
        _product("T", "m", "WIDTH", factor=12), _turns("share", "TOKENS")
    ),
    "_side_mlp_sum_kernel": _Kernel(turns=lambda launch: _number(launch, "splits")),
    "_linear_cross_entropy_logits_kernel": _Kernel(_CHUNK, _turns("D", "INNER")),
    "_linear_cross_entropy_combine_kernel": _Kernel(),
    "_linear_cross_entropy_expected_kernel": _Kernel(_CHUNK, _turns("rows", "INNER")),
    "_linear_cross_entropy_hidden_kernel": _Kernel(turns=_turns("D", "BLOCK")),
    "_linear_cross_entropy_change_kernel": _Kernel(
        lambda launch: 2 * _TOKENS * _number(launch, "rows") * _number(launch, "D"),
        _turns("D", "INNER"),
    ),
    "_linear_cross_entropy_head_kernel": _Kernel(
        lambda launch: 2 * _TOKENS * _number(launch, "rows") * _number(launch, "D"),
        lambda launch: math.ceil(_TOKENS / _number(launch, "INNER")),
    ),
    "_rms_norm_forward_kernel": _Kernel(),
    "_rms_norm_backward_kernel": _Kernel(
        turns=lambda launch: math.ceil(_number(launch, "rows") / launch.grid[0])
    ),
    "_rotary_turn_kernel": _Kernel(),
}


def work_of(launch: Launch) -> Work | None:
    """What a launch does; ``None`` for a kernel that the audit does not know."""
    known = _KERNELS.get(launch.name)
    if known is None:
        return None
    tensors = [value for value in launch.values.values() if isinstance(value, torch.Tensor)]
    return Work(
        operations=known.operations(launch),
        moved=sum(tensor.nbytes for tensor in tensors),
        trips=known.turns(launch),
        int8=known.int8,
    )
