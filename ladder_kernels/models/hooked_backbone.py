"""Frozen backbones that run through transformers' own layers, with hooks for the taps.

Slower than our own (separate operations, no fused MLP), with the same results. Which part of a
model is which is data: :data:`HOOKED` names the list of blocks and the final norm of each model
type.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ladder_kernels.errors import ConfigError, UnsupportedModelError
from ladder_kernels.models.backbone import Backbone, Quantization
from ladder_kernels.models.frozen_pass import Work
from ladder_kernels.models.weights import TensorSource, WeightReader
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.linear import FrozenLinear, NF4Linear, move_exactly

__all__ = ["HOOKED", "HookedBackbone", "HookedFamily", "SlowerBackboneWarning"]

# Configuration fields that do not change what the weights compute.
_COSMETIC = frozenset((
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map",
    "bos_token_id", "dropout", "dtype", "embd_pdrop", "eos_token_id", "hidden_dropout",
    "initializer_range", "layerdrop", "pad_token_id", "quantization_config", "resid_pdrop",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
))  # fmt: skip


class SlowerBackboneWarning(UserWarning):
    """The model runs through transformers' own layers: there is no faster way for it here."""


@dataclass(frozen=True)
class HookedFamily:
    """Where the parts of a model type are.

    Attributes:
        layers: Path of the list of blocks inside the bare model.
        norm: Path of the norm before the head.
        scale: Configuration field that multiplies the logits.
        inverse_scale: Configuration field that divides them.
        aliases: Beginnings of names that differ in checkpoints: (in the model, in a checkpoint).
        finds_documents: Whether transformers finds packed documents in the positions; otherwise the
            model is handed a mask ready made.
        learned_positions: Whether positions are rows of a table, so that a text longer than that
            cannot be read at all.
    """

    layers: str = "layers"
    norm: str = "norm"
    scale: str | None = None
    inverse_scale: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    finds_documents: bool = True
    learned_positions: bool = False


HOOKED: dict[str, HookedFamily] = {
    "cohere": HookedFamily(scale="logit_scale"),
    "gemma": HookedFamily(),
    "gemma2": HookedFamily(),
    "gemma3_text": HookedFamily(),
    "gpt2": HookedFamily(layers="h", norm="ln_f", learned_positions=True),
    "gpt_neox": HookedFamily(norm="final_layer_norm", aliases=(("lm_head.", "embed_out."),)),
    "granite": HookedFamily(inverse_scale="logits_scaling"),
    "olmo": HookedFamily(),
    "olmo2": HookedFamily(),
    "opt": HookedFamily(
        layers="decoder.layers",
        norm="decoder.final_layer_norm",
        finds_documents=False,
        learned_positions=True,
    ),
    "phi": HookedFamily(norm="final_layernorm"),
    "phi3": HookedFamily(),
    "stablelm": HookedFamily(),
    "starcoder2": HookedFamily(),
}


@functools.cache
def _say_slower(model_type: str) -> None:
    warnings.warn(
        f"'{model_type}' runs through transformers' own layers: the same results, but slower than "
        f"the models that this library runs itself",
        SlowerBackboneWarning,
        stacklevel=4,
    )


def empty_model(config: Any) -> Any:
    """The transformers model without memory for its weights; its buffers are real."""
    # Fused attention kernels leave out gemma2's cap on the scores.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager" if capped else "sdpa"
        ).eval()


class HookedBackbone(Backbone):
    """A frozen model of one of the types in :data:`HOOKED`.

    Args:
        config: Its transformers configuration.
        source: Where the weights come from.
        quantization: How they are quantised: linear layers inside blocks, and the head if asked.
        dtype: Compute dtype.
        device: Where the weights shall be.
        name_or_path: Where the base came from, as the user gave it.

    Raises:
        UnsupportedModelError: If a variant of the model has parts that this class does not know.
        CheckpointError: If tensors are missing or have another shape.
    """

    runs_on: ClassVar[str] = "transformers"
    reenters: ClassVar[bool] = False

    float_head: torch.Tensor | None

    def __init__(
        self,
        config: Any,
        source: TensorSource,
        *,
        quantization: Quantization,
        dtype: torch.dtype,
        device: torch.device,
        name_or_path: str = "",
    ) -> None:
        super().__init__(config, quantization=quantization, name_or_path=name_or_path)
        _say_slower(config.model_type)
        family = HOOKED[config.model_type]
        model = empty_model(config)
        self.prefix = model.base_model_prefix
        self.decoder: nn.Module = model.base_model
        embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        names = {module: name for name, module in model.named_modules()}
        self.head_name = names[head]
        self.embedding_name = f"{names[embedding]}.weight"
        tied = bool(config.tie_word_embeddings)
        head_key = f"{self.head_name}.weight"
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not (tied and name == head_key)
        }
        reader = WeightReader(
            source,
            shapes=shapes,
            quantization=quantization,
            dtype=dtype,
            device=device,
            base_prefix=self.prefix,
            aliases=family.aliases,
            tied=(head_key,) if tied else (),
        )
        self.transposed: set[str] = set()
        self._fill(reader, family.layers)
        weight = reader.head(
            head_key,
            shared_with=self.embedding_name if tied else None,
            quantize=quantization.quantize_head,
        )
        self.nf4_head = NF4Linear(weight) if isinstance(weight, NF4Weight) else None
        self.register_buffer(
            "float_head", weight if isinstance(weight, torch.Tensor) else None, persistent=False
        )
        if head.bias is not None:
            self.head_bias = reader.tensor(f"{self.head_name}.bias")
        self.decoder.requires_grad_(False).to(device)

        self.softcap = getattr(config, "final_logit_softcapping", None)
        if family.scale is not None:
            self.logit_scale = float(getattr(config, family.scale))
        if family.inverse_scale is not None:
            self.logit_scale = 1.0 / float(getattr(config, family.inverse_scale))
        kept = {k: v for k, v in config.to_diff_dict().items() if k not in _COSMETIC}
        self.fingerprint = reader.fingerprint({config.model_type: kept})

        self.family = family
        self._part(family.norm)
        if self.embedding.shape[1] != self.hidden_size:
            raise UnsupportedModelError(
                f"this '{config.model_type}' has embeddings of width {self.embedding.shape[1]} on "
                f"a residual stream of width {self.hidden_size}; they must be equal"
            )
        layers = self._part(family.layers)
        self._emit: Callable[[int, torch.Tensor], None] | None = None
        layers[0].register_forward_pre_hook(self._before_first, with_kwargs=True)
        for layer, block in enumerate(layers, start=1):
            block.register_forward_hook(functools.partial(self._after_block, layer))

    def _part(self, path: str) -> Any:
        part: Any = self.decoder
        for name in path.split("."):
            part = getattr(part, name, None)
        if part is None:
            raise UnsupportedModelError(
                f"this variant of '{self.config.model_type}' has no '{path}', which a ladder needs"
            )
        return part

    def _fill(self, reader: WeightReader, layers: str) -> None:
        """Give every parameter of the decoder its weight, and blocks their NF4 layers."""
        for path, module in list(self.decoder.named_modules()):
            full = f"{self.prefix}.{path}"
            if isinstance(module, (nn.Linear, Conv1D)) and path.startswith(f"{layers}."):
                transposed = isinstance(module, Conv1D)
                linear = reader.linear(full, bias=module.bias is not None, transposed=transposed)
                self.decoder.set_submodule(path, linear)
                if transposed:
                    self.transposed.add(f"{full}.weight")
                continue
            for name, _ in list(module.named_parameters(recurse=False)):
                weight = reader.tensor(f"{full}.{name}" if path else f"{self.prefix}.{name}")
                setattr(module, name, nn.Parameter(weight, requires_grad=False))

    def _before_first(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._emit is not None:
            self._emit(0, args[0] if args else kwargs["hidden_states"])

    def _after_block(self, layer: int, _: nn.Module, __: Any, output: Any) -> None:
        if self._emit is not None:
            self._emit(layer, output if isinstance(output, torch.Tensor) else output[0])

    @property
    def embedding(self) -> torch.Tensor:
        """The token embeddings ``[V, D]`` in the compute dtype."""
        return self.decoder.get_parameter(self.embedding_name.removeprefix(f"{self.prefix}."))

    @property
    def head(self) -> torch.Tensor | NF4Weight:
        """The output head ``[V, D]``; the embeddings themselves when they are tied and float."""
        if self.nf4_head is not None:
            return self.nf4_head.weight
        return self.embedding if self.float_head is None else self.float_head

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLP."""
        for field in ("intermediate_size", "ffn_dim", "n_inner"):
            width = getattr(self.config, field, None)
            if width is not None:
                return width
        return 4 * self.hidden_size

    def _block_modules(self) -> Sequence[nn.Module]:
        return self._part(self.family.layers)

    def _run(self, works: Sequence[Work], stop: int) -> None:
        for work in works:
            self._run_one(work)

    def _run_one(self, work: Work) -> None:
        """Run all layers of transformers' decoder, whose hooks emit."""
        tokens, layout, cache = work.tokens, work.layout, work.cache
        mask, positions = layout.padding, layout.position_ids
        if self.family.learned_positions and positions.numel():
            last = int(positions.max())
            if self.max_context is not None and last >= self.max_context:
                raise ConfigError(
                    f"position_ids: found position {last}; '{self.config.model_type}' has learned "
                    f"positions, 0 to {self.max_context - 1}"
                )
        if layout.documents is not None and not self.family.finds_documents:
            mask = layout.mask()
        elif layout.documents is not None:
            if cache is not None:
                raise ConfigError(
                    f"packed documents together with a cache are not supported for "
                    f"'{self.config.model_type}'"
                )
            if mask is not None:
                # transformers finds documents in the positions only when there is no mask. At
                # position 0 each, padded tokens are documents of their own: the same as a mask.
                positions, mask = positions.masked_fill(~mask, 0), None
        self._emit = work.emit
        try:
            inputs = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
            self.decoder(
                **inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        finally:
            self._emit = None

    def _final_norm(self, y: torch.Tensor) -> torch.Tensor:
        return self._part(self.family.norm)(y)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor | NF4Weight]]:
        """Every weight once, by its name in a transformers checkpoint; linear ones ``[N, K]``."""
        for path, module in self.decoder.named_modules():
            full = f"{self.prefix}.{path}" if path else self.prefix
            if isinstance(module, (NF4Linear, FrozenLinear)):
                yield f"{full}.weight", module.weight
                if module.bias is not None:
                    yield f"{full}.bias", module.bias
            else:
                for name, parameter in module.named_parameters(recurse=False):
                    yield f"{full}.{name}", parameter
        head = self.head
        if head is not self.embedding:
            yield f"{self.head_name}.weight", head
        if self.head_bias is not None:
            yield f"{self.head_name}.bias", self.head_bias

    def stored_weights(self) -> Iterator[tuple[str, torch.Tensor | NF4Weight]]:
        """As :meth:`named_weights`, but float weights of a ``Conv1D`` are ``[K, N]``."""
        for name, weight in self.named_weights():
            if isinstance(weight, torch.Tensor) and name in self.transposed:
                yield name, weight.t()
            else:
                yield name, weight

    def float_linears(self) -> list[str]:
        """Linear layers that are not quantised, by module name in transformers."""
        names = [
            f"{self.prefix}.{path}"
            for path, module in self.decoder.named_modules()
            if isinstance(module, (nn.Linear, FrozenLinear))
        ]
        return names if self.nf4_head is not None else [*names, self.head_name]

    def block_weights(self, layer: int) -> dict[str, torch.Tensor]:
        """Not available: the blocks of these models have other parts; see :class:`Backbone`."""
        raise UnsupportedModelError(
            f"weights of block {layer} by role are not known for '{self.config.model_type}'; they "
            f"are for the models that this library runs itself"
        )

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> HookedBackbone:
        # Buffers of transformers' models (rotary frequencies, scales of embeddings) are exact.
        own = (NF4Linear, FrozenLinear)
        for module in self.decoder.modules():
            if isinstance(module, own):
                module._apply(fn)
            else:
                for name, parameter in module.named_parameters(recurse=False):
                    module._parameters[name] = nn.Parameter(fn(parameter), requires_grad=False)
                move_exactly(module, fn, tuple(module._buffers))
        if self.nf4_head is not None:
            self.nf4_head._apply(fn)
        for name in ("float_head", "head_bias"):
            buffer = self._buffers[name]
            self._buffers[name] = None if buffer is None else fn(buffer)
        return self
