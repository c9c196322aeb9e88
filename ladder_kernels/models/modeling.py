"""A frozen backbone and its ladder as one transformers model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ladder_kernels.errors import ConfigError
from ladder_kernels.memory.placement import Placement
from ladder_kernels.memory.tap_stores import tap_store_of
from ladder_kernels.memory.taps import DeviceTaps, TapStore
from ladder_kernels.models import checkpoint, pretrained
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.config import (
    LadderConfig,
    LadderModelConfig,
    check_activations,
    tap_dtype_of,
)
from ladder_kernels.models.frozen_pass import FrozenInput, FrozenPass
from ladder_kernels.models.headless import Headless
from ladder_kernels.models.ladder import Ladder
from ladder_kernels.models.prefilled import Prefilled
from ladder_kernels.models.vocabulary import FrozenVocabulary
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.ops import linear_cross_entropy

__all__ = ["LadderForCausalLM"]

_IGNORE = -100


class LadderForCausalLM(FrozenVocabulary, PreTrainedModel, GenerationMixin):
    """A causal language model whose backbone is frozen and whose ladder is trained.

    Make one with :meth:`from_pretrained` or :meth:`from_backbone`. It behaves as a transformers
    model: ``transformers.Trainer`` drives it, ``generate`` works (greedy, sampling, beams, batches
    with padding on the left), and ``save_pretrained`` stores the ladder with the name and
    fingerprint of its base.

    The backbone follows ``.to(...)`` but is no submodule: it is in no ``state_dict`` and no
    ``parameters()``, so optimisers, distributed training and checkpoints deal with the ladder only.
    The ladder's parameters are float32 unless the model is cast.

    ``model.gradient_checkpointing_enable()`` is for small memory: a training step then keeps what
    enters each rung, and each layer above a re-entry, and computes the rest again in its backward
    pass. Gradients are the same by bits.

    ``model.ladder.compile(fullgraph=True)`` compiles the side pass, all that is trained below a
    re-entry, with ``torch.compile``: one graph, forward and backward, and a second one when the
    number of labelled tokens first changes. State dicts and checkpoints stay the same. Within it,
    the backend of the gradients is the one in force where ``backward()`` is called.

    Args:
        config: See :class:`~ladder_kernels.models.config.LadderModelConfig`.
        backbone: The frozen model that ``config`` was made for.

    Attributes:
        config: As above.
        ladder: The trained part.
        tap_store: Where taps wait between the two passes of a training step. Evaluation and
            generation keep them on the device, whatever it is.
    """

    config_class = LadderModelConfig
    base_model_prefix = "ladder"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True

    config: LadderModelConfig
    _backbone: Backbone

    def __init__(self, config: LadderModelConfig, backbone: Backbone) -> None:
        super().__init__(config)
        check_activations(config.activations)
        backbone.check_activations(config.activations)
        backbone.check_reentry(config.ladder_config.reentry_layers(backbone.num_layers))
        # Past nn.Module's own bookkeeping, which would register it.
        object.__setattr__(self, "_backbone", backbone)
        self.ladder = Ladder.for_backbone(config.ladder_config, backbone)
        self.tap_dtype = tap_dtype_of(config.tap_dtype)
        self.tap_store: TapStore = DeviceTaps()
        self._prefilled: dict[SequenceLayout, Prefilled] = {}
        self._ladder_enabled = True
        # Of the rungs, the output and the layers above a re-entry; set by transformers'
        # gradient_checkpointing_enable().
        self.gradient_checkpointing = False
        self.post_init()

    # Making one -----------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        ladder: LadderConfig | None = None,
        *,
        weights: str | None = None,
        embeddings: str | None = None,
        taps: str | TapStore = "device",
        tap_dtype: str | torch.dtype = "bfloat16",
        tap_cache: str | os.PathLike[str] | None = None,
        tap_cache_bytes: int | None = None,
        activations: str = "exact",
        gguf_file: str | None = None,
    ) -> LadderForCausalLM:
        """Put a new ladder beside a backbone in memory.

        Args:
            backbone: The frozen model; it is not copied.
            ladder: Shape of the ladder; default :meth:`LadderConfig.recommended`.
            weights: Where the backbone's weights live, if it shall be checked: its loader decided.
            embeddings: The same of its embeddings.
            taps: Where taps wait between the two passes of a training step: "device", the model's;
                "host", in page-locked memory of the host; "disk", in files that are kept, so that
                sequences that come again skip the frozen pass; or a store. Memory on a GPU is saved
                together with ``gradient_checkpointing_enable()``; without it, autograd holds every
                tap until the backward pass.
            tap_dtype: What taps are kept in: "bfloat16", "float16", "float32", or "int8", with a
                scale for each token. Losses are those of the plain model by bits where it is the
                compute dtype.
            tap_cache: With "disk": the folder of the files, made where it is missing.
            tap_cache_bytes: With "disk": most bytes of those files; default no limit.
            activations: How the backbone's NF4 layers take their inputs: "exact", or "int8",
                rounded to 8 bits (:func:`~ladder_kernels.ops.nf4_linear_int8`): faster, and a
                little different. The frozen pass carries no gradient, so nothing else changes.
            gguf_file: Recorded with a saved ladder: the file in the base's folder that it was read
                from.

        Returns:
            The model, in evaluation mode.

        Raises:
            ConfigError: If an option is not allowed or the ladder does not fit the backbone.
        """
        pretrained.check_as_placed(backbone, weights, embeddings)
        store = tap_store_of(taps, cache=tap_cache, limit=tap_cache_bytes)
        store.check(backbone.fingerprint, backbone.name_or_path)
        dtype = tap_dtype_of(tap_dtype)
        ladder = LadderConfig.recommended() if ladder is None else ladder
        config = LadderModelConfig.for_backbone(
            backbone,
            ladder.settled(backbone.num_layers, reenters=backbone.reenters),
            tap_dtype=str(dtype).removeprefix("torch."),
            activations=activations,
            gguf_file=gguf_file,
        )
        model = cls(config, backbone)
        model.tap_store = store
        model.generation_config = GenerationConfig.from_model_config(backbone.config)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        ladder: LadderConfig | None = None,
        weights: str | None = None,
        embeddings: str | None = None,
        taps: str | TapStore = "device",
        tap_dtype: str | torch.dtype | None = None,
        tap_cache: str | os.PathLike[str] | None = None,
        tap_cache_bytes: int | None = None,
        activations: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        blocksize: int | None = None,
        double_quant: bool | None = None,
        quantize_head: bool | None = None,
        gguf_file: str | None = None,
        calibration: Sequence[Sequence[int] | torch.Tensor] | None = None,
        base: str | os.PathLike[str] | Backbone | None = None,
        revision: str | None = None,
        config: LadderModelConfig | None = None,
        **options: Any,
    ) -> LadderForCausalLM:
        """Load a base model and put a new ladder beside it, or load a saved ladder with its base.

        Args:
            pretrained_model_name_or_path: A hub name or folder of a base model (float safetensors,
                a bitsandbytes checkpoint, GGUF), or of a saved ladder.
            model_args: None are taken; here because transformers' own method has them.
            ladder: Shape of a new ladder; default :meth:`LadderConfig.recommended`. Not for a
                saved ladder, which has its own.
            weights: Where the weights of the backbone's layers live: "resident", the default, on
                the model's device; "streamed", in the base's NF4 files, from which one layer after
                another is read; or "host", in pinned memory beside a GPU. See
                :func:`~ladder_kernels.models.loading.load_backbone`.
            embeddings: Where its embeddings live: "device", or "host", in their file if they lie
                in one. Default "host" if weights are streamed, else "device".
            taps: Where taps wait between the two passes of a training step: "device", "host",
                "disk" or a store, see :meth:`from_backbone`.
            tap_dtype: What taps are kept in: "bfloat16", "float16", "float32" or "int8". Default
                bfloat16, or what a saved ladder was trained with.
            tap_cache: With "disk": the folder of the files.
            tap_cache_bytes: With "disk": most bytes of those files; default no limit.
            activations: How the backbone's NF4 layers take their inputs: "exact" or "int8", see
                :meth:`from_backbone`. Default "exact", or what a saved ladder was trained with.
            dtype: Compute dtype of the backbone; default float32 on a CPU, bfloat16 or float16 on a
                GPU.
            device: Where to; default the CPU, or what the loader of backbones chooses.
            blocksize: Weights that share a scale when float weights are quantised. Default 64, or
                as a saved ladder's base was.
            double_quant: Whether the scales are quantised too. Default true, or as above.
            quantize_head: Whether the output head is quantised too. Default false, or as above.
            gguf_file: Name of a GGUF file in the folder or repository.
            calibration: Token ids of some texts, which the base's weights are quantised for; see
                :func:`~ladder_kernels.models.loading.load_backbone`. Saved ladders name a base that
                can be loaded again, so save it first (``ladder-kernels quantize``) and give that
                folder here instead.
            base: For a saved ladder: where its base is, or the loaded base, when it is no longer at
                the place that the ladder names. A relative path that the ladder names is looked up
                from the working directory, then from the ladder's folder.
            revision: Branch, tag or commit of a saved ladder on the hub.
            config: Passed by ``AutoModelForCausalLM``; what is in the folder counts.
            options: None of consequence; ``trust_remote_code`` and what ``AutoModelForCausalLM``
                passes along are ignored.

        Returns:
            The model, in evaluation mode.

        Raises:
            ConfigError: If an option is not allowed.
            MissingFileError: If a file or folder does not exist.
            CheckpointError: If a file is corrupt or its tensors are not those of the ladder.
            BaseMismatchError: If the base is not the one that the ladder was trained on.
            UnsupportedModelError: If the base's architecture cannot carry a ladder.
        """
        pretrained.check_options(model_args, options)
        Placement.of("resident" if weights is None else weights, embeddings)
        store = tap_store_of(taps, cache=tap_cache, limit=tap_cache_bytes)
        if activations is not None:
            check_activations(activations)
        name = os.fspath(pretrained_model_name_or_path)
        quantization = {
            "blocksize": blocksize,
            "double_quant": double_quant,
            "quantize_head": quantize_head,
            "gguf_file": gguf_file,
            "calibration": calibration,
            "weights": weights,
            "embeddings": embeddings,
        }
        saved = pretrained.find_saved_ladder(name, revision) if gguf_file is None else None
        if saved is None:
            if revision is not None:
                raise ConfigError(
                    f"revision: found {revision!r}, but {name} is no saved ladder; only one of "
                    "those has a revision"
                )
            if base is not None:
                raise ConfigError(
                    f"base: found {base!s}, but {name} is no saved ladder; only one of those has "
                    "a base"
                )
            backbone = pretrained.load_base(name, dtype, device, quantization)
            model = cls.from_backbone(
                backbone,
                ladder,
                taps=store,
                tap_dtype="bfloat16" if tap_dtype is None else tap_dtype,
                activations="exact" if activations is None else activations,
                gguf_file=gguf_file,
            )
            model.generation_config = pretrained.generation_config_of(name) or (
                model.generation_config
            )
            return model

        if ladder is not None:
            raise ConfigError(
                f"ladder: {name} is a saved ladder and has its own shape; leave the option out"
            )
        tensors, saved_config = checkpoint.read_weights(saved.weights, saved.config)
        backbone = pretrained.load_base_of(saved_config, saved, base, dtype, device, quantization)
        pretrained.check_fingerprint(name, saved_config, backbone)
        store.check(backbone.fingerprint, backbone.name_or_path)
        if tap_dtype is not None:
            saved_config.tap_dtype = str(tap_dtype_of(tap_dtype)).removeprefix("torch.")
        if activations is not None:
            saved_config.activations = activations
        model = cls(saved_config, backbone)
        model.tap_store = store
        checkpoint.load_into(model, tensors, saved.weights)
        model.generation_config = pretrained.generation_config_of(name) or (
            GenerationConfig.from_model_config(backbone.config)
        )
        model.name_or_path = name
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save the ladder, with the name and fingerprint of its base; the base itself is not saved.

        Everything is written beside its place and renamed, so that an older saved ladder in the
        folder is whole until the new one is.

        Args:
            save_directory: Folder, made where it is missing; other files in it stay.
            is_main_process: Only the main process of a distributed run writes.
            state_dict: Saved instead of the model's own.
            push_to_hub: Not here; call ``model.push_to_hub(...)``.
            options: What transformers' own method takes besides (``max_shard_size`` and so on); a
                ladder is one small file and needs none of it.

        Raises:
            ConfigError: If ``push_to_hub`` is true.
            OutputExistsError: If ``save_directory`` is a file.
        """
        if push_to_hub:
            raise ConfigError("push_to_hub: found True; call model.push_to_hub(repository) instead")
        if not is_main_process:
            return
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.ladder.dtype
        checkpoint.save_ladder(
            Path(save_directory),
            self.state_dict() if state_dict is None else state_dict,
            self.config,
            self.generation_config,
        )

    # The whole model ------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self._backbone

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's compute dtype, which logits have; the ladder has its own."""
        return self._backbone.dtype

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> LadderForCausalLM:
        # First what may refuse, so that nothing is left half done.
        self._backbone._apply(fn)
        super()._apply(fn, recurse)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """Leave every module as the ladder's own init made it."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters.

        Args:
            only_trainable: Count the ladder's trainable ones only; else the backbone counts too, a
                quantised weight as the matrix that it stands for.
            exclude_embeddings: Leave out the backbone's token embeddings.
        """
        if only_trainable:
            return sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters()) + self._backbone.num_parameters()
        return total - self._backbone.embedding.numel() if exclude_embeddings else total

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many, in the line that PEFT users know."""
        trained, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trained / total:.4f}"
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the ladder and, unless ``return_buffers`` is false, of the backbone."""
        tensors = list(self.parameters())
        if return_buffers:
            tensors += [*self.buffers(), *self._backbone.buffers(), *self._backbone.parameters()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, as transformers means it.

        Called as the model is, it returns the states that :meth:`get_output_embeddings` multiplies
        (``last_hidden_state``, ``[B, S, D]``); a softcap of the logits is in the configuration, as
        ``final_logit_softcapping``. Trainers with a loss of their own, such as TRL's, start here.
        """
        return Headless(self)

    # Forward --------------------------------------------------------------------------------------

    @contextmanager
    def disable_ladder(self) -> Iterator[None]:
        """Within this context the model is its base model: no taps, no side pass.

        Forward, loss and ``generate`` give what the base gives, by bits. Nothing has a gradient
        then. As PEFT's ``disable_adapter``.
        """
        before = self._ladder_enabled
        self._ladder_enabled = False
        try:
            yield
        finally:
            self._ladder_enabled = before

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One frozen pass and one side pass.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: ``[B, past + S]``, nonzero at real tokens.
            position_ids: ``[B, S]``; without a cache, a position that does not continue the one
                before it starts a new document, which does not see the others (packing).
            labels: int64 ``[B, S]``, -100 where there is nothing to learn; token ``i`` is predicted
                from the tokens before it.
            past_key_values: A transformers ``Cache`` that grows: backbone layers first, then the
                ladder's.
            inputs_embeds: ``[B, S, D]`` instead of ``input_ids``; they get no gradient.
            use_cache: Whether to return a cache. Default: the configuration's, and never with
                labels, in training mode, or with packed documents.
            logits_to_keep: Logits for the last so many tokens only (0: all), or for these
                positions.
            num_items_in_batch: The loss is the sum over tokens divided by this; default the number
                of tokens with a label, which makes it the mean.
            return_logits: Whether to build logits when labels are given. Default:
                ``config.return_logits``, false: the loss does not need them, and they are by far
                the largest tensor. A ``Trainer`` with ``compute_metrics`` needs it true.
            return_dict: False returns a tuple.
            output_attentions: Not available.
            output_hidden_states: Not available.
            options: Ignored: what collators and generation pass to any model.

        Returns:
            ``loss`` (float32, with labels; 0 if no token has one), ``logits`` (``[B, S, V]`` in the
            compute dtype, ``None`` with labels unless asked for) and ``past_key_values``.

        Raises:
            ConfigError: If inputs, shapes or the cache do not fit.
        """
        if output_attentions or output_hidden_states:
            name = "output_attentions" if output_attentions else "output_hidden_states"
            raise ConfigError(f"{name}: found True; a ladder model does not return them")
        given = self._given(input_ids, inputs_embeds)
        cache = past_key_values
        layout = self._layout(given, attention_mask, position_ids, cache)
        if layout.documents is not None:
            if use_cache or cache is not None:
                raise ConfigError(
                    "position_ids: found packed documents together with a cache, which does not "
                    "keep them apart; allowed is use_cache=False, without past_key_values"
                )
            use_cache = False
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and labels is None and not self.training
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)

        if return_logits is None:
            return_logits = labels is None or self.config.return_logits
        targets = None if labels is None else self._targets(labels, layout)
        loss, logits = None, None
        read = None if targets is None else targets != _IGNORE
        # Found once, and not where the mask is used: a compiled side pass takes places, no mask.
        wanted = None if read is None else read.nonzero(as_tuple=True)
        select: Any = None
        if not return_logits and wanted is not None:
            select = wanted
        elif targets is None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            select = (slice(None), _kept(logits_to_keep))
        y = self._top(
            input_ids, inputs_embeds, layout, cache, select, None if return_logits else read
        )
        if targets is not None and wanted is not None:
            loss = self._loss(y if select is not None else y[wanted], targets[wanted])
            # A step without any label has the loss 0, not NaN.
            count = max(1, wanted[0].numel()) if num_items_in_batch is None else num_items_in_batch
            if isinstance(count, torch.Tensor):
                count = count.to(loss.device).clamp(min=1)
            loss = loss / count
        if return_logits:
            if targets is not None:
                y = y[:, _kept(logits_to_keep)]
            logits = self._backbone.logits(y)

        output = CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=cache if use_cache else None,
        )
        return output.to_tuple() if return_dict is False else output

    @staticmethod
    def _given(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ConfigError("give exactly one of input_ids and inputs_embeds")
        return given

    def _top(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        layout: SequenceLayout,
        cache: Any,
        select: Any = None,
        read: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``y`` before the final norm, ``[B, S, D]``, or ``[n, D]`` for the selected tokens.

        ``read`` is as for :class:`FrozenInput`.
        """
        ladder = self.ladder if self._ladder_enabled else None
        frozen = self._frozen(self._given(input_ids, inputs_embeds), layout, cache, read, ladder)
        if ladder is None:
            return frozen.hidden if select is None else frozen.hidden[select]
        recompute = self.gradient_checkpointing and self.training
        taps = frozen.taps
        if ladder._compiled_call_impl is not None:
            # It keeps every tap in its graph anyway, and knows nothing of stores; and where the
            # frozen pass was not run, nobody has looked yet who sees whom, which no graph can.
            taps = dict(taps)
            layout.first_seen()
        if not ladder.reentry:
            return ladder(
                taps, frozen.hidden, layout, cache=cache, select=select, recompute=recompute
            )
        # Tokens above the re-entry see each other: all of them are needed up to the last layer.
        y = self._backbone.top_pass(
            ladder(taps, frozen.hidden, layout, cache=cache, recompute=recompute),
            layout=layout,
            start=ladder.stop,
            adapters=ladder.block_adapters(),
            cache=cache,
            recompute=recompute,
        )
        return y if select is None else y[select]

    def _frozen(
        self,
        given: torch.Tensor,
        layout: SequenceLayout,
        cache: Any,
        read: torch.Tensor | None,
        ladder: Ladder | None,
    ) -> FrozenPass:
        """One frozen pass, or what is left of it where it was run before."""
        if ladder is None:
            inputs = [FrozenInput(given, layout, cache)]
            return self._backbone.frozen_passes(inputs, activations=self.config.activations)[0]
        if not (self.training and torch.is_grad_enabled() and cache is None):
            return self._frozen_passes([FrozenInput(given, layout, cache)], None)[0]
        read = read if self.tap_store.leaves_padding else None
        if layout in self._prefilled and self._prefilled[layout].serves(read):
            return self._prefilled.pop(layout).frozen
        return self._frozen_passes([FrozenInput(given, layout, None, read)], self.tap_store)[0]

    def _frozen_passes(
        self, inputs: Sequence[FrozenInput], store: TapStore | None
    ) -> list[FrozenPass]:
        return self._backbone.frozen_passes(
            inputs,
            tap_layers=self.ladder.tap_layers,
            tap_dtype=self.tap_dtype,
            activations=self.config.activations,
            stop=self.ladder.stop,
            store=store,
        )

    def prefill(self, batches: Sequence[Mapping[str, torch.Tensor | None]]) -> None:
        """Run the frozen passes of several micro-batches together: each layer once, for all.

        The next forward in training mode with the inputs of one of them takes its taps from here;
        losses and gradients are the same, by bits. Until then they wait in :attr:`tap_store`.
        Sequences that it has already are left out. What an earlier call left is dropped.

        Args:
            batches: ``input_ids`` or ``inputs_embeds``, and ``attention_mask``, ``position_ids``
                and ``labels`` where there are any, as :meth:`forward` takes them; other entries are
                not looked at.

        Raises:
            ConfigError: If inputs or shapes do not fit.
        """
        self._prefilled.clear()
        found = []
        for batch in batches:
            tokens = self._given(batch.get("input_ids"), batch.get("inputs_embeds"))
            inputs = tokens, batch.get("attention_mask"), batch.get("position_ids")
            layout, labels = self._layout(*inputs, None), batch.get("labels")
            read = None
            sparse = self.tap_store.leaves_padding and not self.config.return_logits
            if labels is not None and sparse:
                read = self._targets(labels, layout) != _IGNORE
            found.append((inputs, FrozenInput(tokens, layout, None, read)))
        passes = self._frozen_passes([given for _, given in found], self.tap_store)
        for (inputs, given), frozen in zip(found, passes, strict=True):
            self._prefilled[given.layout] = Prefilled(inputs, given.read, frozen)

    def _before_head(self, y: torch.Tensor) -> torch.Tensor:
        """What the head multiplies: ``y`` after the final norm, scaled as the logits are."""
        hidden = self._backbone.final_norm(y)
        scale = self._backbone.logit_scale
        return hidden if scale == 1.0 else hidden * scale

    def _layout(
        self,
        given: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
    ) -> SequenceLayout:
        past_length = 0
        if cache is not None:
            self._check_cache(cache)
            past_length = int(cache.get_seq_length())
        else:
            for layout, prefilled in self._prefilled.items():
                if prefilled.is_of((given, attention_mask, position_ids)):
                    return layout
        return SequenceLayout.build(
            given.shape[0],
            given.shape[1],
            past_length=past_length,
            attention_mask=attention_mask,
            position_ids=position_ids,
            device=self.device,
        )

    def _check_cache(self, cache: Any) -> None:
        if getattr(cache, "is_compileable", False):
            raise ConfigError(
                f"past_key_values: found a {type(cache).__name__}, which has a fixed size; "
                "allowed are caches "
                "that grow, such as DynamicCache"
            )
        needed = self._backbone.num_layers + self.ladder.cache_layers
        grows = getattr(cache, "layer_class_to_replicate", None) is not None
        if not grows and len(cache) < needed:
            raise ConfigError(
                f"past_key_values: found a cache of {len(cache)} layers; backbone and ladder need "
                f"{needed} "
                "(DynamicCache(config=model.config) makes them)"
            )

    def _targets(self, labels: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """What each token predicts, ``[B, S]``: the next label."""
        if tuple(labels.shape) != (layout.batch, layout.length):
            raise ConfigError(
                f"labels: found shape {list(labels.shape)}; the inputs need "
                f"[{layout.batch}, {layout.length}]"
            )
        return F.pad(labels[:, 1:], (0, 1), value=_IGNORE).to(self.device)

    def _loss(self, y: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy of ``y`` ``[n, D]`` against ``targets`` ``[n]``."""
        backbone = self._backbone
        with torch.autocast(self.device.type, enabled=False):
            if backbone.head_bias is not None:
                # The fused loss has no bias: the few architectures with one build their logits.
                return F.cross_entropy(backbone.logits(y).float(), targets, reduction="sum")
            return linear_cross_entropy(
                backbone.final_norm(y),
                backbone.head,
                targets,
                reduction="sum",
                softcap=backbone.softcap,
                logit_scale=backbone.logit_scale,
            )


def _kept(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


AutoConfig.register("ladder", LadderModelConfig, exist_ok=True)
AutoModelForCausalLM.register(LadderModelConfig, LadderForCausalLM, exist_ok=True)
