"""What a ladder looks like, and the configuration that is saved with one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from ladder_kernels.errors import ConfigError
from ladder_kernels.models.inits import INITS
from ladder_kernels.nn.block import BLOCKS, SideShape
from ladder_kernels.nn.linear import ACTIVATIONS
from ladder_kernels.nn.merge import MERGES
from ladder_kernels.nn.output import OUTPUTS
from ladder_kernels.nn.tap import TAPS

if TYPE_CHECKING:
    from ladder_kernels.models.backbone import Backbone

__all__ = [
    "FLOAT_DTYPES",
    "KINDS",
    "TAP_DTYPES",
    "LadderConfig",
    "LadderModelConfig",
    "check_activations",
    "tap_dtype_of",
]

KINDS = ("auto", "lst", "xladder", "explicit", "adapters")
"""How a list of rungs can be described."""

FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What models compute in, by name."""

TAP_DTYPES = {**FLOAT_DTYPES, "int8": torch.int8}
"""What taps can be kept in, by name; int8 with a scale for each token."""

_LARGEST_HEAD = 64

# What each kind of list is described by, with defaults.
_KIND_FIELDS: dict[str, dict[str, Any]] = {
    "auto": {},
    "lst": {"every": 1},
    "xladder": {"connected": 4, "free": 4},
    "explicit": {"rungs": None},
    "adapters": {},
}


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """The shape of a ladder, its parts, and where training starts.

    Use :meth:`lst`, :meth:`xladder`, or give ``rungs``. Each field is described in its metadata
    (``dataclasses.fields(LadderConfig)[i].metadata["help"]``), from which the command line takes
    its help. Everything is checked when it is made, and once more by :meth:`resolve` and
    :meth:`side_shape` against the backbone.

    Raises:
        ConfigError: If a field is not allowed; the message names the field, what was found and what
            may be.
    """

    kind: str | None = _help(
        "how rungs are placed: 'auto' (what learned best in bench/learning, as far as the backbone "
        "allows it), 'lst' (one tap a rung, evenly spaced), 'xladder' (the top layers, then rungs "
        "without taps), 'explicit' or 'adapters' (no rungs: only low-rank adapters above the "
        "re-entry); default 'explicit' when rungs is given, else 'lst'",
        None,
    )
    every: int | None = _help("lst: backbone layers from one rung to the next (default 1)", None)
    connected: int | None = _help(
        "xladder: rungs that tap the top layers, one each (default 4)", None
    )
    free: int | None = _help("xladder: rungs without taps above those (default 4)", None)
    rungs: tuple[tuple[int, ...], ...] | None = _help(
        "explicit: the layers that each rung taps, 0 (embeddings) to L; () is a rung without taps",
        None,
    )
    reduction: int = _help("width of the backbone divided by the width of the ladder", 16)
    width: int | None = _help("width of the ladder; overrides reduction", None)
    tap: str = _help(f"what a rung reads of a layer: {', '.join(TAPS)}", "residual")
    merge: str = _help(f"how a tap meets the side stream: {', '.join(MERGES)}", "sum")
    temperature: float = _help("divides what the gate's sigmoid sees (merge gate, channel)", 0.1)
    output: str = _help(
        f"how the ladder's top meets the last state: {', '.join(OUTPUTS)}", "residual"
    )
    reentry: float = _help(
        "backbone layers, counted from the top, that come after the ladder (a number, or a share "
        "below 1 of all): its output is added to the residual stream before them, and gradients "
        "pass through them and no others",
        0,
    )
    adapter_rank: int = _help(
        "rank of low-rank adapters (LoRA) on every linear layer after the re-entry; 0 for none", 0
    )
    adapter_scale: float = _help("factor on what those adapters add (LoRA's alpha / rank)", 2.0)
    block: str = _help(f"kind of side block: {', '.join(BLOCKS)}", "transformer")
    head_dim: int | None = _help(
        "channels an attention head of the ladder, even; default the largest even divisor of its "
        "width up "
        f"to {_LARGEST_HEAD}",
        None,
    )
    mlp_ratio: float | None = _help(
        "width inside the ladder's MLP over its width; default the backbone's ratio", None
    )
    init: str = _help(f"initial weights: {', '.join(INITS)}", "xavier")
    eps: float = _help("added to the mean square in the ladder's norms", 1e-6)
    seed: int = _help("of the initial weights: the same configuration starts the same", 0)

    @classmethod
    def lst(cls, every: int = 1, reduction: int = 16, **options: Any) -> LadderConfig:
        """Connected rungs of one tap each, ``every`` layers apart, the last at layer ``L``.

        Ladder Side Tuning (arXiv:2206.06522) with ``every=1``; larger values drop side layers.
        """
        return cls(kind="lst", every=every, reduction=reduction, **options)

    @classmethod
    def xladder(
        cls, connected: int = 4, free: int = 4, reduction: int = 16, **options: Any
    ) -> LadderConfig:
        """Rungs on the top ``connected`` layers, then ``free`` rungs without taps.

        xLadder (arXiv:2512.14237): effective depth ``L + free`` (published choice: as many free as
        connected).
        """
        return cls(kind="xladder", connected=connected, free=free, reduction=reduction, **options)

    @classmethod
    def recommended(cls, **options: Any) -> LadderConfig:
        """What learned best in the study under ``bench/learning``; see :meth:`settled`."""
        return cls(kind="auto", **{"reduction": 8, **options})

    @classmethod
    def adapters(cls, reentry: float, rank: int = 16, **options: Any) -> LadderConfig:
        """No rungs: low-rank adapters on the top ``reentry`` layers.

        With ``reentry`` equal to the number of layers this is QLoRA (arXiv:2305.14314) on all
        linear layers; with fewer, its cheaper neighbours down to the plain ladder.
        """
        return cls(kind="adapters", reentry=reentry, adapter_rank=rank, **options)

    def __post_init__(self) -> None:
        kind = self.kind or ("explicit" if self.rungs is not None else "lst")
        _one_of("kind", kind, KINDS)
        object.__setattr__(self, "kind", kind)
        own = _KIND_FIELDS[kind]
        for other in KINDS:
            for name in _KIND_FIELDS[other]:
                value = getattr(self, name)
                if name in own:
                    object.__setattr__(self, name, own[name] if value is None else value)
                elif value is not None:
                    raise _wrong(
                        name, value, f"only a ladder of kind {other!r} has it, not {kind!r}"
                    )
        if kind == "lst":
            _integer("every", self.every, at_least=1)
        elif kind == "xladder":
            _integer("connected", self.connected, at_least=1)
            _integer("free", self.free, at_least=0)
        elif kind == "explicit":
            object.__setattr__(self, "rungs", _checked_rungs(self.rungs))

        object.__setattr__(self, "reentry", _checked_reentry(self.reentry))
        _integer("adapter_rank", self.adapter_rank, at_least=0)
        _positive("adapter_scale", self.adapter_scale)
        if self.adapter_rank and not self.reentry:
            raise _wrong(
                "adapter_rank", self.adapter_rank, "adapters sit after a re-entry: give reentry too"
            )
        if kind == "adapters" and not self.adapter_rank:
            raise _wrong("adapter_rank", 0, "a ladder of kind 'adapters' has nothing else to train")
        _integer("reduction", self.reduction, at_least=1)
        if self.width is not None:
            _integer("width", self.width, at_least=1)
        _one_of("tap", self.tap, TAPS)
        _one_of("merge", self.merge, MERGES)
        _one_of("output", self.output, OUTPUTS)
        _one_of("block", self.block, BLOCKS)
        _one_of("init", self.init, INITS)
        _positive("temperature", self.temperature)
        _positive("eps", self.eps)
        _integer("seed", self.seed, at_least=0)
        if self.mlp_ratio is not None:
            _positive("mlp_ratio", self.mlp_ratio)
        if self.head_dim is not None:
            _integer("head_dim", self.head_dim, at_least=2)
            if self.head_dim % 2:
                raise _wrong(
                    "head_dim", self.head_dim, "it must be even: positions turn channel pairs"
                )

    def settled(self, num_layers: int, *, reenters: bool = True) -> LadderConfig:
        """This configuration, with what "auto" means beside a certain backbone.

        A rung at every third layer, without attention. Where gradients can pass through layers of
        the backbone, the ladder re-enters below the upper half of them, which have adapters of rank
        16.

        Args:
            num_layers: Layers of the backbone.
            reenters: Whether gradients can pass through them
                (:attr:`~ladder_kernels.models.backbone.Backbone.reenters`).
        """
        if self.kind != "auto":
            return self
        above = {"reentry": 0.5, "adapter_rank": 16} if reenters and num_layers > 1 else {}
        settled = replace(self, kind="lst", every=1, block="mlp", **above)
        below = num_layers - settled.reentry_layers(num_layers)
        return replace(settled, every=min(3, below))

    def resolve(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """The layers that each rung taps beside a backbone of ``num_layers`` layers, bottom first.

        Rungs tap what lies below the re-entry, layers 0 to ``num_layers - reentry``.

        Raises:
            ConfigError: If the ladder does not fit that many layers.
        """
        below = num_layers - self.reentry_layers(num_layers)
        if self.kind == "auto":
            return self.settled(num_layers).resolve(num_layers)
        found = f"the backbone has {num_layers} layers" + (
            f", {below} of them below the re-entry" if self.reentry else ""
        )
        if self.kind == "lst":
            every = self.every or 1
            if every > below:
                raise _wrong("every", every, found)
            return tuple((layer,) for layer in range(below, 0, -every))[::-1]
        if self.kind == "xladder":
            connected, free = self.connected or 0, self.free or 0
            if connected > below:
                raise _wrong("connected", connected, found)
            return tuple((layer,) for layer in range(below - connected + 1, below + 1)) + (
                ((),) * free
            )
        rungs = self.rungs or ()
        for index, rung in enumerate(rungs):
            for layer in rung:
                if layer > below:
                    raise _wrong(
                        f"rungs[{index}]", layer, f"the taps that it can have are 0 to {below}"
                    )
        return rungs

    def reentry_layers(self, num_layers: int) -> int:
        """How many of a backbone's ``num_layers`` layers come after the ladder.

        Raises:
            ConfigError: If there are fewer.
        """
        if self.reentry > num_layers:
            raise _wrong("reentry", self.reentry, f"the backbone has {num_layers} layers")
        if 0 < self.reentry < 1:
            return max(1, round(self.reentry * num_layers))
        return int(self.reentry)

    def side_width(self, hidden_size: int) -> int:
        """Width ``d`` of the ladder beside a backbone of width ``hidden_size``.

        Raises:
            ConfigError: If ``reduction`` does not divide ``hidden_size``.
        """
        if self.width is not None:
            return self.width
        if hidden_size % self.reduction:
            divisors = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0]
            below = max(n for n in divisors if n < self.reduction)
            above = [n for n in divisors if n > self.reduction]
            near = f"{below} and {above[0]}" if above else f"{below}"
            raise _wrong(
                "reduction",
                self.reduction,
                f"it must divide the backbone's width {hidden_size}; the nearest that do are "
                f"{near}",
            )
        return hidden_size // self.reduction

    def side_shape(
        self, hidden_size: int, intermediate_size: int, backbone_head_dim: int | None = None
    ) -> SideShape:
        """Sizes of the side blocks beside a backbone of these sizes.

        Args:
            hidden_size: Width of the backbone, ``D``.
            intermediate_size: Width inside its MLP.
            backbone_head_dim: Channels an attention head of the backbone: bounds the default of
                ``head_dim`` for the init "pruned", which cuts heads out of the backbone's.

        Raises:
            ConfigError: If the sizes do not fit each other.
        """
        width = self.side_width(hidden_size)
        ratio = intermediate_size / hidden_size if self.mlp_ratio is None else self.mlp_ratio
        mlp_width = max(1, round(ratio * width))
        if not BLOCKS[self.block].cached:
            return SideShape(width=width, head_dim=0, mlp_width=mlp_width)
        if width % 2:
            found, name = (self.width, "width") if self.width else (self.reduction, "reduction")
            raise _wrong(
                name,
                found,
                f"it makes the ladder {width} wide; transformer blocks need an even width "
                "(block='mlp' does not)",
            )
        if self.head_dim is not None:
            if width % self.head_dim:
                raise _wrong(
                    "head_dim", self.head_dim, f"it must divide the ladder's width {width}"
                )
            return SideShape(width=width, head_dim=self.head_dim, mlp_width=mlp_width)
        largest = _LARGEST_HEAD
        if self.init == "pruned" and backbone_head_dim is not None:
            largest = min(largest, backbone_head_dim)
        head_dim = max(n for n in range(2, largest + 1, 2) if width % n == 0)
        return SideShape(width=width, head_dim=head_dim, mlp_width=mlp_width)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, without what does not belong to its kind."""
        values = asdict(self)
        for name in {name for own in _KIND_FIELDS.values() for name in own}:
            if values[name] is None:
                del values[name]
        if self.rungs is not None:
            values["rungs"] = [list(rung) for rung in self.rungs]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LadderConfig:
        """The reverse of :meth:`to_dict`; missing fields take their defaults.

        Raises:
            ConfigError: If a key is unknown or a value not allowed.
        """
        allowed = [option.name for option in fields(cls)]
        unknown = sorted(set(values) - set(allowed))
        if unknown:
            raise ConfigError(
                f"ladder: found unknown {', '.join(map(repr, unknown))}; allowed are "
                f"{', '.join(allowed)}"
            )
        return cls(**values)


def _wrong(name: str, found: object, allowed: str) -> ConfigError:
    return ConfigError(f"ladder.{name}: found {found!r}; {allowed}")


def _one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    names = list(allowed)
    if value not in names:
        raise _wrong(name, value, f"allowed are {', '.join(map(repr, names))}")


def _integer(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise _wrong(name, value, f"it must be a whole number, {at_least} or more")


def _positive(name: str, value: object) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value <= 0
    ):
        raise _wrong(name, value, "it must be a number above 0")


def _checked_reentry(value: object) -> float:
    """Whole numbers as such: a command line may give 8.0."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value >= 0 and value == int(value if math.isfinite(value) else -1):
            return int(value)
        if 0 < value < 1:
            return value
    raise _wrong("reentry", value, "it must be a whole number, 0 or more, or a share below 1")


def _checked_rungs(rungs: object) -> tuple[tuple[int, ...], ...]:
    allowed = "it must be a list of rungs, each a list of layers, such as [[1], [2, 3], []]"
    if not isinstance(rungs, Sequence) or isinstance(rungs, str) or not rungs:
        raise _wrong("rungs", rungs, allowed)
    checked = []
    for index, rung in enumerate(rungs):
        if not isinstance(rung, Sequence) or isinstance(rung, str):
            raise _wrong(f"rungs[{index}]", rung, allowed)
        for layer in rung:
            _integer(f"rungs[{index}]", layer, at_least=0)
        if len(set(rung)) < len(rung):
            raise _wrong(f"rungs[{index}]", list(rung), "a rung taps a layer at most once")
        checked.append(tuple(rung))
    if not any(checked):
        raise _wrong(
            "rungs", [list(rung) for rung in checked], "at least one rung must tap a layer"
        )
    return tuple(checked)


def tap_dtype_of(value: str | torch.dtype) -> torch.dtype:
    """The dtype that a name of :data:`TAP_DTYPES` means; such a dtype is returned as it is.

    Raises:
        ConfigError: If it is none of them.
    """
    for name, dtype in TAP_DTYPES.items():
        if value in (name, dtype):
            return dtype
    raise ConfigError(f"tap_dtype: found {value!r}; allowed are {', '.join(map(repr, TAP_DTYPES))}")


def check_activations(value: str) -> None:
    """Refuse what is not one of :data:`~ladder_kernels.nn.linear.ACTIVATIONS`.

    Raises:
        ConfigError: Naming those.
    """
    if value not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ConfigError(f"activations: found {value!r}; allowed are {allowed}")


class LadderModelConfig(PreTrainedConfig):
    """The configuration of a :class:`~ladder_kernels.models.modeling.LadderForCausalLM`.

    ``num_hidden_layers`` counts the layers that have keys and values: the backbone's and then the
    side blocks with attention, because transformers makes caches of that many layers.

    Args:
        ladder: A :class:`LadderConfig` or its :meth:`~LadderConfig.to_dict`.
        base_config: The transformers configuration of the base model, as a dictionary.
        base_name_or_path: Where the base comes from: hub name or path, as it was given.
        base_fingerprint: Of the base's weights, see
            :class:`~ladder_kernels.models.backbone.Backbone`.
        base_quantization: ``blocksize``, ``double_quant``, ``quantize_head``, ``calibrated`` and,
            for a base in a GGUF file, ``gguf_file``: how the base was made from
            ``base_name_or_path``.
        tap_dtype: Name of the dtype that taps are kept in.
        activations: How the backbone's quantised layers take their inputs in the frozen pass:
            "exact" or "int8".
        return_logits: Whether a forward with labels returns logits too.
        use_cache: Whether a forward returns a cache where the caller does not say.
        **options: What every transformers configuration takes.
    """

    model_type = "ladder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        ladder: LadderConfig | Mapping[str, Any] | None = None,
        base_config: Mapping[str, Any] | None = None,
        base_name_or_path: str = "",
        base_fingerprint: str = "",
        base_quantization: Mapping[str, Any] | None = None,
        tap_dtype: str = "bfloat16",
        activations: str = "exact",
        return_logits: bool = False,
        use_cache: bool = True,
        **options: Any,
    ) -> None:
        self.ladder = ladder.to_dict() if isinstance(ladder, LadderConfig) else dict(ladder or {})
        self.base_config = dict(base_config or {})
        self.base_name_or_path = base_name_or_path
        self.base_fingerprint = base_fingerprint
        self.base_quantization = dict(base_quantization or {})
        self.tap_dtype = tap_dtype
        self.activations = activations
        self.return_logits = return_logits
        self.use_cache = use_cache
        super().__init__(**options)

    @property
    def ladder_config(self) -> LadderConfig:
        """``ladder`` as a checked :class:`LadderConfig`."""
        return LadderConfig.from_dict(self.ladder)

    @classmethod
    def for_backbone(
        cls,
        backbone: Backbone,
        ladder: LadderConfig,
        *,
        tap_dtype: str = "bfloat16",
        activations: str = "exact",
        gguf_file: str | None = None,
    ) -> LadderModelConfig:
        """The configuration of ``ladder`` on ``backbone``."""
        base = backbone.config
        side_layers = len(ladder.resolve(backbone.num_layers)) if BLOCKS[ladder.block].cached else 0
        shared = (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id", "final_logit_softcapping",
        )  # fmt: skip
        options = {name: getattr(base, name) for name in shared if hasattr(base, name)}
        quantization = asdict(backbone.quantization)
        if gguf_file is not None:
            quantization["gguf_file"] = gguf_file
        return cls(
            ladder=ladder,
            base_config=json.loads(base.to_json_string()),
            base_name_or_path=backbone.name_or_path,
            base_fingerprint=backbone.fingerprint,
            base_quantization=quantization,
            tap_dtype=tap_dtype,
            activations=activations,
            num_hidden_layers=backbone.num_layers + side_layers,
            layer_types=_cache_layers(base, backbone.num_layers) + ["full_attention"] * side_layers,
            tie_word_embeddings=False,
            **options,
        )


def _cache_layers(base: Any, num_layers: int) -> list[str]:
    """Kinds of cache layer for the backbone.

    Windows are applied by masks over all keys, so every attention layer keeps all of them; layers
    that keep a state of another kind (linear attention, convolutions) are left as they are.
    """
    kinds = getattr(base, "layer_types", None) or ["full_attention"] * num_layers
    windows = ("sliding_attention", "chunked_attention")
    return ["full_attention" if kind in windows else kind for kind in kinds]
