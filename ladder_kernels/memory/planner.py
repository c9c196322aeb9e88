"""Which settings fit a budget, and which of those are fastest: before any download.

Bytes are computed from shapes (:mod:`ladder_kernels.memory.step`). Times are *modelled*, from
operations and bytes moved and round figures of a device, and serve to put settings in order, no
more. A choice that changes numbers (an NF4 head, taps in int8, optimizer states in 8 bits) counts
as if it cost two per cent of the time, so that it is made where it saves more than that, or nothing
else fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ladder_kernels.errors import ConfigError
from ladder_kernels.memory.qlora import qlora_stages
from ladder_kernels.memory.settings import Settings, Stage
from ladder_kernels.memory.sizes import LadderSizes, ModelSizes
from ladder_kernels.memory.step import step_stages
from ladder_kernels.models.config import LadderConfig
from ladder_kernels.nn.slices import SMALLEST_SLICE

__all__ = ["RUNTIME", "Plan", "Planner", "gigabytes", "in_words", "parse_bytes"]

RUNTIME = 600_000_000
"""Bytes that a process takes besides tensors: Python and its libraries, a GPU's context, what
allocators keep, kernels' scratch. A round figure."""

_SLICES = (None, 4096, 2048, 1024, 512, 256, SMALLEST_SLICE)
_TAPS = {"cuda": ("device", "host", "disk"), "cpu": ("device", "disk")}
_WEIGHTS = {"cuda": ("resident", "host", "streamed"), "cpu": ("resident", "streamed")}
_LOSSY = 0.02
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class _Device:
    """Round figures of a device: operations a second, bytes a second from its host and a disk."""

    operations: float
    link: float
    disk: float


_DEVICES = {"cuda": _Device(5e13, 1.2e10, 2e9), "cpu": _Device(2e11, 1e10, 2e9)}


def parse_bytes(text: str, name: str = "budget") -> int:
    """Bytes as people write them: ``"6GB"``, ``"11.5 GiB"``, ``"800MB"``, ``"6000000000"``.

    Args:
        text: A number and a unit, of thousands or, with an ``i``, of 1,024.
        name: Of the option, for the message.

    Raises:
        ConfigError: If it is none.
    """
    compact = text.strip().lower().replace(" ", "").replace("_", "")
    number = compact.rstrip("bkmgti")
    factor = _UNITS.get(compact[len(number) :])
    try:
        value = float(number) if factor is not None else 0.0
    except ValueError:
        value = 0.0
    if factor is None or not 0 < value < float("inf"):
        raise ConfigError(f"{name}: found {text!r}; it must be a size such as 6GB or 11.5GiB")
    return int(value * factor)


@dataclass(frozen=True)
class Plan:
    """Settings, and what they take.

    Attributes:
        settings: Of the step.
        quantize_head: Whether the head is NF4.
        stages: Of the step.
        seconds: Modelled time of an optimizer step.
        changes: Choices that change numbers, in words.
    """

    settings: Settings
    quantize_head: bool
    stages: Sequence[Stage]
    seconds: float
    changes: tuple[str, ...]

    @property
    def peak(self) -> Stage:
        """The largest stage."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def bytes(self) -> int:
        """What the process needs: the peak, and :data:`RUNTIME`."""
        return self.peak.total + RUNTIME

    def options(self) -> dict[str, Any]:
        """The settings as options of ``train``."""
        settings = self.settings
        names = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "sgd": "sgd"}
        return {
            "weights": settings.weights,
            "embeddings": settings.embeddings,
            "quantize_head": self.quantize_head,
            "taps": settings.taps,
            "tap_dtype": settings.tap_dtype,
            "slice_tokens": settings.slice_tokens,
            "gradient_checkpointing": settings.recompute,
            "batch_size": settings.batch_size,
            "gradient_accumulation": settings.gradient_accumulation,
            "optimizer": names[settings.optimizer],
            "free_gradients": settings.free_gradients,
        }


class Planner:
    """Plans training steps of one model and ladder.

    Args:
        config: The model's transformers configuration.
        ladder: Beside it.
        device: "cuda" or "cpu".
        context: Tokens a row.
        rows: Rows of an optimizer step.
        element: Bytes of a number of the compute dtype.
        choices: What may be chosen, best first, where that is not everything: by field of
            :class:`~ladder_kernels.memory.settings.Settings`, or ``quantize_head``.
        documents: Whether rows are packed with several documents.
        clips: Whether gradients are clipped to a norm, so that all must be there at once.
        blocksize: Weights that share a scale.
        double_quant: Whether the scales are quantised too.

    Raises:
        UnsupportedModelError: If the model's memory is not known beforehand.
        ConfigError: If the ladder does not fit the model, or a number is out of range.
    """

    def __init__(
        self,
        config: Any,
        ladder: LadderConfig,
        *,
        device: str = "cuda",
        context: int = 2048,
        rows: int = 1,
        element: int = 2,
        choices: Mapping[str, Sequence[Any]] | None = None,
        documents: bool = False,
        clips: bool = True,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> None:
        for name, value, least in (("context", context, 2), ("rows", rows, 1)):
            if value < least:
                raise ConfigError(f"{name}: found {value}; it must be {least} or more")
        self.rows, self.clips = rows, clips
        self.choices = dict(choices or {})
        self._models = {
            nf4: ModelSizes(
                config,
                element=element,
                blocksize=blocksize,
                double_quant=double_quant,
                quantize_head=nf4,
            )
            for nf4 in (False, True)
        }
        self.ladder = LadderSizes(ladder, self._models[False])
        self.start = Settings(
            device=device,  # type: ignore[arg-type]
            context=context,
            element=element,
            documents=documents,
        )

    @property
    def model(self) -> ModelSizes:
        """The model, its head in the compute dtype."""
        return self._models[False]

    # Plans ----------------------------------------------------------------------------------------

    def plan(self, settings: Settings, *, quantize_head: bool = False) -> Plan:
        """What certain settings take.

        Args:
            settings: Of the step.
            quantize_head: Whether the head is NF4.
        """
        stages = step_stages(self._models[quantize_head], self.ladder, settings)
        seconds = self._seconds(settings)
        return Plan(settings, quantize_head, stages, seconds, _changes(settings, quantize_head))

    def usual(self) -> Plan:
        """The first of all choices, and all rows at once."""
        first = {name: values[0] for name, values in self.choices.items()}
        quantize_head = bool(first.pop("quantize_head", False))
        first.setdefault("batch_size", self.rows)
        if first.get("weights") == "streamed":
            first.setdefault("embeddings", "host")
        accumulation = self.rows // first["batch_size"]
        settings = replace(self.start, gradient_accumulation=accumulation, **first)
        return self.plan(settings, quantize_head=quantize_head)

    def fastest(self, budget: int) -> Plan:
        """The fastest settings that fit.

        Args:
            budget: Bytes, :data:`RUNTIME` included.

        Raises:
            ConfigError: If none fit; the message says what the smallest ones need.
        """
        for settings, quantize_head in sorted(
            self._candidates(), key=lambda each: self._cost(*each)
        ):
            found = self.plan(settings, quantize_head=quantize_head)
            if found.bytes <= budget:
                return found
        smallest = self.smallest()
        raise ConfigError(
            f"budget: found {gigabytes(budget)}, but {self.start.context:,} tokens a row need "
            f"{gigabytes(smallest.bytes)} at least ({in_words(smallest)}); allowed is that or "
            "more, a shorter context, or a smaller ladder"
        )

    def smallest(self) -> Plan:
        """The settings that take least, whatever the time."""
        candidates = [
            (settings, quantize_head)
            for settings, quantize_head in self._candidates()
            if settings.slice_tokens == self._choices("slice_tokens", _SLICES)[-1]
            and settings.batch_size == self._batches()[0]
        ]
        plans = (self.plan(settings, quantize_head=nf4) for settings, nf4 in candidates)
        return min(plans, key=lambda plan: (plan.bytes, len(plan.changes), plan.seconds))

    def longest_context(self, plan: Plan, budget: int, most: int) -> int:
        """The longest row that fits with the settings of a plan.

        Args:
            plan: Whose settings.
            budget: Bytes, :data:`RUNTIME` included.
            most: The longest that is of interest.

        Returns:
            Tokens; 0 if not even two do.
        """

        def total(context: int) -> int:
            settings = replace(plan.settings, context=context)
            return self.plan(settings, quantize_head=plan.quantize_head).bytes

        return _longest(total, budget, most)

    # QLoRA ----------------------------------------------------------------------------------------

    def qlora(self, *, rank: int = 16, checkpointing: bool, context: int | None = None) -> Stage:
        """The peak of a step of QLoRA on the same model and rows, one row a micro-batch.

        Args:
            rank: Of the adapters, on all linear layers.
            checkpointing: Whether blocks are recomputed.
            context: Tokens a row; default as planned.
        """
        settings = replace(
            self.start,
            context=context or self.start.context,
            gradient_accumulation=self.rows,
        )
        stages = qlora_stages(self.model, settings, rank=rank, checkpointing=checkpointing)
        return max(stages, key=lambda stage: stage.total)

    def longest_qlora(self, *, rank: int = 16, checkpointing: bool, budget: int, most: int) -> int:
        """As :meth:`longest_context`, of QLoRA."""

        def total(context: int) -> int:
            peak = self.qlora(rank=rank, checkpointing=checkpointing, context=context)
            return peak.total + RUNTIME

        return _longest(total, budget, most)

    # Candidates -----------------------------------------------------------------------------------

    def _choices(self, name: str, choices: Sequence[Any]) -> list[Any]:
        if name in self.choices:
            return list(self.choices[name])
        if name == "slice_tokens":
            tokens = self.start.context
            return [size for size in choices if size is None or size < tokens]
        return list(choices)

    def _batches(self) -> list[int]:
        """Sizes of micro-batches, smallest first."""
        divisors = [size for size in range(1, self.rows + 1) if self.rows % size == 0]
        return self._choices("batch_size", divisors)

    def _candidates(self) -> Iterator[tuple[Settings, bool]]:
        device, start = self.start.device, self.start
        heads = [False] if self.model.tied and device == "cpu" else [False, True]
        for weights, embeddings, quantize_head, taps, tap_dtype in itertools.product(
            self._choices("weights", _WEIGHTS[device]),
            self._choices("embeddings", ("device", "host")),
            self._choices("quantize_head", heads),
            self._choices("taps", _TAPS[device]),
            self._choices("tap_dtype", ("bfloat16", "int8")),
        ):
            # The head would be needed where the embeddings are not.
            apart = device == "cuda" or start.element == 4
            if embeddings == "host" and self.model.tied and not quantize_head and apart:
                continue
            decided = "embeddings" in self.choices
            if weights == "streamed" and embeddings == "device" and not decided:
                continue
            for size, recompute, optimizer, free, batch in itertools.product(
                self._choices("slice_tokens", _SLICES),
                self._choices("recompute", (False, True)),
                self._choices("optimizer", ("adamw", "adamw_8bit")),
                self._choices("free_gradients", (False,) if self.clips else (False, True)),
                self._batches(),
            ):
                yield (
                    replace(
                        start,
                        weights=weights,
                        embeddings=embeddings,
                        taps=taps,
                        tap_dtype=tap_dtype,
                        slice_tokens=size,
                        recompute=recompute,
                        optimizer=optimizer,
                        free_gradients=free,
                        batch_size=batch,
                        gradient_accumulation=self.rows // batch,
                    ),
                    quantize_head,
                )

    # Times ----------------------------------------------------------------------------------------

    def _cost(self, settings: Settings, quantize_head: bool) -> float:
        lossy = len(_changes(settings, quantize_head))
        return self._seconds(settings) * (1 + _LOSSY * lossy)

    def _seconds(self, settings: Settings) -> float:
        """Modelled time of an optimizer step."""
        model, ladder, device = self.model, self.ladder, _DEVICES[settings.device]
        tokens = self.rows * settings.context
        block = model.block_parameters() + settings.context * model.query_width
        again = 1 if settings.recompute or settings.streams else 0
        frozen = 2 * tokens * block * ladder.stop
        top = (4 + 2 * again) * tokens * block * ladder.reentry
        side = (6 + 2 * again) * tokens * ladder.parameters()
        head = 4 * tokens * model.vocabulary * model.width
        # Few tokens at a time keep a device less busy.
        frozen *= 1 + 32 / (settings.slice_tokens or 1 << 20)
        busy = settings.tokens / (settings.tokens + 128)
        operations = (frozen + top + side + head) / (device.operations * busy)
        rate = {"resident": float("inf"), "host": device.link, "streamed": device.disk}
        passes = settings.gradient_accumulation / settings.together
        above = 2 * settings.gradient_accumulation * ladder.reentry
        read = model.packed_block() * (passes * ladder.stop + above) / rate[settings.weights]
        width = model.width * (1 if settings.tap_dtype == "int8" else 2)
        moved = 2 * tokens * len(ladder.tap_layers) * width
        waiting = {"device": 0.0, "host": moved / device.link, "disk": moved / device.disk}
        # Copies run beside the computation, and cost a little of it.
        seconds = max(operations, read) + 0.1 * min(operations, read)
        seconds = max(seconds, waiting[settings.taps]) + 0.1 * waiting[settings.taps]
        small = 0.002 * (settings.embeddings == "host") + 0.001 * settings.free_gradients
        small += 0.005 * (settings.tap_dtype == "int8") + 0.001 * (settings.optimizer != "adamw")
        return seconds * (1 + small)


def _changes(settings: Settings, quantize_head: bool) -> tuple[str, ...]:
    return tuple(
        words
        for chosen, words in (
            (quantize_head, "the output head is NF4"),
            (settings.tap_dtype == "int8", "taps are rounded to 8 bits"),
            (settings.optimizer == "adamw_8bit", "the optimizer's states have 8 bits"),
        )
        if chosen
    )


def in_words(plan: Plan) -> str:
    """The settings of a plan that are not the usual ones."""
    usual = {field.name: field.default for field in fields(Settings)}
    options = {
        "weights": plan.settings.weights,
        "embeddings": plan.settings.embeddings,
        "taps": plan.settings.taps,
        "tap_dtype": plan.settings.tap_dtype,
        "slice_tokens": plan.settings.slice_tokens,
        "optimizer": plan.settings.optimizer,
        "batch_size": plan.settings.batch_size,
        "gradient_accumulation": plan.settings.gradient_accumulation,
    }
    words = [f"{name} {value}" for name, value in options.items() if value != usual[name]]
    words += ["gradient_checkpointing"] if plan.settings.recompute else []
    words += ["quantize_head"] if plan.quantize_head else []
    words += ["free_gradients"] if plan.settings.free_gradients else []
    return ", ".join(words) or "the usual settings"


def gigabytes(size: int) -> str:
    """Bytes as text, rounded up: what is named is enough."""
    return f"{-(-size // 10**7) / 100:.2f} GB"


def _longest(total: Any, budget: int, most: int) -> int:
    """The largest number up to ``most`` whose total fits; totals grow."""
    if total(2) > budget:
        return 0
    fits, exceeds = 2, most + 1
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if total(middle) <= budget:
            fits = middle
        else:
            exceeds = middle
    return fits
