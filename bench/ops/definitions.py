"""What each operation is called with, what it is compared with, and what it must do at least.

An operation's function takes the sizes of a case and makes a :class:`Work`: inputs, our operation,
the plain PyTorch expression that says what is right, and rivals that compute the same. Rivals get
what they like best: a dense weight where they have no use for a packed one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ladder_kernels as lk
from bench.random_weights import fill_nf4
from bench.roofline import Ideal
from ladder_kernels import nf4, ops
from ladder_kernels.launch import missing
from ladder_kernels.nf4 import NF4Weight

__all__ = [
    "BITSANDBYTES",
    "DEFINITIONS",
    "DEQUANTISED",
    "EXACT",
    "LIGER",
    "NUMPY",
    "OURS",
    "RECOMPUTING",
    "TORCH",
    "Definition",
    "Fresh",
    "Sizes",
    "Work",
    "backends",
    "rivals",
]

BITSANDBYTES = "bitsandbytes"
DEQUANTISED = "torch on dequantised weights"
NUMPY = "NumPy on dequantised weights"
TORCH = "torch"
RECOMPUTING = "torch, recomputing"
"""PyTorch that keeps no more for its backward pass than ours does, by its checkpointing."""
LIGER = "Liger"
EXACT = "exact products"
"""Ours, of the same weights in floating point: what products in whole numbers are held against."""

OURS = ("triton", "cpu", "reference")
"""Our backends, the fastest first."""

MANY_ROWS = 64
"""Rows from which on NumPy is timed, too."""

_EPS = 1e-6
_BLOCK = 64
_MODULES = {"cpu": "cpu", "triton": "gpu"}
_FORMATS = ("nf4_quantize", "nf4_dequantize")
# Double quantisation: a byte for each block's scale, float32 for 256 of them.
_NF4_BYTES = 0.5 + (1 + 4 / 256) / _BLOCK
_PACKAGES = {BITSANDBYTES: "bitsandbytes", LIGER: "liger_kernel"}

Sizes = Mapping[str, int]
"""By the letters of the shapes, such as ``{"M": 2048, "N": 576, "K": 1536}``."""


def _as_made(made: Any) -> Any:
    return made


def _none(sizes: Sizes) -> float:
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """A case's tensors and what works on them.

    Every function takes ``inputs`` by name and returns tensors.

    Attributes:
        inputs: By name.
        ours: Our operation, on the backend in force.
        plain: The plain expression; in float64 for inputs in float64.
        rivals: By name.
        leaves: Inputs whose gradients the backward pass computes.
        tokens: Inputs with a row for each token. If there are any, results are verified at some
            tokens only, which are independent of each other.
        mean: Whether the result is a mean over tokens.
        plain_of_rivals: The plain expression of rivals, where they compute something else.
        same_bits: Whether our backends must agree with the reference by bits.
        numbers: Takes what the functions return to the tensors that are verified.
    """

    inputs: dict[str, Tensor]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    rivals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    mean: bool = False
    plain_of_rivals: Callable[..., Any] | None = None
    same_bits: bool = False
    numbers: Callable[[Any], Any] = _as_made


class Fresh:
    """Random tensors, the same ones in every run.

    Args:
        dtype: Of activations.
        device: Where they are.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        torch.manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Numbers of that standard deviation."""
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """A projection that keeps the size of what it projects."""
        return self.normal(rows, columns, scale=columns**-0.5)

    def nf4(self, rows: int, columns: int) -> NF4Weight:
        """The same in NF4, with double quantisation."""
        weight = NF4Weight.empty((rows, columns), dtype=self.dtype, device=self.device)
        fill_nf4(weight, None, scale=1.6 * columns**-0.5)
        return weight

    def below(self, most: int, count: int) -> Tensor:
        """Whole numbers."""
        return torch.randint(most, (count,), device=self.device)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """An operation as it is measured.

    Attributes:
        op: Its folder under ``ladder_kernels/ops``, or "nf4_quantize" or "nf4_dequantize".
        make: Makes the work for sizes.
        functions: What a backend's module must have for each direction: "forward", "backward" or
            "both" (a loss and its gradient in one).
        flops: Of the least work for sizes, by direction.
        numbers: Activations read and written, by direction; each has the dtype's size.
        weights: Numbers of NF4 weights read (or written).
        rivals: Names of what it is compared with, where they are there.
        rows: The size that is the number of tokens.
        kind: Of multiply-adds; ``None`` for the dtype's.
    """

    op: str
    make: Callable[[Sizes, Fresh], Work]
    functions: Mapping[str, str]
    flops: Mapping[str, Callable[[Sizes], float]]
    numbers: Mapping[str, Callable[[Sizes], float]]
    weights: Callable[[Sizes], float] = _none
    rivals: tuple[str, ...] = ()
    rows: str = "M"
    kind: str | None = None

    def ideal(self, sizes: Sizes, direction: str, dtype: str) -> Ideal:
        """What it must do at least."""
        numbers = self.numbers[direction](sizes) * getattr(torch, dtype).itemsize
        return Ideal(
            flops=self.flops[direction](sizes),
            bytes_moved=numbers + self.weights(sizes) * _NF4_BYTES,
            kind=self.kind or dtype,
        )


def backends(definition: Definition, direction: str, device: torch.device) -> list[str]:
    """Our backends that have code of their own for it, "reference" last."""
    fast = "triton" if device.type == "cuda" else "cpu"
    package = nf4.__name__ if definition.op in _FORMATS else f"{ops.__name__}.{definition.op}"
    name = f"{package}.{_MODULES[fast]}"
    there = importlib.util.find_spec(name) is not None and (fast == "cpu" or missing() is None)
    own = there and hasattr(importlib.import_module(name), definition.functions[direction])
    return [*([fast] if own else []), "reference"]


def rivals(
    definition: Definition, direction: str, sizes: Sizes, dtype: str, device: torch.device
) -> list[str]:
    """Rivals that are installed and take such a call."""

    def there(name: str) -> bool:
        if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name]) is None:
            return False
        if name == LIGER:
            return device.type == "cuda"
        if name == RECOMPUTING:
            return direction != "forward"
        if name == NUMPY:
            many = sizes[definition.rows] >= MANY_ROWS
            return device.type == "cpu" and dtype == "float32" and many and direction == "forward"
        return True

    return [name for name in definition.rivals if there(name)]


class _Forms:
    """A weight in the forms that rivals take, each made when it is first wanted."""

    def __init__(self, weight: NF4Weight, dtype: torch.dtype) -> None:
        self._weight = weight
        self._dtype = dtype
        self._dense: Tensor | None = None
        self._packed: tuple[Tensor, Any] | None = None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """``[N, K]``, rounded to the case's dtype first."""
        if self._dense is None:
            self._dense = self._weight.dequantize(self._dtype)
        return self._dense if dtype is None else self._dense.to(dtype)

    def linear(self, x: Tensor) -> Tensor:
        """The product in x's dtype by PyTorch."""
        return F.linear(x, self.dense(x.dtype))

    def bitsandbytes(self, x: Tensor) -> Tensor:
        """The product by bitsandbytes."""
        from bitsandbytes.autograd._functions import matmul_4bit

        if self._packed is None:
            self._packed = self._weight.to_bitsandbytes()
        packed, state = self._packed
        return matmul_4bit(x, packed.t(), state)

    def numpy(self, x: Tensor) -> Tensor:
        """The product by NumPy."""
        return torch.from_numpy(x.numpy() @ self.dense().numpy().T)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _recomputing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, with nothing but its arguments kept for the backward pass."""

    def checkpointed(**given: Tensor) -> Any:
        bound = functools.partial(function, **given)
        return checkpoint(bound, use_reentrant=False, preserve_rng_state=False)

    return checkpointed


def _nf4_linear(size: Sizes, new: Fresh) -> Work:
    weight = new.nf4(size["N"], size["K"])
    forms = _Forms(weight, new.dtype)
    return Work(
        inputs={"x": new.normal(size["M"], size["K"])},
        ours=lambda x: ops.nf4_linear(x, weight),
        plain=forms.linear,
        rivals={
            BITSANDBYTES: forms.bitsandbytes,
            DEQUANTISED: forms.linear,
            NUMPY: forms.numpy,
        },
        leaves=("x",),
        tokens=("x",),
    )


def _nf4_linear_int8(size: Sizes, new: Fresh) -> Work:
    weight = new.nf4(size["N"], size["K"])
    forms = _Forms(weight, new.dtype)

    def plain(x: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            return ops.nf4_linear_int8(x, weight)

    return Work(
        inputs={"x": new.normal(size["M"], size["K"])},
        ours=lambda x: ops.nf4_linear_int8(x, weight),
        plain=plain,
        rivals={
            EXACT: lambda x: ops.nf4_linear(x, weight),
            BITSANDBYTES: forms.bitsandbytes,
            DEQUANTISED: forms.linear,
        },
        tokens=("x",),
        plain_of_rivals=forms.linear,
    )


def _nf4_swiglu(size: Sizes, new: Fresh) -> Work:
    pair = [new.nf4(size["N"], size["K"]) for _ in range(2)]
    gate, up = (_Forms(weight, new.dtype) for weight in pair)

    def plain(x: Tensor) -> Tensor:
        return _gated(gate.linear(x), up.linear(x))

    return Work(
        inputs={"x": new.normal(size["M"], size["K"])},
        ours=lambda x: ops.nf4_swiglu(x, *pair),
        plain=plain,
        rivals={
            BITSANDBYTES: lambda x: _gated(gate.bitsandbytes(x), up.bitsandbytes(x)),
            DEQUANTISED: plain,
            RECOMPUTING: _recomputing(plain),
        },
        leaves=("x",),
        tokens=("x",),
    )


def _nf4_swiglu_int8(size: Sizes, new: Fresh) -> Work:
    pair = [new.nf4(size["N"], size["K"]) for _ in range(2)]
    gate, up = (_Forms(weight, new.dtype) for weight in pair)

    def plain(x: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            return ops.nf4_swiglu_int8(x, *pair)

    def exact(x: Tensor) -> Tensor:
        return _gated(gate.linear(x), up.linear(x))

    return Work(
        inputs={"x": new.normal(size["M"], size["K"])},
        ours=lambda x: ops.nf4_swiglu_int8(x, *pair),
        plain=plain,
        rivals={EXACT: lambda x: ops.nf4_swiglu(x, *pair), DEQUANTISED: exact},
        tokens=("x",),
        plain_of_rivals=exact,
    )


def _linear_cross_entropy(size: Sizes, new: Fresh) -> Work:
    head = new.nf4(size["V"], size["D"])
    forms = _Forms(head, new.dtype)

    def liger(hidden: Tensor, labels: Tensor) -> Tensor:
        module = importlib.import_module("liger_kernel.transformers.functional")
        return module.liger_fused_linear_cross_entropy(hidden, forms.dense(), labels)

    def plain(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(forms.linear(hidden), labels)

    return Work(
        inputs={
            "hidden": new.normal(size["T"], size["D"]),
            "labels": new.below(size["V"], size["T"]),
        },
        ours=lambda hidden, labels: ops.linear_cross_entropy(hidden, head, labels),
        plain=plain,
        rivals={DEQUANTISED: plain, LIGER: liger},
        leaves=("hidden",),
        tokens=("hidden", "labels"),
        mean=True,
    )


def _ranged_attention(size: Sizes, new: Fresh) -> Work:
    def heads(length: int, count: int) -> Tensor:
        # As projections leave them: the channels of a token side by side.
        return new.normal(1, length, count, size["hd"]).transpose(1, 2)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = q.shape[2] > 1
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(2)

    return Work(
        inputs={
            "q": heads(size["S"], size["H"]),
            "k": heads(size["T"], size["Hkv"]),
            "v": heads(size["T"], size["Hkv"]),
        },
        ours=ops.ranged_attention,
        plain=plain,
        rivals={TORCH: plain},
        leaves=("q", "k", "v"),
    )


def _normal_row(x: Tensor) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * _normal_row(x).to(x.dtype)


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.functional")
    return module.liger_rms_norm(x, weight, _EPS, in_place=False)


def _rms_norm(size: Sizes, new: Fresh) -> Work:
    D = size["D"]
    return Work(
        inputs={"x": new.normal(size["M"], D), "weight": 1 + new.normal(D, scale=0.1)},
        ours=lambda x, weight: ops.rms_norm(x, weight, _EPS),
        plain=_plain_norm,
        rivals={
            TORCH: lambda x, weight: F.rms_norm(x, (D,), weight, _EPS),
            LIGER: _liger_norm,
        },
        leaves=("x", "weight"),
    )


def _add_rms_norm(size: Sizes, new: Fresh) -> Work:
    D = size["D"]

    def added(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return norm(total, weight), total

        return function

    return Work(
        inputs={
            "x": new.normal(size["M"], D),
            "residual": new.normal(size["M"], D),
            "weight": 1 + new.normal(D, scale=0.1),
        },
        ours=lambda x, residual, weight: ops.rms_norm(x, weight, _EPS, residual),
        plain=added(_plain_norm),
        rivals={
            TORCH: added(lambda x, weight: F.rms_norm(x, (D,), weight, _EPS)),
            LIGER: added(_liger_norm),
        },
    )


def _rotary(size: Sizes, new: Fresh) -> Work:
    S, half = size["S"], size["hd"] // 2
    angles = torch.arange(S, device=new.device)[:, None] * 1e4 ** -torch.linspace(
        0, 1, half, device=new.device
    )
    cos, sin = (turn(angles).to(new.dtype)[None, :, None] for turn in (torch.cos, torch.sin))

    def turned(x: Tensor) -> Tensor:
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return ops.rotary(q, k, cos, sin)
        ops.rotary_(q, k, cos, sin)
        return q, k

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return turned(q), turned(k)

    def liger(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        module = importlib.import_module("liger_kernel.transformers.functional")
        both = (torch.cat((table[:, :, 0],) * 2, -1) for table in (cos, sin))
        out = module.liger_rope(q.transpose(1, 2), k.transpose(1, 2), *both)
        return out[0].transpose(1, 2), out[1].transpose(1, 2)

    return Work(
        inputs={
            "q": new.normal(1, S, size["H"], size["hd"]),
            "k": new.normal(1, S, size["Hkv"], size["hd"]),
        },
        ours=ours,
        plain=plain,
        rivals={TORCH: plain, LIGER: liger},
        leaves=("q", "k"),
    )


def _rung_merge(size: Sizes, new: Fresh) -> Work:
    def plain(side: Tensor, tap: Tensor, down: Tensor, gate: Tensor) -> Tensor:
        z = F.linear(_normal_row(tap).to(down.dtype), down)
        return gate * side + (1 - gate) * z

    return Work(
        inputs={
            "side": new.normal(size["M"], size["d"]),
            "tap": new.normal(size["M"], size["D"]),
            "down": new.matrix(size["d"], size["D"]),
            "gate": torch.full((1,), 0.6, device=new.device).to(new.dtype),
        },
        ours=lambda side, tap, down, gate: ops.rung_merge(side, [tap], [down], gate),
        plain=plain,
        rivals={TORCH: plain, RECOMPUTING: _recomputing(plain)},
        leaves=("side", "down", "gate"),
    )


def _side_mlp(size: Sizes, new: Fresh) -> Work:
    d, m = size["d"], size["m"]

    def plain(u: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x = _plain_norm(u, norm)
        return u + F.linear(_gated(F.linear(x, gate), F.linear(x, up)), down)

    return Work(
        inputs={
            "u": new.normal(size["M"], d),
            "norm": 1 + new.normal(d, scale=0.1),
            "gate": new.matrix(m, d),
            "up": new.matrix(m, d),
            "down": new.matrix(d, m),
        },
        ours=lambda u, norm, gate, up, down: ops.side_mlp(u, norm, gate, up, down, _EPS),
        plain=plain,
        rivals={TORCH: plain, RECOMPUTING: _recomputing(plain)},
        leaves=("u", "norm", "gate", "up", "down"),
    )


def _nf4_quantize(size: Sizes, new: Fresh) -> Work:
    def plain(weight: Tensor) -> Any:
        if weight.dtype == torch.float64:  # what is right is the weight itself
            return weight
        with lk.use_backend("reference"):
            return lk.quantize_nf4(weight)

    def theirs(weight: Tensor) -> Any:
        from bitsandbytes.functional import quantize_4bit

        return quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")

    def numbers(made: Any) -> Tensor:
        if isinstance(made, tuple):
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(*made)
        return made.dequantize() if isinstance(made, NF4Weight) else made

    return Work(
        inputs={"weight": new.normal(size["N"], size["K"])},
        ours=lk.quantize_nf4,
        plain=plain,
        rivals={BITSANDBYTES: theirs},
        same_bits=True,
        numbers=numbers,
    )


def _nf4_dequantize(size: Sizes, new: Fresh) -> Work:
    weight = new.nf4(size["N"], size["K"])
    packed: list[Any] = []

    def plain(like: Tensor) -> Tensor:
        with lk.use_backend("reference"):
            wide = torch.float32 if like.dtype == torch.float64 else like.dtype
            return weight.dequantize(wide).to(like.dtype)

    def theirs(like: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        if not packed:
            packed.extend(weight.to_bitsandbytes())
        return dequantize_4bit(*packed)

    return Work(
        inputs={"like": new.normal(1)},
        ours=lambda like: weight.dequantize(like.dtype),
        plain=plain,
        rivals={BITSANDBYTES: theirs},
        same_bits=True,
    )


def _product(each: float) -> dict[str, Callable[[Sizes], float]]:
    def flops(s: Sizes) -> float:
        return 2 * each * s["M"] * s["N"] * s["K"]

    return {"forward": flops, "backward": flops}


def _side(s: Sizes) -> float:
    return s["M"] * s["d"]


def _seen(s: Sizes) -> float:
    """Pairs of a query and a key that it sees."""
    return s["S"] * (s["T"] - (s["S"] - 1) / 2)


def _heads(s: Sizes) -> float:
    return s["S"] * s["hd"] * (s["H"] + s["Hkv"])


_LINEAR: Mapping[str, Any] = {
    "numbers": dict.fromkeys(("forward", "backward"), lambda s: s["M"] * (s["N"] + s["K"])),
    "weights": lambda s: s["N"] * s["K"],
}
_SWIGLU: Mapping[str, Any] = {
    "flops": _product(2),
    "numbers": {
        "forward": lambda s: s["M"] * (s["N"] + s["K"]),
        "backward": lambda s: s["M"] * (s["N"] + 2 * s["K"]),
    },
    "weights": lambda s: 2 * s["N"] * s["K"],
}
_FORMAT: Mapping[str, Any] = {
    "flops": {"forward": lambda s: 0.0},
    "numbers": {"forward": lambda s: s["N"] * s["K"]},
    "weights": lambda s: s["N"] * s["K"],
    "rivals": (BITSANDBYTES,),
    "rows": "N",
}

DEFINITIONS: Mapping[str, Definition] = {
    "nf4_linear": Definition(
        op="nf4_linear",
        make=_nf4_linear,
        functions={"forward": "nf4_linear", "backward": "nf4_linear_transposed"},
        flops=_product(1),
        rivals=(BITSANDBYTES, DEQUANTISED, NUMPY),
        **_LINEAR,
    ),
    "nf4_linear_int8": Definition(
        op="nf4_linear_int8",
        make=_nf4_linear_int8,
        functions={"forward": "nf4_linear_int8"},
        flops=_product(1),
        rivals=(EXACT, BITSANDBYTES, DEQUANTISED),
        kind="int8",
        **_LINEAR,
    ),
    "nf4_swiglu": Definition(
        op="nf4_swiglu",
        make=_nf4_swiglu,
        functions={"forward": "nf4_swiglu", "backward": "nf4_swiglu_backward"},
        rivals=(BITSANDBYTES, DEQUANTISED, RECOMPUTING),
        **_SWIGLU,
    ),
    "nf4_swiglu_int8": Definition(
        op="nf4_swiglu_int8",
        make=_nf4_swiglu_int8,
        functions={"forward": "nf4_swiglu_int8"},
        rivals=(EXACT, DEQUANTISED),
        kind="int8",
        **_SWIGLU,
    ),
    "linear_cross_entropy": Definition(
        op="linear_cross_entropy",
        make=_linear_cross_entropy,
        functions=dict.fromkeys(("forward", "both"), "linear_cross_entropy"),
        flops={
            "forward": lambda s: 2 * s["T"] * s["V"] * s["D"],
            "both": lambda s: 4 * s["T"] * s["V"] * s["D"],
        },
        numbers={
            "forward": lambda s: s["T"] * s["D"],
            "both": lambda s: 2 * s["T"] * s["D"],
        },
        weights=lambda s: s["V"] * s["D"],
        rivals=(DEQUANTISED, LIGER),
        rows="T",
    ),
    "ranged_attention": Definition(
        op="ranged_attention",
        make=_ranged_attention,
        functions={"forward": "ranged_attention", "backward": "ranged_attention_backward"},
        flops={
            "forward": lambda s: 4 * s["H"] * s["hd"] * _seen(s),
            "backward": lambda s: 10 * s["H"] * s["hd"] * _seen(s),
        },
        numbers={
            "forward": lambda s: 2 * s["hd"] * (s["S"] * s["H"] + s["T"] * s["Hkv"]),
            "backward": lambda s: 4 * s["hd"] * (s["S"] * s["H"] + s["T"] * s["Hkv"]),
        },
        rivals=(TORCH,),
        rows="S",
    ),
    "rms_norm": Definition(
        op="rms_norm",
        make=_rms_norm,
        functions={"forward": "rms_norm", "backward": "rms_norm_backward"},
        flops={
            "forward": lambda s: 4 * s["M"] * s["D"],
            "backward": lambda s: 10 * s["M"] * s["D"],
        },
        numbers={
            "forward": lambda s: 2 * s["M"] * s["D"],
            "backward": lambda s: 3 * s["M"] * s["D"],
        },
        rivals=(TORCH, LIGER),
    ),
    "rms_norm with residual": Definition(
        op="rms_norm",
        make=_add_rms_norm,
        functions={"forward": "add_rms_norm"},
        flops={"forward": lambda s: 5 * s["M"] * s["D"]},
        numbers={"forward": lambda s: 4 * s["M"] * s["D"]},
        rivals=(TORCH, LIGER),
    ),
    "rotary": Definition(
        op="rotary",
        make=_rotary,
        functions=dict.fromkeys(("forward", "backward"), "rotary_"),
        flops=dict.fromkeys(("forward", "backward"), lambda s: 3 * _heads(s)),
        numbers=dict.fromkeys(("forward", "backward"), lambda s: 2 * _heads(s)),
        rivals=(TORCH, LIGER),
        rows="S",
    ),
    "rung_merge": Definition(
        op="rung_merge",
        make=_rung_merge,
        functions={"forward": "rung_merge", "backward": "rung_merge_backward"},
        flops=dict.fromkeys(("forward", "backward"), lambda s: 2 * _side(s) * s["D"]),
        numbers={
            "forward": lambda s: 2 * _side(s) + s["M"] * s["D"] + s["d"] * s["D"],
            "backward": lambda s: 3 * _side(s) + s["M"] * s["D"] + 2 * s["d"] * s["D"],
        },
        rivals=(TORCH, RECOMPUTING),
    ),
    "side_mlp": Definition(
        op="side_mlp",
        make=_side_mlp,
        functions={"forward": "side_mlp", "backward": "side_mlp_backward"},
        flops={
            "forward": lambda s: 6 * _side(s) * s["m"],
            "backward": lambda s: 12 * _side(s) * s["m"],
        },
        numbers={
            "forward": lambda s: 2 * _side(s) + 3 * s["d"] * s["m"],
            "backward": lambda s: 3 * _side(s) + 6 * s["d"] * s["m"],
        },
        rivals=(TORCH, RECOMPUTING),
    ),
    "nf4_quantize": Definition(
        op="nf4_quantize",
        make=_nf4_quantize,
        functions={"forward": "quantize_blocks"},
        **_FORMAT,
    ),
    "nf4_dequantize": Definition(
        op="nf4_dequantize",
        make=_nf4_dequantize,
        functions={"forward": "dequantize"},
        **_FORMAT,
    ),
}
"""By the name that cases call them by."""
