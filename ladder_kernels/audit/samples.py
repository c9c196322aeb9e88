"""What the executor runs of every kernel: the launches of the catalogue, a few programs of each.

A sample calls a launcher on small tensors in such a way that it launches the very code that it
launches at the shapes of :mod:`~ladder_kernels.audit.catalogue`: whole tiles, the configuration of
the large shape, and sizes that 16 divides where the large ones are. What is counted of a program
is then what every program of the large launch does, turns of its loop apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ladder_kernels.audit.catalogue import Case
from ladder_kernels.launch import host_target
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops.nf4_linear.configurations import Product, look_up, using

__all__ = ["samples"]

_BLOCKSIZE = 64
# The model of the catalogue, whose sizes choose configurations.
_D, _INNER, _KEYS = 3584, 18944, 512
_HEADS, _KEY_HEADS, _HEAD = 28, 4, 128
# Tokens of the calls that samples stand for, and the most that they take themselves.
_TOKENS = (1, 16, 128, 2048)
_FEW = 256
_MANY_TOKENS = 8192
# Rows of x that the gradient of a SwiGLU takes at a time.
_SLICE = 768


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def _nf4(rows: int, columns: int) -> NF4Weight:
    """Any bits are a weight; with double quantisation, scales of about 0.05."""
    weight = NF4Weight.empty((rows, columns), blocksize=_BLOCKSIZE)
    tensors = weight.tensors()
    for name in ("packed", "absmax"):
        tensors[name].random_(256)
    tensors["nested_absmax"].fill_(0.02)
    torch.linspace(-1, 1, 256, out=tensors["nested_code"])
    tensors["nested_offset"].fill_(0.05)
    return weight


def samples() -> Iterator[Case]:
    """Every sample. Needs Triton."""
    yield from _nf4_samples()
    yield from _int8_samples()
    yield from _rung_samples()
    yield from _side_samples()
    yield from _loss_samples()
    yield from _rowwise_samples()


def _sample(
    name: str,
    tokens: int,
    product: Product,
    numbers: int,
    call: Callable[[int], Any],
    *,
    unsupported: Callable[[torch.Tensor], str | None] | None = None,
) -> Case:
    """As a call with so many tokens and a weight of so many numbers runs, where it does."""

    def run() -> None:
        if unsupported is not None and unsupported(_randn(1, _BLOCKSIZE)) is not None:
            return
        row = look_up(host_target(), product, torch.bfloat16, tokens, numbers)
        with using(row.configuration):
            call(min(tokens, _FEW))

    return Case(name=f"{name} M={tokens}", call=run)


def _nf4_samples() -> Iterator[Case]:
    from ladder_kernels.nf4 import gpu as nf4
    from ladder_kernels.ops.nf4_linear import gpu as linear
    from ladder_kernels.ops.nf4_swiglu import gpu as swiglu

    for tokens in _TOKENS:
        yield _sample(
            "nf4_linear q", tokens, "forward", _D * _D,
            lambda M: linear.nf4_linear(
                _randn(M, 1024), _nf4(128, 1024), _randn(128), _randn(M, 128)
            ),
        )  # fmt: skip
        yield _sample(
            "nf4_linear k", tokens, "forward", _KEYS * _D,
            lambda M: linear.nf4_linear(_randn(M, 1024), _nf4(128, 1024), _randn(128)),
        )  # fmt: skip
        yield _sample(
            "nf4_linear down", tokens, "forward", _D * _INNER,
            lambda M: linear.nf4_linear(_randn(M, 1024), _nf4(128, 1024), None, _randn(M, 128)),
        )  # fmt: skip
        yield _sample(
            "nf4_linear_transposed down", tokens, "transposed", _D * _INNER,
            lambda M: linear.nf4_linear_transposed(_randn(M, 512), _nf4(512, 256)),
        )  # fmt: skip
    for tokens in (*_TOKENS, _MANY_TOKENS):
        yield _sample(
            "nf4_swiglu", tokens, "gated", _D * _INNER,
            lambda M: swiglu.nf4_swiglu(_randn(M, 512), _nf4(128, 512), _nf4(128, 512)),
        )  # fmt: skip
    yield _sample(
        "nf4_swiglu_backward", _TOKENS[-1], "gated", _D * _INNER,
        lambda M: swiglu.nf4_swiglu_backward(
            _randn(M, 128), _randn(M, 512), _nf4(128, 512), _nf4(128, 512)
        ),
    )  # fmt: skip
    # The products within it, for some rows of x at a time.
    yield _sample(
        "nf4_swiglu_backward, forward", _SLICE, "forward", _D * _INNER,
        lambda M: linear.nf4_linear(_randn(M, 512), _nf4(128, 512)),
    )  # fmt: skip
    for name, added in (("first", False), ("second", True)):
        yield _sample(
            f"nf4_swiglu_backward, {name} transposed", _SLICE, "transposed", _D * _INNER,
            lambda M, added=added: linear.nf4_linear_transposed(
                _randn(M, 512), _nf4(512, 256), _randn(M, 256) if added else None
            ),
        )  # fmt: skip
    yield Case(name="nf4 quantize", call=lambda: nf4.pack_blocks(_randn(64, 256), _BLOCKSIZE))
    yield Case(
        name="nf4 dequantize",
        call=lambda: nf4.dequantize(_nf4(64, 256), 0, 64 * 256, torch.bfloat16),
    )


def _int8_samples() -> Iterator[Case]:
    from ladder_kernels.ops.nf4_linear_int8 import gpu as linear
    from ladder_kernels.ops.nf4_swiglu_int8 import gpu as swiglu

    # Columns enough for a program's share of a row that is rounded, rows for one tile of a weight.
    K, N = 2304, 128
    for tokens in _TOKENS:
        yield _sample(
            "nf4_linear_int8 q", tokens, "int8", _D * _D,
            lambda M: linear.nf4_linear_int8(_randn(M, K), _nf4(N, K), _randn(N), _randn(M, N)),
            unsupported=linear.unsupported,
        )  # fmt: skip
        yield _sample(
            "nf4_linear_int8 down", tokens, "int8", _D * _INNER,
            lambda M: linear.nf4_linear_int8(_randn(M, K), _nf4(N, K), None, _randn(M, N)),
            unsupported=linear.unsupported,
        )  # fmt: skip
        yield _sample(
            "nf4_swiglu_int8", tokens, "gated_int8", _D * _INNER,
            lambda M: swiglu.nf4_swiglu_int8(_randn(M, K), _nf4(N, K), _nf4(N, K)),
            unsupported=swiglu.unsupported,
        )  # fmt: skip


def _supported(module: Any, function: str, *args: Any) -> None:
    """Call a launcher, unless it says that it cannot run there."""
    if module.unsupported(*args) is None:
        getattr(module, function)(*args)


def _rung_samples() -> Iterator[Case]:
    from ladder_kernels.ops.rung_merge import gpu as merge

    T, d, D = 128, 128, 256
    for mode, width in (("sum", 0), ("gate", 1), ("channel", d)):

        def operands(width: int = width) -> tuple[Any, ...]:
            taps, downs = ([_randn(n, D) for _ in range(2)] for n in (T, d))
            return _randn(T, d), taps, downs, _randn(width) if width else None

        def forward(mode: str = mode, operands: Callable[[], Any] = operands) -> None:
            _supported(merge, "rung_merge", *operands(), mode, 1e-6)

        def backward(mode: str = mode, operands: Callable[[], Any] = operands) -> None:
            side, taps, downs, gate = operands()
            wanted = True, [True, True], gate is not None
            _supported(
                merge, "rung_merge_backward", side, side, taps, downs, gate, mode, 1e-6, *wanted
            )

        yield Case(name=f"rung_merge {mode}, two taps", call=forward)
        yield Case(name=f"rung_merge_backward {mode}, two taps", call=backward)


def _side_samples() -> Iterator[Case]:
    from ladder_kernels.ops.side_mlp import gpu as mlp

    m = 64
    # Tokens of as many splits as the large call has: one, or some.
    for d, T in ((36, 128), (72, 128), (224, 64)):

        def operands(d: int = d, T: int = T) -> tuple[Any, ...]:
            gate, up, down = _randn(m, d) / 8, _randn(m, d) / 8, _randn(d, m) / 8
            return _randn(T, d), _randn(d), gate, up, down, 1e-6

        def forward(operands: Callable[[], Any] = operands) -> None:
            _supported(mlp, "side_mlp", *operands())

        def backward(operands: Callable[[], Any] = operands) -> None:
            given = operands()
            _supported(mlp, "side_mlp_backward", given[0], *given, True, True, True)

        yield Case(name=f"side_mlp d={d}", call=forward)
        yield Case(name=f"side_mlp_backward d={d}", call=backward)


def _loss_samples() -> Iterator[Case]:
    from ladder_kernels.ops.linear_cross_entropy import gpu as loss

    T, D = 128, 128
    # One whole chunk of a vocabulary.
    V = loss.VOCABULARY

    def labels() -> torch.Tensor:
        return torch.randint(V, (T,))

    for name, head in (("dense", _randn), ("NF4", _nf4)):
        yield Case(
            name=f"linear_cross_entropy, {name} head",
            call=lambda head=head: _supported(
                loss, "linear_cross_entropy", _randn(T, D), head(V, D), labels(), -100, None, 1.0,
                True,
            ),
        )  # fmt: skip
    each = torch.rand(T)
    yield Case(
        name="linear_cross_entropy, gradient of the head",
        call=lambda: _supported(
            loss, "head_grad", each, _randn(T, D), _randn(V, D), labels(), each, -100, None, 1.0
        ),
    )


def _rowwise_samples() -> Iterator[Case]:
    from ladder_kernels.ops.rms_norm import gpu as norm
    from ladder_kernels.ops.rotary import gpu as rotary

    rows = 16
    weight = _randn(_D)

    def x() -> torch.Tensor:
        return _randn(rows, _D)

    yield Case(name="rms_norm", call=lambda: norm.rms_norm(x(), weight, 1e-6))
    yield Case(
        name="rms_norm with residual", call=lambda: norm.add_rms_norm(x(), x(), weight, 1e-6)
    )
    yield Case(
        name="rms_norm_backward",
        call=lambda: norm.rms_norm_backward(x(), x(), weight, 1e-6, True),
    )
    yield Case(
        name="rotary",
        call=lambda: rotary.rotary_(
            _randn(1, rows, _HEADS, _HEAD), _randn(1, rows, _KEY_HEADS, _HEAD),
            _randn(1, rows, 1, _HEAD // 2), _randn(1, rows, 1, _HEAD // 2),
        ),
    )  # fmt: skip
