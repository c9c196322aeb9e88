"""Our own frozen backbone for the llama family, on the operations of this library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN

from ladder_kernels.errors import ConfigError
from ladder_kernels.models.architecture import Architecture
from ladder_kernels.models.backbone import Backbone, Quantization
from ladder_kernels.models.calibration import CalibrationPass, LayerInputs
from ladder_kernels.models.frozen_pass import Work
from ladder_kernels.models.weights import WeightReader
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.adapter import BlockAdapters
from ladder_kernels.nn.attention import SequenceLayout, attend
from ladder_kernels.nn.linear import FrozenLinear, NF4Linear
from ladder_kernels.nn.recompute import keep_inputs
from ladder_kernels.nn.rotary import Rotary
from ladder_kernels.nn.slices import token_slices
from ladder_kernels.ops import nf4_swiglu, nf4_swiglu_int8, rms_norm, rotary_
from ladder_kernels.ops import rotary as turned_by_rotary

__all__ = ["NativeBackbone"]

Linear = NF4Linear | FrozenLinear


class NativeBlock(nn.Module):
    """One frozen block: attention and MLP, each behind an RMS norm and beside the residual stream.

    Args:
        architecture: Of the model.
        layer: Index of the block, from 0; also its layer in a cache.
        reader: Where the weights come from.
        calibration: Texts that have come so far: the layers are quantised for them, and they go on.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor

    def __init__(
        self,
        architecture: Architecture,
        layer: int,
        reader: WeightReader,
        calibration: CalibrationPass | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = architecture.head_dim
        self.eps = architecture.eps
        self.qk_norm = architecture.qk_norm
        self.window = architecture.windows[layer]
        self.rope = architecture.rope[layer]
        prefix = f"model.layers.{layer}."
        for role, (name, _) in architecture.norms().items():
            self.register_buffer(role, reader.tensor(f"{prefix}{name}.weight"), persistent=False)
        self.activation = ACT2FN[architecture.activation]
        self.fused = architecture.activation == "silu" and not architecture.mlp_bias
        linears = architecture.linears()

        def load(role: str, inputs: LayerInputs | None = None) -> None:
            name, _, bias = linears[role]
            self.add_module(role, reader.linear(prefix + name, bias=bias, inputs=inputs))

        if calibration is None:
            for role in linears:
                load(role)
        else:
            twin = NativeBlock(architecture, layer, reader.in_float())
            calibration.advance(self, twin, load)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
        adapters: BlockAdapters | None = None,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            hidden: The residual stream, ``[B, S, D]``; left as it is.
            layout: Of the batch.
            rotary: Cosines and sines of :class:`Rotary`.
            cache: A transformers ``Cache`` or ``None``.
            adapters: Of this block, or ``None``.

        Returns:
            The residual stream after the block, ``[B, S, D]``; differentiable in ``hidden`` and the
            adapters, where gradients are enabled.
        """
        x = self.attention(self.attention_input(hidden), layout, rotary, cache, adapters)
        hidden = self._linear("o", x, hidden, adapters)
        x = self.gated(self.mlp_input(hidden), adapters)
        return self._linear("down", x, hidden, adapters)

    def advance(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
        parts: Sequence[slice],
    ) -> None:
        """Run the block without gradients: what :meth:`forward` gives, written over ``hidden``.

        Tokens pass in ``parts``, so that what is widest inside the block, the MLP's, exists for
        one part at a time. So do the attention's queries, on a CPU and without a cache; elsewhere
        attention takes all queries at once, as PyTorch's kernels and masks are made for. A block
        with layers in float takes all tokens at once: PyTorch's products may sum in another order
        for another number of rows.

        Args:
            hidden: The residual stream, ``[B, S, D]``.
            layout: Of the batch.
            rotary: Cosines and sines of :class:`Rotary`.
            cache: A transformers ``Cache`` or ``None``.
            parts: Of ``range(S)``; see :func:`~ladder_kernels.nn.slices.token_slices`.
        """
        if not self._is_quantized():
            parts = [slice(0, layout.length)]
        ranged, _ = layout.first_seen(self.window)
        if len(parts) > 1 and cache is None and ranged and hidden.device.type == "cpu":
            self._advance_parts(hidden, layout, rotary, parts)
            return
        x = self.attention(self.attention_input(hidden), layout, rotary, cache)
        for part in parts:
            self._add(hidden[:, part], "o", x[:, part])
        del x
        for part in parts:
            self._add_mlp(hidden[:, part])

    def _advance_parts(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        parts: Sequence[slice],
    ) -> None:
        """Take each part through all of the block: the keys that it sees have come before."""
        shape = (layout.batch, layout.length, self.k.out_features // self.head_dim, self.head_dim)
        keys, values = hidden.new_empty(shape), hidden.new_empty(shape)
        for part in parts:
            rows = hidden[:, part]
            turn = (rotary[0][:, part], rotary[1][:, part])
            q, keys[:, part], values[:, part] = self._projected(self.attention_input(rows), turn)
            seen = slice(0, part.stop)
            x = attend(
                q.transpose(1, 2),
                keys[:, seen].transpose(1, 2),
                values[:, seen].transpose(1, 2),
                layout,
                window=self.window,
                rows=part,
            )
            del q
            self._add(rows, "o", x)
            del x
            self._add_mlp(rows)

    def _is_quantized(self) -> bool:
        layers = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        return all(isinstance(layer, NF4Linear) for layer in layers)

    def _add(self, hidden: torch.Tensor, role: str, x: torch.Tensor) -> None:
        """Add what layer ``role`` makes of ``x`` to ``hidden``, in place."""
        hidden.copy_(self._linear(role, x, hidden))

    def _add_mlp(self, hidden: torch.Tensor) -> None:
        self._add(hidden, "down", self.gated(self.mlp_input(hidden)))

    def _linear(
        self,
        role: str,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        adapters: BlockAdapters | None = None,
    ) -> torch.Tensor:
        y = getattr(self, role)(x, residual)
        return y if adapters is None else adapters.add(role, x, y)

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What queries, keys and values are made of, ``[B, S, D]``."""
        return rms_norm(hidden, self.input_norm, self.eps)

    def attention(
        self,
        x: torch.Tensor,
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
        adapters: BlockAdapters | None = None,
    ) -> torch.Tensor:
        """What the attention's output projection reads, ``[B, S, heads * head_dim]``."""
        heads = self._projected(x, rotary, adapters)
        del x  # as wide as the stream, and not needed beside what attention makes
        q, k, v = (value.transpose(1, 2) for value in heads)
        del heads
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        return attend(q, k, v, layout, window=self.window)

    def _projected(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        adapters: BlockAdapters | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, ``[B, S, heads, head_dim]``, the former two turned."""
        q, k, v = (self._heads(self._linear(role, x, None, adapters)) for role in ("q", "k", "v"))
        if self.qk_norm:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        if self.rope and (q.requires_grad or k.requires_grad):
            q, k = turned_by_rotary(q, k, *rotary)
        elif self.rope:
            rotary_(q, k, *rotary)
        return q, k, v

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What gate and up read, ``[B, S, D]``."""
        return rms_norm(hidden, self.post_norm, self.eps)

    def gated(self, x: torch.Tensor, adapters: BlockAdapters | None = None) -> torch.Tensor:
        """What the down projection reads, ``[B, S, intermediate_size]``."""
        if (
            self.fused
            and adapters is None
            and isinstance(self.gate, NF4Linear)
            and isinstance(self.up, NF4Linear)
        ):
            swiglu = nf4_swiglu_int8 if self.gate.activations == "int8" else nf4_swiglu
            return swiglu(x, self.gate.weight, self.up.weight)
        gate, up = (self._linear(role, x, None, adapters) for role in ("gate", "up"))
        return self.activation(gate) * up


class NativeBackbone(Backbone):
    """A frozen model of one of :data:`~ladder_kernels.models.architecture.FAMILIES`.

    Where its weights are is the reader's :class:`~ladder_kernels.memory.placement.Placement`. If
    layers are streamed, their buffers are views of two slots, and hold the weights of one layer or
    another: those of a layer are there while it runs.

    Args:
        config: Its transformers configuration.
        architecture: The same, resolved.
        reader: Where the weights come from, and where they go.
        quantization: How they are quantised.
        name_or_path: Where the base came from, as the user gave it.
        calibration: Token ids of texts, int64 ``[S]`` each, that the layers are quantised for.
    """

    runs_on: ClassVar[str] = "ladder_kernels"
    reenters: ClassVar[bool] = True
    slices: ClassVar[bool] = True

    embed: torch.Tensor | None
    norm: torch.Tensor
    float_head: torch.Tensor | None

    def __init__(
        self,
        config: Any,
        architecture: Architecture,
        reader: WeightReader,
        *,
        quantization: Quantization,
        name_or_path: str = "",
        calibration: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__(config, quantization=quantization, name_or_path=name_or_path)
        self.architecture = architecture
        self.placement = reader.placement
        self.rotary = Rotary(config, architecture.head_dim).to(reader.device)
        tied = bool(config.tie_word_embeddings)
        # Not a buffer on the host: neither a move nor a cast may copy what lies in a file.
        on_host = reader.placement.embeddings == "host"
        take = reader.host_tensor if on_host else reader.tensor
        table = take("model.embed_tokens.weight")
        self.register_buffer("embed", None if on_host else table, persistent=False)
        self._host_embed = table if on_host else None
        if reader.placement.streams:
            linears = [name for name, _, _ in architecture.linears().values()]
            reader.stream_layers(
                [
                    [f"model.layers.{layer}.{name}.weight" for name in linears]
                    for layer in range(architecture.num_layers)
                ]
            )
        self._stream = reader.stream
        texts = None
        if calibration is not None:
            texts = CalibrationPass(calibration, table, self.rotary)
        self.blocks = nn.ModuleList(
            NativeBlock(architecture, layer, reader, texts)
            for layer in range(architecture.num_layers)
        )
        self.register_buffer("norm", reader.tensor("model.norm.weight"), persistent=False)
        inputs = None
        if texts is not None and quantization.quantize_head:
            states = [
                [self.final_norm(h) for h in hidden] for hidden in (texts.hidden, texts.exact)
            ]
            inputs = LayerInputs.of(*states)
        # A head that shares the embedding is quantised from it as it is stored.
        head = reader.head(
            "lm_head.weight",
            shared_with="model.embed_tokens.weight" if tied else None,
            quantize=quantization.quantize_head,
            inputs=inputs,
        )
        self.nf4_head = NF4Linear(head) if isinstance(head, NF4Weight) else None
        self.register_buffer(
            "float_head", head if isinstance(head, torch.Tensor) else None, persistent=False
        )
        self._check_tied_head(self.device, self.dtype)
        self.fingerprint = reader.fingerprint({"llama_family": architecture.fingerprint()})

    @property
    def embedding(self) -> torch.Tensor:
        """The token embeddings ``[V, D]``.

        In the compute dtype and on the device; on the host, if they were placed there, in that of
        the file in which they lie.
        """
        if self._host_embed is not None:
            return self._host_embed
        assert self.embed is not None  # one of the two is there
        return self.embed

    @property
    def head(self) -> torch.Tensor | NF4Weight:
        """The output head ``[V, D]``; the embeddings themselves when they are tied and float."""
        if self.nf4_head is not None:
            return self.nf4_head.weight
        return self.embedding if self.float_head is None else self.float_head

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.norm.device

    @property
    def streams(self) -> bool:
        """Whether layers are brought to the device one after another."""
        return self._stream is not None

    def close(self) -> None:
        """End the thread that reads streamed weights and close their files; see the base class."""
        if self._stream is not None:
            self._stream.close()

    def _check_tied_head(self, device: torch.device, dtype: torch.dtype) -> None:
        """Refuse embeddings on the host that are a float head which cannot be used there.

        Raises:
            ConfigError: If the head is the embeddings, on the host, and products with it would need
                them on ``device`` or in ``dtype``.
        """
        table = self._host_embed
        if table is None or self.nf4_head is not None or self.float_head is not None:
            return
        if table.device != device:
            raise ConfigError(
                f"embeddings: found 'host', but they are the output head too, which is needed on "
                f"{device}; allowed are quantize_head=True, or embeddings='device'"
            )
        if table.dtype != dtype:
            raise ConfigError(
                f"embeddings: found 'host', where they lie in their file in {_short(table.dtype)}, "
                f"but they are the output head too, which is needed in {_short(dtype)}; allowed "
                f"are dtype='{_short(table.dtype)}', quantize_head=True, or embeddings='device'"
            )

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> NativeBackbone:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self._check_tied_head(probe.device, probe.dtype)
        if self._stream is not None and probe.device != self.device:
            raise ConfigError(
                f"a backbone whose weights are {self.placement.weights} stays on {self.device}; "
                f"load it with device='{probe.device}' to have it there"
            )
        super()._apply(fn, recurse)
        return self

    def _bring(self, layer: int, then: int | None = None) -> None:
        """Make a layer's weights real, if they are streamed, and begin with another's."""
        if self._stream is not None:
            self._stream.fetch(layer, then)

    def _in_turn(self, start: int, stop: int) -> Iterator[NativeBlock]:
        """Blocks ``start`` to ``stop`` (exclusive), each real until the next is taken."""
        for layer, block in enumerate(list(self.blocks)[start:stop], start=start):
            if isinstance(block, NativeBlock):
                self._bring(layer, layer + 1 if layer + 1 < stop else None)
                yield block

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLP."""
        return self.architecture.intermediate_size

    def _run(self, works: Sequence[Work], stop: int) -> None:
        hidden = []
        for work in works:
            tokens = work.tokens
            # Written over as it goes up, so embeddings of the caller's are copied.
            states = tokens.clone() if tokens.is_floating_point() else self._embedded(tokens)
            work.emit(0, states)
            hidden.append(states)
        rotary = [self.rotary(work.layout.position_ids, self.dtype) for work in works]
        parts = [
            token_slices(work.layout.batch, work.layout.length, self.slice_tokens) for work in works
        ]
        for layer, block in enumerate(self._in_turn(0, stop), start=1):
            for index, work in enumerate(works):
                states = hidden[index]
                block.advance(states, work.layout, rotary[index], work.cache, parts[index])
                work.emit(layer, states)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the embeddings, ``[B, S, D]``, gathered where they are."""
        table = self.embedding
        rows = nn.functional.embedding(tokens.to(table.device), table)
        return rows.to(device=self.device, dtype=self.dtype)

    def _block_modules(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def _top(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        cache: Any,
        start: int,
        adapters: Sequence[BlockAdapters],
        recompute: bool,
    ) -> torch.Tensor:
        rotary = self.rotary(layout.position_ids, self.dtype)
        # What autograd would keep of a layer is gone when the next but one is brought in.
        recompute = recompute or (self.streams and torch.is_grad_enabled())
        for layer in range(start, self.num_layers):
            own = adapters[layer - start] if adapters else None
            block = self._above(layer, start, layout, rotary, cache, own)
            hidden = keep_inputs(block, hidden) if recompute else block(hidden)
        return hidden

    def _above(self, layer: int, start: int, *rest: Any) -> Callable[..., torch.Tensor]:
        """A layer above a re-entry: run once upwards, and run again downwards if recomputed.

        Args:
            layer: Its index.
            start: The lowest above the re-entry.
            rest: What :meth:`NativeBlock.forward` takes besides the residual stream.
        """
        ran = False

        def run(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal ran
            then = layer - 1 if ran else layer + 1
            ran = True
            self._bring(layer, then if start <= then < self.num_layers else None)
            return self.blocks[layer](hidden, *rest)

        return run

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(N, K)`` of the linear layers of a block, by role."""
        return {role: shape for role, (_, shape, _) in self.architecture.linears().items()}

    def _final_norm(self, y: torch.Tensor) -> torch.Tensor:
        return rms_norm(y, self.norm, self.architecture.eps)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor | NF4Weight]]:
        """Every weight once, by its name in a transformers checkpoint; linear ones ``[N, K]``.

        Streamed ones are there until one of the next layer is asked for.
        """
        return self._weights(self._in_turn(0, self.num_layers))

    def described_weights(self) -> Iterator[tuple[str, torch.Tensor | NF4Weight]]:
        """As :meth:`named_weights`, but streamed values are not fetched."""
        return self._weights(self.blocks)

    def _weights(
        self, blocks: Iterable[nn.Module]
    ) -> Iterator[tuple[str, torch.Tensor | NF4Weight]]:
        yield "model.embed_tokens.weight", self.embedding
        for layer, block in enumerate(blocks):
            prefix = f"model.layers.{layer}."
            for role, (name, _, _) in self.architecture.linears().items():
                linear = getattr(block, role)
                yield f"{prefix}{name}.weight", linear.weight
                if linear.bias is not None:
                    yield f"{prefix}{name}.bias", linear.bias
            for role, (name, _) in self.architecture.norms().items():
                yield f"{prefix}{name}.weight", getattr(block, role)
        yield "model.norm.weight", self.norm
        head = self.head
        if head is not self.embedding:
            yield "lm_head.weight", head

    def float_linears(self) -> list[str]:
        """Linear layers that are not quantised, by module name in transformers."""
        return [
            name.removesuffix(".weight")
            for name, weight in self.described_weights()
            if isinstance(weight, torch.Tensor)
            and weight.dim() == 2
            and weight is not self.embedding
        ] + (["lm_head"] if self.head is self.embedding else [])

    def block_weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The weights of one block as fp32 tensors by role; see :class:`Backbone`."""
        self._bring(layer)
        block = self.blocks[layer]
        weights = {}
        for role in self.architecture.linears():
            weight = getattr(block, role).weight
            weights[role] = (
                weight.dequantize(torch.float32)
                if isinstance(weight, NF4Weight)
                else weight.float()
            )
        for role in ("input_norm", "post_norm"):
            weights[role] = getattr(block, role).float()
        return weights


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
