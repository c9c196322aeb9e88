"""The ladder: the trained network that climbs beside the frozen backbone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ladder_kernels.errors import ConfigError
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.config import LadderConfig
from ladder_kernels.models.inits import INITS
from ladder_kernels.nn.adapter import BlockAdapters
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.block import BLOCKS, SideBlock, SideShape, rotary_tables
from ladder_kernels.nn.merge import MERGES
from ladder_kernels.nn.output import OUTPUTS, Output
from ladder_kernels.nn.recompute import keep_inputs
from ladder_kernels.nn.tap import TAPS, Tap
from ladder_kernels.ops import rms_norm

__all__ = ["Ladder", "Rung"]


class Rung(nn.Module):
    """One step of the ladder: merge its taps into the side stream, then one side block.

    Args:
        config: The ladder's configuration.
        layers: Backbone layers that this rung taps; none for a free rung.
        hidden_size: Width of the backbone, ``D``.
        shape: Sizes of the side stream.
    """

    def __init__(
        self, config: LadderConfig, layers: tuple[int, ...], hidden_size: int, shape: SideShape
    ) -> None:
        super().__init__()
        tap = TAPS[config.tap]
        self.taps = nn.ModuleList(
            tap(layer, hidden_size=hidden_size, width=shape.width) for layer in layers
        )
        self.merge = (
            MERGES[config.merge](shape.width, temperature=config.temperature, eps=config.eps)
            if layers
            else None
        )
        self.block = BLOCKS[config.block](shape, eps=config.eps)

    def connections(self) -> list[Tap]:
        """The rung's taps; none for a free rung."""
        return [tap for tap in self.taps if isinstance(tap, Tap)]

    def forward(
        self,
        side: torch.Tensor,
        taps: Mapping[int, torch.Tensor],
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        cache_index: int = 0,
    ) -> torch.Tensor:
        """``s_i = Block_i(merge_i(s_{i-1}, z_i))``.

        Args:
            side: ``s_{i-1}``, ``[B, S, d]``.
            taps: Residual stream by layer, ``[B, S, D]``.
            layout: Of the batch.
            rotary: Tables for the block's attention.
            cache: A transformers ``Cache``, or ``None``.
            cache_index: The cache's layer of this rung.

        Returns:
            ``s_i``, ``[B, S, d]``.
        """
        # On its own, so that no tap is held while the block runs.
        merged = side if self.merge is None else self._merged(self.merge, side, taps)
        return self.block(merged, layout, rotary, cache, cache_index)

    def _merged(
        self, merge: nn.Module, side: torch.Tensor, taps: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        connections = self.connections()
        sources = [tap.read(taps) for tap in connections]
        return merge(side, sources, [tap.down for tap in connections])


class Ladder(nn.Module):
    """The side network.

    ``s_0 = n(h[0]) @ Down_0^T``, then the rungs, then the output; see the package's documentation
    for the mathematics. Parameters are float32 and outside autocast everything is computed in their
    dtype, whatever the dtype of the taps and the backbone.

    Args:
        config: The ladder's configuration.
        num_layers: Layers of the backbone, ``L``.
        hidden_size: Its width, ``D``.
        intermediate_size: Width inside its MLP.
        rope_theta: Base of its rotary frequencies, used for the ladder's own attention.
        head_dim: Channels of its attention heads (see :meth:`LadderConfig.side_shape`).
        linear_shapes: ``(N, K)`` of the linear layers of its blocks by role; needed by adapters
            only.
        backbone: Needed by the init "pruned" only.

    Attributes:
        shape: Sizes of the side stream.
        rung_taps: The layers that each rung taps.
        reentry: Backbone layers that come after the ladder.

    Raises:
        ConfigError: If the configuration does not fit the backbone.
    """

    def __init__(
        self,
        config: LadderConfig,
        *,
        num_layers: int,
        hidden_size: int,
        intermediate_size: int,
        rope_theta: float = 10000.0,
        head_dim: int | None = None,
        linear_shapes: Mapping[str, tuple[int, int]] | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.rope_theta = rope_theta
        self.reentry = config.reentry_layers(num_layers)
        self.rung_taps = config.resolve(num_layers)
        self.shape = config.side_shape(hidden_size, intermediate_size, head_dim)
        self.rungs = nn.ModuleList(
            Rung(config, layers, hidden_size, self.shape) for layers in self.rung_taps
        )
        self.entry: Tap | None = None
        self.output: Output | None = None
        if self.rung_taps:
            self.entry = TAPS["residual"](0, hidden_size=hidden_size, width=self.shape.width)
            self.output = OUTPUTS[config.output](
                hidden_size=hidden_size, width=self.shape.width, eps=config.eps
            )
        self.adapters = nn.ModuleList(
            BlockAdapters(linear_shapes or {}, rank=config.adapter_rank, scale=config.adapter_scale)
            for _ in range(self.reentry if config.adapter_rank else 0)
        )
        self.reset_parameters(backbone)

    @classmethod
    def for_backbone(cls, config: LadderConfig, backbone: Backbone) -> Ladder:
        """A new ladder beside ``backbone``, on its device, with float32 parameters."""
        base = backbone.config
        heads = getattr(base, "num_attention_heads", None)
        head_dim = getattr(base, "head_dim", None) or (heads and backbone.hidden_size // heads)
        ladder = cls(
            config,
            num_layers=backbone.num_layers,
            hidden_size=backbone.hidden_size,
            intermediate_size=backbone.intermediate_size,
            rope_theta=_rope_theta(base),
            head_dim=head_dim,
            linear_shapes=backbone.linear_shapes() if config.adapter_rank else None,
            backbone=backbone,
        )
        return ladder.to(backbone.device)

    # Parts ----------------------------------------------------------------------------------------

    def steps(self) -> list[Rung]:
        """The rungs, bottom first."""
        return [rung for rung in self.rungs if isinstance(rung, Rung)]

    def blocks(self) -> list[SideBlock]:
        """The side block of each rung, bottom first."""
        return [rung.block for rung in self.steps()]

    def projections(self) -> Iterator[nn.Parameter]:
        """Every projection into the ladder: ``Down_0``, then the rungs', bottom first."""
        if self.entry is not None:
            yield self.entry.down
        for rung in self.steps():
            for tap in rung.connections():
                yield tap.down

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """Every layer that is read, ascending; 0, where the side stream starts, is among them."""
        return tuple(sorted({0}.union(*self.rung_taps))) if self.rung_taps else ()

    @property
    def stop(self) -> int:
        """How many layers the frozen pass runs: those below the re-entry, or all."""
        return self.num_layers - self.reentry

    def block_adapters(self) -> list[BlockAdapters]:
        """The adapters of each layer after the re-entry, bottom first; none if there are none."""
        return [block for block in self.adapters if isinstance(block, BlockAdapters)]

    @property
    def cache_layers(self) -> int:
        """Layers of a cache that the ladder needs: one for each rung with attention."""
        return sum(block.cached for block in self.blocks())

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.parameters()).dtype

    # Initial weights ------------------------------------------------------------------------------

    def reset_parameters(self, backbone: Backbone | None = None) -> None:
        """Start over from the configuration's init and seed, without touching the global generator.

        Args:
            backbone: Needed by the init "pruned".
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        with torch.no_grad():
            INITS[self.config.init](self, backbone, generator)
        for block in self.block_adapters():
            block.reset_parameters(generator)

    def fill(self, matrix: Callable[[torch.Tensor], object]) -> None:
        """Initialise every parameter; gates, norms and a zero output do not use ``matrix``.

        Args:
            matrix: Writes a float32 CPU matrix in place.
        """

        def write(weight: torch.Tensor) -> None:
            # Drawn on the CPU in float32, so that neither device nor dtype changes where training
            # starts.
            drawn = torch.empty(weight.shape, dtype=torch.float32)
            matrix(drawn)
            weight.copy_(drawn)

        if self.entry is not None:
            self.entry.reset_parameters(write)
        for rung in self.steps():
            for tap in rung.connections():
                tap.reset_parameters(write)
            if rung.merge is not None:
                rung.merge.reset_parameters()
            rung.block.reset_parameters(write)
        if self.output is not None:
            self.output.reset_parameters(write)

    # The side pass --------------------------------------------------------------------------------

    def forward(
        self,
        taps: Mapping[int, torch.Tensor],
        hidden: torch.Tensor,
        layout: SequenceLayout,
        cache: Any = None,
        cache_offset: int | None = None,
        select: Any = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Climb.

        Args:
            taps: Residual stream ``h[t]``, ``[B, S, D]`` in any float dtype, for ``t`` in
                :attr:`tap_layers`; constants. Each rung looks up its own when it needs them, bottom
                first, and with ``recompute`` holds on to none of them afterwards.
            hidden: ``h[stop]``, ``[B, S, D]`` in the backbone's compute dtype, a constant.
            layout: Positions, padding and documents, the same as the frozen pass had.
            cache: A transformers ``Cache``, or ``None``.
            cache_offset: The cache's layer of the first rung with attention; default ``L``.
            select: Index of ``[B, S]``, such as a mask's ``nonzero(as_tuple=True)``: compute the
                output for these ``n`` tokens only.
            recompute: Keep for the backward pass what enters each rung, ``s_{i-1}``, and nothing
                else: the pass runs each rung again, top first, with taps looked up anew. Gradients
                are the same by bits. The output "interpolate" keeps ``hidden`` besides. Without
                effect where no gradient is taken, with a cache, and under ``torch.compile``, which
                decides by itself what to keep.

        Returns:
            ``y``, ``[B, S, D]`` or with ``select`` ``[n, D]``, in the dtype of ``hidden``.

        Raises:
            ConfigError: If a tap is missing.
        """
        missing = [layer for layer in self.tap_layers if layer not in taps]
        if missing:
            raise ConfigError(
                f"taps: found layers {sorted(taps)}; the ladder also reads "
                f"{', '.join(map(str, missing))}"
            )
        if self.entry is None or self.output is None:
            return hidden if select is None else hidden[select]
        index = self.num_layers if cache_offset is None else cache_offset
        rotary = None
        if self.shape.heads:
            rotary = rotary_tables(
                layout.position_ids, self.shape.head_dim, self.rope_theta, self.dtype
            )
        recompute = (
            recompute
            and cache is None
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )
        run = keep_inputs if recompute else _call
        side = run(functools.partial(self._start, self.entry, taps))
        for rung in self.steps():
            climb = functools.partial(
                rung, taps=taps, layout=layout, rotary=rotary, cache=cache, cache_index=index
            )
            side = run(climb, side)
            index += rung.block.cached
        if select is not None:
            side, hidden = side[select], hidden[select]
        return self.output(side, hidden, recompute)

    def _start(self, entry: Tap, taps: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """``s_0``, ``[B, S, d]``."""
        start = rms_norm(entry.read(taps).to(self.dtype), None, self.config.eps)
        return F.linear(start, entry.down)


def _call(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    return function(*inputs)


def _rope_theta(config: Any) -> float:
    """Base of the rotary frequencies of a transformers configuration; 10000 where it has none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # Models with several kinds of layer have one set of parameters for each; full attention's is
    # the wide one.
    parameters = parameters.get("full_attention", parameters)
    return float(
        parameters.get("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0
    )
