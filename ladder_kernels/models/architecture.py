"""What tells the members of the llama family apart, as data.

All of them are stacks of pre-norm blocks: RMS norm, rotary attention with grouped heads, RMS norm,
gated MLP. :data:`FAMILIES` lists the differences by model type; :class:`Architecture` is one
configuration resolved into plain numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ladder_kernels.errors import UnsupportedModelError

__all__ = ["FAMILIES", "Architecture", "Family"]


@dataclass(frozen=True)
class Family:
    """How one model type departs from plain llama.

    Attributes:
        qkv_bias: Whether queries, keys and values have a bias: the answer, or the name of the
            configuration field that holds it.
        out_bias: The same for the attention output.
        mlp_bias: The same for the MLP.
        qk_norm: Whether queries and keys are RMS-normalised a head.
        window: Which layers look through a sliding window: none, all (if the configuration names a
            window), or those whose entry in ``layer_types`` says so.
        rope_field: Configuration field with a true entry for each layer that has rotary positions;
            ``None``: all have.
    """

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: Literal["none", "all", "layer_types"] = "none"
    rope_field: str | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(window="all"),
    "ministral": Family(window="layer_types"),
    "qwen2": Family(qkv_bias=True, window="layer_types"),
    "qwen3": Family(
        qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True, window="layer_types"
    ),
    "smollm3": Family(
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        window="layer_types",
        rope_field="no_rope_layers",
    ),
    "seed_oss": Family(
        qkv_bias="attention_bias", out_bias="attention_out_bias", mlp_bias="mlp_bias"
    ),
    "cwm": Family(mlp_bias="mlp_bias", window="layer_types"),
}


@dataclass(frozen=True)
class Architecture:
    """A configuration of the llama family in plain numbers.

    Attributes:
        vocab_size: ``V``.
        hidden_size: ``D``.
        intermediate_size: Width of the MLP.
        num_layers: ``L``.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Size of a head.
        eps: Of every RMS norm.
        activation: Of the MLP's gate.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the attention output has one.
        mlp_bias: Whether the MLP has them.
        qk_norm: Whether queries and keys are normalised.
        windows: Sliding window of each layer, or ``None``.
        rope: Whether each layer has rotary positions.
        rope_parameters: As in the configuration.
        max_position_embeddings: Longest context that the model was made for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: tuple[bool, ...]
    rope_parameters: dict[str, Any]
    max_position_embeddings: int

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Resolve a transformers configuration whose model type is in :data:`FAMILIES`.

        Raises:
            UnsupportedModelError: If a layer has a kind of attention that is not supported.
        """
        family = FAMILIES[config.model_type]

        def answer(value: bool | str) -> bool:
            return bool(getattr(config, value)) if isinstance(value, str) else value

        layers = config.num_hidden_layers
        windows: list[int | None] = [None] * layers
        if family.window == "all":
            windows = [config.sliding_window] * layers
        elif family.window == "layer_types":
            for layer, kind in enumerate(config.layer_types[:layers]):
                if kind not in ("full_attention", "sliding_attention"):
                    raise UnsupportedModelError(
                        f"layer {layer} of this {config.model_type} has attention of type "
                        f"'{kind}'; "
                        "allowed are full_attention and sliding_attention"
                    )
                if kind == "sliding_attention":
                    windows[layer] = config.sliding_window
        rope = [True] * layers
        if family.rope_field is not None:
            rope = [bool(entry) for entry in getattr(config, family.rope_field)[:layers]]
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            eps=config.rms_norm_eps,
            activation=config.hidden_act,
            qkv_bias=answer(family.qkv_bias),
            out_bias=answer(family.out_bias),
            mlp_bias=answer(family.mlp_bias),
            qk_norm=family.qk_norm,
            windows=tuple(windows),
            rope=tuple(rope),
            rope_parameters=dict(config.rope_parameters),
            max_position_embeddings=config.max_position_embeddings,
        )

    def linears(self) -> dict[str, tuple[str, tuple[int, int], bool]]:
        """The linear layers of a block: role -> (name in a checkpoint, ``(N, K)``, has a bias)."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        D, mlp = self.hidden_size, self.intermediate_size
        return {
            "q": ("self_attn.q_proj", (wide, D), self.qkv_bias),
            "k": ("self_attn.k_proj", (narrow, D), self.qkv_bias),
            "v": ("self_attn.v_proj", (narrow, D), self.qkv_bias),
            "o": ("self_attn.o_proj", (D, wide), self.out_bias),
            "gate": ("mlp.gate_proj", (mlp, D), self.mlp_bias),
            "up": ("mlp.up_proj", (mlp, D), self.mlp_bias),
            "down": ("mlp.down_proj", (D, mlp), self.mlp_bias),
        }

    def norms(self) -> dict[str, tuple[str, int]]:
        """The norms of a block: role -> (name in a checkpoint, size)."""
        norms = {
            "input_norm": ("input_layernorm", self.hidden_size),
            "post_norm": ("post_attention_layernorm", self.hidden_size),
        }
        if self.qk_norm:
            norms["q_norm"] = ("self_attn.q_norm", self.head_dim)
            norms["k_norm"] = ("self_attn.k_norm", self.head_dim)
        return norms

    def shapes(self, *, tied: bool) -> dict[str, tuple[int, ...]]:
        """The tensors that a checkpoint must hold, by name.

        Args:
            tied: Whether the head is the embedding, so that there is no ``lm_head.weight``.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, (rows, columns), bias in self.linears().values():
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
            for name, size in self.norms().values():
                shapes[f"{prefix}{name}.weight"] = (size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def fingerprint(self) -> dict[str, Any]:
        """What changes the function that the weights compute."""
        return asdict(self)
