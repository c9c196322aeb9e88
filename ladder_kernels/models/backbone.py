"""The frozen model beneath a ladder: what every kind of backbone offers.

A backbone runs forward only. :meth:`Backbone.frozen_pass` fills the taps under ``inference_mode``
and :meth:`Backbone.logits` applies the frozen end of the model, through which gradients may flow.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.memory.placement import ON_DEVICE
from ladder_kernels.memory.taps import DeviceTaps, TapEncoding, TapPlan, TapRecord, TapStore
from ladder_kernels.models.frozen_pass import FrozenInput, FrozenPass, Work
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.adapter import BlockAdapters
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.linear import NF4Linear
from ladder_kernels.nn.slices import SMALLEST_SLICE
from ladder_kernels.ops import nf4_linear

__all__ = ["Backbone", "Quantization"]


@dataclass(frozen=True)
class Quantization:
    """How a backbone's float weights were turned into NF4.

    Attributes:
        blocksize: Weights that share a scale, for weights quantised here; weights that came
            quantised keep their own.
        double_quant: Whether the scales are themselves quantised.
        quantize_head: Whether the output head is NF4 too.
        calibrated: Whether they were rounded for the inputs that some texts gave. Another machine
            may round a few otherwise: such a base is known by its weights, not by how it was made.
    """

    blocksize: int = 64
    double_quant: bool = True
    quantize_head: bool = False
    calibrated: bool = False


class Backbone(nn.Module):
    """A frozen NF4 language model.

    Weights are buffers without gradients. Moving (``.to(device)``) takes everything along; casting
    (``.to(dtype)``) changes the compute dtype and leaves the quantised weights as they are.

    Attributes:
        runs_on: ``"ladder_kernels"`` for a model of our own, ``"transformers"`` for the slower way
            through the layers of transformers.
        reenters: Whether a ladder's output may enter it again below some of its layers, through
            which gradients pass then.
        slices: Whether a frozen pass can take tokens in slices (:attr:`slice_tokens`).
        config: The transformers configuration of the base model.
        quantization: How float weights were quantised.
        placement: Where its weights are.
        fingerprint: sha256 (hex) of the weights and of the configuration that changes the function.
        name_or_path: Where the base came from, as the user gave it.
        softcap: Cap of ``cap * tanh(logits / cap)``, or ``None``.
        logit_scale: Factor on the logits.
        head_bias: ``[V]`` or ``None``.
    """

    runs_on: ClassVar[str]
    reenters: ClassVar[bool]
    slices: ClassVar[bool] = False
    head_bias: torch.Tensor | None

    def __init__(
        self,
        config: Any,
        *,
        quantization: Quantization,
        fingerprint: str = "",
        name_or_path: str = "",
    ) -> None:
        super().__init__()
        self.config = config
        self.quantization = quantization
        self.placement = ON_DEVICE
        self.fingerprint = fingerprint
        self.name_or_path = name_or_path
        self.softcap: float | None = None
        self.logit_scale = 1.0
        self._rounded_below = 0
        self._slice_tokens: int | None = None
        self.register_buffer("head_bias", None, persistent=False)

    @property
    @abstractmethod
    def embedding(self) -> torch.Tensor:
        """The token embeddings ``[V, D]`` in the compute dtype."""

    @property
    @abstractmethod
    def head(self) -> torch.Tensor | NF4Weight:
        """The output head ``[V, D]``: in the compute dtype, or NF4."""

    @abstractmethod
    def _run(self, works: Sequence[Work], stop: int) -> None:
        """Run the first ``stop`` layers, each over all works before the next.

        Each work's ``emit`` gets ``h[t]`` for ``t`` in ``0..stop``. Tokens are on the device,
        embeddings among them in the compute dtype.
        """

    @abstractmethod
    def _block_modules(self) -> Sequence[nn.Module]:
        """The blocks, bottom first."""

    def _top(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        cache: Any,
        start: int,
        adapters: Sequence[BlockAdapters],
        recompute: bool,
    ) -> torch.Tensor:
        """Run the layers after the first ``start``; see :meth:`top_pass`.

        A backbone that a ladder cannot re-enter has none to run.
        """
        self.check_reentry(self.num_layers - start)
        return hidden

    @property
    def slice_tokens(self) -> int | None:
        """About how many tokens of a frozen pass are inside a layer at once; ``None``: all.

        Slices bound what a layer needs beside the residual stream, whatever the context, and cost
        little time. On the native kernels they change no bit. Setting raises a
        :class:`~ladder_kernels.errors.ConfigError` for less than
        :data:`~ladder_kernels.nn.slices.SMALLEST_SLICE`, and for any number where layers run on
        transformers.
        """
        return self._slice_tokens

    @slice_tokens.setter
    def slice_tokens(self, value: int | None) -> None:
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < SMALLEST_SLICE:
                raise ConfigError(
                    f"slice_tokens: found {value!r}; it must be a whole number, {SMALLEST_SLICE} "
                    "or more, or None"
                )
            if not self.slices:
                raise ConfigError(
                    f"slice_tokens: found {value}, but '{self.config.model_type}' runs on "
                    f"{self.runs_on}, whose layers take all tokens at once; allowed is None"
                )
        self._slice_tokens = value

    def check_reentry(self, reentry: int) -> None:
        """Refuse a re-entry below the last ``reentry`` layers where it is not possible.

        Raises:
            UnsupportedModelError: If gradients cannot pass through layers of this backbone.
        """
        if reentry and not self.reenters:
            raise UnsupportedModelError(
                f"ladder.reentry: found {reentry}, but '{self.config.model_type}' runs on "
                f"{self.runs_on}, whose top layers cannot be run apart; allowed is 0"
            )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(N, K)`` of the linear layers of a block, by role.

        Raises:
            UnsupportedModelError: If the blocks do not have these parts.
        """
        raise UnsupportedModelError(
            f"low-rank adapters on '{self.config.model_type}', which runs on {self.runs_on}, are "
            "not supported"
        )

    @abstractmethod
    def _final_norm(self, y: torch.Tensor) -> torch.Tensor:
        """The norm before the head, in the compute dtype."""

    @abstractmethod
    def named_weights(self) -> Iterator[tuple[str, torch.Tensor | NF4Weight]]:
        """Every weight once, by its name in a transformers checkpoint; linear ones ``[N, K]``."""

    def described_weights(self) -> Iterator[tuple[str, torch.Tensor | NF4Weight]]:
        """As :meth:`named_weights`, but the values need not be there."""
        return self.named_weights()

    def stored_weights(self) -> Iterator[tuple[str, torch.Tensor | NF4Weight]]:
        """As :meth:`named_weights`, each in the orientation that a checkpoint has it in."""
        return self.named_weights()

    @abstractmethod
    def float_linears(self) -> list[str]:
        """Linear layers that are not quantised, by module name in transformers."""

    @abstractmethod
    def block_weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The weights of one block as float tensors.

        Args:
            layer: Block index, ``0 <= layer < num_layers``.

        Returns:
            fp32 tensors by role: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``
            (``[N, K]``) and ``input_norm``, ``post_norm`` (``[D]``).

        Raises:
            UnsupportedModelError: If the blocks do not have these parts.
        """

    @property
    def num_layers(self) -> int:
        """Number of blocks, ``L``."""
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, ``D``."""
        return self.config.hidden_size

    @property
    @abstractmethod
    def intermediate_size(self) -> int:
        """Width inside the MLP."""

    @property
    def vocab_size(self) -> int:
        """Number of logits, ``V``."""
        return self.head.shape[0]

    @property
    def max_context(self) -> int | None:
        """Longest context that the model was made for; ``None`` when it names none."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def streams(self) -> bool:
        """Whether layers are brought to the device one after another, so that each costs time."""
        return False

    def close(self) -> None:
        """End what brings layers to the device; a no-op where nothing does.

        The same happens when the backbone is garbage-collected.
        """

    def num_parameters(self) -> int:
        """Number of weights of the base model; NF4 ones count as the matrices they stand for."""
        return sum(weight.numel for weight in self._quantized()) + sum(
            weight.numel() for weight in self._floats()
        )

    def nf4_bytes(self) -> int:
        """Bytes of all quantised weights, scales included."""
        return sum(weight.nbytes for weight in self._quantized())

    def _quantized(self) -> Iterator[NF4Weight]:
        return (each for _, each in self.described_weights() if isinstance(each, NF4Weight))

    def _floats(self) -> Iterator[torch.Tensor]:
        return (each for _, each in self.described_weights() if isinstance(each, torch.Tensor))

    def check_activations(self, activations: str) -> None:
        """Refuse a way of taking activations that a layer cannot go.

        Args:
            activations: One of :data:`~ladder_kernels.nn.linear.ACTIVATIONS`.

        Raises:
            ConfigError: For "int8", if the blocks of a layer's weight do not begin with its rows.
        """
        if activations == "exact":
            return
        for name, layer in self._nf4_layers():
            if layer.in_features % layer.blocksize:
                raise ConfigError(
                    f"activations: found {activations!r}, but the rows of {name} "
                    f"({layer.in_features}) are no whole number of blocks of {layer.blocksize}; "
                    "allowed are 'exact', or a smaller blocksize"
                )

    def _nf4_layers(self) -> Iterator[tuple[str, NF4Linear]]:
        """Every quantised layer of the frozen pass; the head, which comes after it, is none."""
        for name, module in self.named_modules():
            if isinstance(module, NF4Linear) and name != "nf4_head":
                yield name, module

    def frozen_pass(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        layout: SequenceLayout,
        tap_layers: Collection[int] = (),
        tap_dtype: torch.dtype | None = None,
        cache: Any = None,
        activations: str = "exact",
        stop: int | None = None,
        store: TapStore | None = None,
    ) -> FrozenPass:
        """Run the model without gradients and keep the tapped states.

        The computation runs in the backbone's own dtype, autocast or not, so that its results
        depend on nothing but its inputs.

        Args:
            input_ids: int64 ``[B, S]``.
            inputs_embeds: ``[B, S, D]`` instead of ``input_ids``; its gradient is not taken.
            layout: Positions, padding and documents of the batch.
            tap_layers: Layers ``t`` in ``0..L`` to keep (``0``: embeddings, ``L``: before the final
                norm).
            tap_dtype: Dtype of the taps, int8 among them
                (:class:`~ladder_kernels.memory.taps.TapEncoding`); default the compute dtype.
            cache: A transformers ``Cache``; layer ``i`` of the backbone uses its layer ``i``.
            activations: How quantised layers take their inputs, one of
                :data:`~ladder_kernels.nn.linear.ACTIVATIONS`; see :meth:`check_activations`.
            stop: Run this many layers only; default all. :meth:`top_pass` runs the others.
            store: Where taps wait; default on the model's device. Not with a ``cache``, which a
                store that knows the sequences already would leave unfilled.

        Returns:
            The taps and the last state, ``h[stop]``.

        Raises:
            ConfigError: If not exactly one input is given, a shape does not fit the layout, or a
                tap layer does not exist.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give exactly one of input_ids and inputs_embeds")
        tokens = inputs_embeds if input_ids is None else input_ids
        given = FrozenInput(tokens, layout, cache)  # type: ignore[arg-type]
        return self.frozen_passes(
            [given],
            tap_layers=tap_layers,
            tap_dtype=tap_dtype,
            activations=activations,
            stop=stop,
            store=store,
        )[0]

    def frozen_passes(
        self,
        inputs: Sequence[FrozenInput],
        *,
        tap_layers: Collection[int] = (),
        tap_dtype: torch.dtype | None = None,
        activations: str = "exact",
        stop: int | None = None,
        store: TapStore | None = None,
    ) -> list[FrozenPass]:
        """Run several micro-batches together: each layer is taken up once, for all of them.

        Args:
            inputs: The micro-batches.
            tap_layers: As for :meth:`frozen_pass`, and so are the others.
            tap_dtype: Dtype of the taps.
            activations: How quantised layers take their inputs.
            stop: Run this many layers only.
            store: Where taps wait. Sequences that it has already are not run again.

        Returns:
            What :meth:`frozen_pass` gives, for each micro-batch.

        Raises:
            ConfigError: If a shape does not fit its layout, a tap layer does not exist, or a cache
                is given together with a store.
        """
        stop = self.num_layers if stop is None else stop
        for layer in tap_layers:
            if not 0 <= layer <= stop:
                raise ConfigError(f"tap layer {layer} does not exist; allowed are 0 to {stop}")
        for given in inputs:
            layout = given.layout
            if tuple(given.tokens.shape[:2]) != (layout.batch, layout.length):
                raise ConfigError(
                    f"the inputs have shape {list(given.tokens.shape)}, the layout is for "
                    f"[{layout.batch}, {layout.length}]"
                )
            if given.cache is not None and store is not None:
                raise ConfigError("cache: found one together with a tap store; allowed is either")
        plan = self._plan(tap_layers, tap_dtype, activations, stop)
        store = DeviceTaps() if store is None else store
        records: list[TapRecord] = []
        try:
            for given in inputs:
                records.append(store.open(plan, given.tokens, given.layout, given.read))
            pairs = zip(inputs, records, strict=True)
            works = [self._work(given, record) for given, record in pairs if record.rows != []]
            if works:
                self._round_below(stop if activations == "int8" else 0)
                with torch.autocast(self.device.type, enabled=False), torch.inference_mode():
                    self._run(works, stop)
            for record in records:
                record.finish()
        except BaseException:
            for record in records:
                record.discard()
            raise
        return [FrozenPass(record) for record in records]

    def _plan(
        self,
        tap_layers: Collection[int],
        tap_dtype: torch.dtype | None,
        activations: str,
        stop: int,
    ) -> TapPlan:
        return TapPlan(
            layers=tuple(sorted(set(tap_layers))),
            stop=stop,
            width=self.hidden_size,
            encoding=TapEncoding(tap_dtype or self.dtype),
            dtype=self.dtype,
            device=self.device,
            activations=activations,
            fingerprint=self.fingerprint,
            base=self.name_or_path,
        )

    def _work(self, given: FrozenInput, record: TapRecord) -> Work:
        """What has to be run of a micro-batch, on the device."""
        tokens, layout = given.tokens, given.layout
        if record.rows is not None and len(record.rows) < layout.batch:
            tokens, layout = tokens[record.rows], layout.select(record.rows)
        tokens = tokens.to(self.device)
        if tokens.is_floating_point():
            tokens = tokens.to(self.dtype)
        return Work(tokens, layout.to(self.device), given.cache, emit=record.write)

    def top_pass(
        self,
        hidden: torch.Tensor,
        *,
        layout: SequenceLayout,
        start: int,
        adapters: Sequence[BlockAdapters] = (),
        cache: Any = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Run the layers above a re-entry, through which gradients may flow.

        Activations are exact above ``start``, whatever the frozen pass before took: rounded ones
        have no gradient. As that pass, it runs in the backbone's dtype, autocast or not.

        Args:
            hidden: The residual stream that enters layer ``start + 1``, ``[B, S, D]``.
            layout: Of the batch, the same as the frozen pass had.
            start: How many layers the frozen pass ran.
            adapters: Of each layer above that, or none at all.
            cache: A transformers ``Cache``; layer ``i`` of the backbone uses its layer ``i``.
            recompute: Keep each layer's input alone and run the layer again in the backward pass
                (gradient checkpointing): less memory, more time. Not with a cache, which must not
                be written to twice.

        Returns:
            ``y``, ``[B, S, D]`` in the compute dtype, before the final norm.

        Raises:
            UnsupportedModelError: See :meth:`check_reentry`.
        """
        self._round_below(min(self._rounded_below, start))
        with torch.autocast(self.device.type, enabled=False):
            states, placed = hidden.to(self.dtype), layout.to(self.device)
            recompute = recompute and cache is None and torch.is_grad_enabled()
            return self._top(states, placed, cache, start, adapters, recompute)

    def _round_below(self, stop: int) -> None:
        """Let quantised layers take rounded inputs in the first ``stop`` blocks, exact ones above.

        A no-op from one step to the next.
        """
        if stop == self._rounded_below:
            return
        for _, linear in self._nf4_layers():
            linear.activations = "exact"
        for block in list(self._block_modules())[:stop]:
            for layer in block.modules():
                if isinstance(layer, NF4Linear):
                    layer.activations = "int8"
        self._rounded_below = stop

    def final_norm(self, y: torch.Tensor) -> torch.Tensor:
        """The frozen norm before the head.

        Args:
            y: ``[..., D]``.

        Returns:
            ``[..., D]`` in the compute dtype, differentiable in ``y``.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self._final_norm(y.to(self.dtype))

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        """``softcap(scale * head(final_norm(y)) + bias)``.

        Args:
            y: ``[..., D]``, a state before the final norm.

        Returns:
            ``[..., V]`` in the compute dtype, differentiable in ``y``.
        """
        normed = self.final_norm(y)
        with torch.autocast(self.device.type, enabled=False):
            head, scaled = self.head, self.logit_scale != 1.0
            bias = None if scaled else self.head_bias
            if isinstance(head, NF4Weight):
                out = nf4_linear(normed, head, bias)
            else:
                out = nn.functional.linear(normed, head, bias)
            if scaled:
                out = out * self.logit_scale
                if self.head_bias is not None:
                    out = out + self.head_bias
            if self.softcap is not None:
                out = self.softcap * torch.tanh(out / self.softcap)
        return out

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this library, and transformers with bitsandbytes, load.

        It holds ``config.json`` with a ``quantization_config`` and ``model.safetensors`` with the
        keys of bitsandbytes. It is written beside its place and renamed, so it is whole or absent.

        Args:
            folder: To be made; an empty folder may exist.

        Raises:
            OutputExistsError: If the folder exists and is not empty.
        """
        from ladder_kernels.models.saving import save_backbone

        save_backbone(self, Path(folder))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.config.model_type}, {self.num_layers} layers, "
            f"hidden {self.hidden_size}, {self.num_parameters() / 1e6:.1f} M parameters, "
            f"{self.nf4_bytes() / 1e6:.1f} MB of NF4, {str(self.dtype).removeprefix('torch.')} on "
            f"{self.device})"
        )
