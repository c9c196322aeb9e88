"""The table of what is measured: operations, directions, models and layers, tokens, dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from bench.ops import SETS
from bench.ops.definitions import DEFINITIONS, Definition, Sizes
from bench.roofline import Ideal

__all__ = ["TABLE", "Case", "Line", "Model", "cases"]

_CONTEXT = 2048


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a model, and of a ladder of a sixteenth of its width beside it."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    side: int
    side_intermediate: int

    def sizes(self, layer: str) -> dict[str, int]:
        """Of a layer, without the number of tokens."""
        heads = {"H": self.heads, "Hkv": self.kv_heads, "hd": self.head_dim}
        return {
            "attn.q": {"N": self.heads * self.head_dim, "K": self.hidden},
            "mlp.gate": {"N": self.intermediate, "K": self.hidden},
            "mlp.down": {"N": self.hidden, "K": self.intermediate},
            "mlp": {"N": self.intermediate, "K": self.hidden},
            "head": {"V": self.vocabulary, "D": self.hidden},
            "attention": {"T": _CONTEXT, **heads},
            "rotary": heads,
            "norm": {"D": self.hidden},
            "rung": {"D": self.hidden, "d": self.side},
            "side block": {"d": self.side, "m": self.side_intermediate},
        }[layer]


SMOLLM2 = Model(
    name="SmolLM2-135M", hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64,
    vocabulary=49152, side=36, side_intermediate=96,
)  # fmt: skip
QWEN_1_5B = Model(
    name="Qwen2.5-1.5B", hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_dim=128,
    vocabulary=151936, side=96, side_intermediate=560,
)  # fmt: skip
QWEN_7B = Model(
    name="Qwen2.5-7B", hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128,
    vocabulary=152064, side=224, side_intermediate=1184,
)  # fmt: skip
_ALL = (SMOLLM2, QWEN_1_5B, QWEN_7B)
_MATRICES = ("attn.q", "mlp.gate", "mlp.down")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call that is measured.

    Attributes:
        name: Of its definition.
        direction: "forward", "backward" or "both".
        model: Whose shapes these are.
        layer: Of the model.
        sizes: By letter.
        dtype: Of activations.
        set: The smallest of :data:`~bench.ops.SETS` that it is in.
        memory: Whether memory is measured, too.
    """

    name: str
    direction: str
    model: str
    layer: str
    sizes: Sizes = field(hash=False)
    dtype: str
    set: str
    memory: bool

    @property
    def definition(self) -> Definition:
        """What is called, and how."""
        return DEFINITIONS[self.name]

    @property
    def op(self) -> str:
        """Folder of the operation."""
        return self.definition.op

    @property
    def shape(self) -> str:
        """As rows have it, such as ``"mlp.down, backward M=2048 N=576 K=1536"``."""
        what = {"forward": "", "backward": ", backward", "both": ", loss and gradient"}
        residual = " with residual" if self.name.endswith("with residual") else ""
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes.items())
        return f"{self.layer}{residual}{what[self.direction]} {sizes}"

    @property
    def ideal(self) -> Ideal:
        """What it must do at least."""
        return self.definition.ideal(self.sizes, self.direction, self.dtype)

    def __str__(self) -> str:
        """What pytest calls it: ``-k`` finds its parts."""
        tokens = self.definition.rows
        parts = (self.name, self.model, self.layer, self.direction)
        text = "-".join((*parts, f"{tokens}{self.sizes[tokens]}", self.dtype))
        return text.replace(" ", "_")

    def shrunk(self) -> Case:
        """The same call with small sizes, whole blocks of weights and whole heads."""
        small = {
            "M": 70,
            "S": 33,
            "T": 33,
            "N": 128,
            "K": 192,
            "V": 320,
            "D": 128,
            "d": 32,
            "m": 64,
        }
        few = {key: min(size, small.get(key, size)) for key, size in self.sizes.items()}
        return replace(self, sizes=few)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: cases that have the operation and direction in common.

    Attributes:
        name: Of a definition.
        layers: Of each model.
        models: Whose shapes.
        direction: "forward", "backward" or "both".
        rows: Numbers of tokens.
        dtypes: Of activations.
        set: The smallest of :data:`~bench.ops.SETS` that has them.
        memory: Whether memory is measured, too.
    """

    name: str
    layers: Sequence[str]
    models: Sequence[Model] = _ALL
    direction: str = "forward"
    rows: Sequence[int] = (_CONTEXT,)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    set: str = "default"
    memory: bool = False

    def cases(self) -> Iterator[Case]:
        """Its cases."""
        for model in self.models:
            for layer in self.layers:
                for rows in self.rows:
                    for dtype in self.dtypes:
                        tokens = DEFINITIONS[self.name].rows
                        # A format has no tokens: its rows are the weight's own.
                        own = model.sizes(layer)
                        sizes = own if tokens == "N" else {tokens: rows, **own}
                        yield Case(
                            name=self.name, direction=self.direction, model=model.name,
                            layer=layer, sizes=sizes, dtype=dtype, set=self.set,
                            memory=self.memory,
                        )  # fmt: skip


_FEW = (1, 16)
_ONE, _LARGE = (SMOLLM2,), (QWEN_7B,)

TABLE: Sequence[Line] = (
    Line(name="nf4_linear", layers=_MATRICES, models=_ONE, set="quick"),
    Line(name="nf4_linear", layers=_MATRICES, models=(QWEN_1_5B,)),
    Line(name="nf4_linear", layers=("attn.q", "mlp.down"), models=_LARGE),
    Line(name="nf4_linear", layers=("mlp.gate",), models=_LARGE, set="full"),
    Line(name="nf4_linear", layers=("mlp.down",), models=_ONE, rows=_FEW, set="quick"),
    Line(name="nf4_linear", layers=_MATRICES, models=(QWEN_1_5B, QWEN_7B), rows=(1,)),
    Line(name="nf4_linear", layers=("mlp.down",), models=_LARGE, rows=(16,)),
    Line(name="nf4_linear", layers=("attn.q",), models=_ONE, rows=(1,)),
    Line(name="nf4_linear", layers=("mlp.gate",), models=_ONE, rows=(1,)),
    Line(
        name="nf4_linear", direction="backward", layers=("mlp.down",), models=_ONE, set="quick"
    ),
    Line(name="nf4_linear", direction="backward", layers=("attn.q",), models=(QWEN_1_5B, QWEN_7B)),
    Line(
        name="nf4_linear", direction="backward", layers=("mlp.gate", "mlp.down"),
        models=(QWEN_1_5B, QWEN_7B), set="full",
    ),
    Line(name="nf4_linear_int8", layers=("mlp.down",), models=_ONE, set="quick"),
    Line(name="nf4_linear_int8", layers=("attn.q",), models=(QWEN_1_5B,)),
    Line(name="nf4_linear_int8", layers=("attn.q",), models=_LARGE, dtypes=("float32",)),
    Line(
        name="nf4_linear_int8", layers=("attn.q",), models=_LARGE, dtypes=("bfloat16",),
        set="full",
    ),
    Line(
        name="nf4_linear_int8", layers=("mlp.gate", "mlp.down"), models=(QWEN_1_5B, QWEN_7B),
        set="full",
    ),
    Line(name="nf4_linear_int8", layers=("mlp.down",), rows=_FEW, dtypes=("float32",)),
    Line(name="nf4_swiglu", layers=("mlp",), models=_ONE, set="quick"),
    Line(name="nf4_swiglu", layers=("mlp",), models=(QWEN_1_5B,)),
    Line(name="nf4_swiglu", layers=("mlp",), models=_LARGE, set="full"),
    Line(name="nf4_swiglu", layers=("mlp",), models=(QWEN_1_5B,), rows=(1,)),
    Line(name="nf4_swiglu", layers=("mlp",), models=_LARGE, rows=(1,), set="full"),
    Line(name="nf4_swiglu", direction="backward", layers=("mlp",), models=_ONE, set="quick"),
    Line(
        name="nf4_swiglu", direction="backward", layers=("mlp",), models=(QWEN_1_5B, QWEN_7B),
        set="full",
    ),
    Line(name="nf4_swiglu_int8", layers=("mlp",), models=_ONE, set="quick"),
    Line(name="nf4_swiglu_int8", layers=("mlp",), models=(QWEN_1_5B, QWEN_7B), set="full"),
    Line(name="nf4_swiglu_int8", layers=("mlp",), models=(QWEN_1_5B,), rows=(1,)),
    Line(name="linear_cross_entropy", layers=("head",), models=_ONE, rows=(256,), set="quick"),
    Line(
        name="linear_cross_entropy", direction="both", layers=("head",), models=_ONE, memory=True
    ),
    Line(
        name="linear_cross_entropy", direction="both", layers=("head",), models=(QWEN_1_5B,),
        rows=(256,),
    ),
    Line(
        name="linear_cross_entropy", direction="both", layers=("head",),
        models=(QWEN_1_5B, QWEN_7B), set="full", memory=True,
    ),
    Line(name="ranged_attention", layers=("attention",), models=_ONE, set="quick"),
    Line(name="ranged_attention", layers=("attention",), models=(QWEN_1_5B, QWEN_7B)),
    Line(name="ranged_attention", layers=("attention",), rows=(1,)),
    Line(
        name="ranged_attention", direction="backward", layers=("attention",),
        models=(SMOLLM2, QWEN_1_5B),
    ),
    Line(name="rms_norm", layers=("norm",), models=_ONE, set="quick"),
    Line(name="rms_norm", layers=("norm",), models=_LARGE),
    Line(name="rms_norm", layers=("norm",), models=_LARGE, rows=(1,)),
    Line(name="rms_norm", direction="backward", layers=("norm",), models=(SMOLLM2, QWEN_7B)),
    Line(name="rms_norm with residual", layers=("norm",), models=(SMOLLM2, QWEN_7B)),
    Line(name="rotary", layers=("rotary",), models=_ONE, set="quick"),
    Line(name="rotary", layers=("rotary",), models=_LARGE),
    Line(name="rotary", direction="backward", layers=("rotary",), models=(SMOLLM2, QWEN_7B)),
    Line(name="rung_merge", layers=("rung",), models=_ONE, set="quick"),
    Line(name="rung_merge", layers=("rung",), models=(QWEN_1_5B, QWEN_7B)),
    Line(name="rung_merge", direction="backward", layers=("rung",)),
    Line(name="side_mlp", layers=("side block",), models=_ONE, set="quick"),
    Line(name="side_mlp", layers=("side block",), models=_LARGE),
    Line(name="side_mlp", direction="backward", layers=("side block",), models=(SMOLLM2, QWEN_7B)),
    Line(name="nf4_quantize", layers=("mlp.gate",), models=_ONE, set="quick"),
    Line(name="nf4_quantize", layers=("attn.q",), models=_LARGE),
    Line(name="nf4_quantize", layers=("mlp.down",), models=_LARGE, set="full"),
    Line(name="nf4_dequantize", layers=("mlp.gate",), models=_ONE, set="quick"),
    Line(name="nf4_dequantize", layers=("attn.q",), models=_LARGE),
    Line(name="nf4_dequantize", layers=("mlp.down",), models=_LARGE, set="full"),
)  # fmt: skip
"""Everything that is measured."""


def cases(chosen: str = "default") -> list[Case]:
    """The cases of a set, in the table's order.

    Args:
        chosen: Of :data:`~bench.ops.SETS`.
    """
    sets = SETS[: SETS.index(chosen) + 1]
    return [case for line in TABLE for case in line.cases() if case.set in sets]
