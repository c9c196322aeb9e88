"""The small blocks of the side stream.

A new kind of block is one subclass of :class:`SideBlock` and one entry in :data:`BLOCKS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ladder_kernels.nn.attention import SequenceLayout, attend
from ladder_kernels.ops import rms_norm, side_mlp
from ladder_kernels.ops import rotary as turned_by_position
from ladder_kernels.ops._dispatch import has_gpu_kernel

__all__ = ["BLOCKS", "MLPBlock", "SideBlock", "SideShape", "TransformerBlock", "rotary_tables"]


@dataclass(frozen=True)
class SideShape:
    """Sizes of the side stream's blocks.

    Attributes:
        width: Width of the stream, ``d``.
        head_dim: Channels an attention head; 0 for blocks without attention.
        mlp_width: Width inside the MLP.
    """

    width: int
    head_dim: int
    mlp_width: int

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_dim if self.head_dim else 0


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary position embeddings (RoFormer, arXiv:2104.09864).

    Args:
        positions: int64 ``[B, S]``.
        head_dim: Channels a head, even; pair ``j`` turns by ``position * theta ** (-2 j /
            head_dim)``.
        theta: Base of the frequencies.
        dtype: Of the result; the angles are float32, or float64 for float64.

    Returns:
        Two ``[B, 1, S, head_dim / 2]``.
    """
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide)
    angles = positions[:, None, :, None].to(wide) * theta ** (-pairs / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn channel ``j`` of ``[B, H, S, hd]`` with channel ``j + hd / 2``, as llama does."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _linear(out_features: int, in_features: int) -> nn.Linear:
    # Without PyTorch's own initialisation, which would draw from the global generator.
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    return linear.to_empty(device="cpu")


def _fuses_mlp(u: torch.Tensor) -> bool:
    """Whether an MLP runs as the one operation ``side_mlp``, not as PyTorch's several.

    It does where there is a kernel for ``u``. Elsewhere the several are faster: they keep what the
    operation would compute again in its backward pass. So they are for float32, whose products have
    no tensor cores and take all the time, unless kernels are asked for by name.
    """
    return has_gpu_kernel("side_mlp", "side_mlp", u, by_name_only=u.dtype == torch.float32)


def _turn(
    q: torch.Tensor, k: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys ``[B, H, S, hd]`` by position.

    Where there is a kernel, it turns each in one launch; PyTorch needs seven.
    """
    cos, sin = (table.to(q.dtype) for table in tables)
    if not has_gpu_kernel("rotary", "rotary_", q):
        return _rotate(q, cos, sin), _rotate(k, cos, sin)
    q, k, cos, sin = (each.transpose(1, 2) for each in (q, k, cos, sin))
    q, k = turned_by_position(q, k, cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


class SideBlock(nn.Module, ABC):
    """``s = block(u)`` on the side stream.

    Args:
        shape: Sizes.
        eps: Added to the mean square in the norms.

    Attributes:
        cached: Whether a block of this kind has keys and values, and so a layer of the cache.
    """

    cached: ClassVar[bool]

    def __init__(self, shape: SideShape, *, eps: float) -> None:
        super().__init__()
        self.shape = shape
        self.eps = eps

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters by role.

        Matrices ``[N, K]`` are ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``, norm weights
        ``input_norm`` (before attention) and ``post_norm`` (before the MLP): those that there are.
        """

    @abstractmethod
    def forward(
        self,
        u: torch.Tensor,
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        cache_index: int = 0,
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            u: ``[B, S, d]``.
            layout: Positions, padding and documents, the same as the backbone's.
            rotary: From :func:`rotary_tables`; unused by blocks without attention.
            cache: A transformers ``Cache``, or ``None``.
            cache_index: The cache's layer that belongs to this block.

        Returns:
            ``s``, ``[B, S, d]``.
        """

    def reset_parameters(self, fill: Callable[[torch.Tensor], None]) -> None:
        """Initialise matrices with ``fill``, which writes in place, and norm weights with 1."""
        for weight in self.weights().values():
            if weight.dim() == 2:
                fill(weight)
            else:
                nn.init.ones_(weight)


class MLPBlock(SideBlock):
    """``s = u + down(silu(gate(n(u))) * up(n(u)))``: no attention, so no cache."""

    cached = False

    def __init__(self, shape: SideShape, *, eps: float) -> None:
        super().__init__(shape, eps=eps)
        self.mlp_norm = nn.Parameter(torch.ones(shape.width))
        self.gate = _linear(shape.mlp_width, shape.width)
        self.up = _linear(shape.mlp_width, shape.width)
        self.down = _linear(shape.width, shape.mlp_width)

    def weights(self) -> dict[str, torch.Tensor]:
        """``gate``, ``up``, ``down`` and ``post_norm``."""
        return {
            "gate": self.gate.weight,
            "up": self.up.weight,
            "down": self.down.weight,
            "post_norm": self.mlp_norm,
        }

    def forward(
        self,
        u: torch.Tensor,
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        cache_index: int = 0,
    ) -> torch.Tensor:
        """See :meth:`SideBlock.forward`; tokens do not see each other here."""
        if _fuses_mlp(u):
            return side_mlp(
                u, self.mlp_norm, self.gate.weight, self.up.weight, self.down.weight, self.eps
            )
        x = rms_norm(u, self.mlp_norm, self.eps)
        return u + self.down(F.silu(self.gate(x)) * self.up(x))


class TransformerBlock(MLPBlock):
    """A pre-norm transformer block: causal attention with rotary positions, then :class:`MLPBlock`.

    It sees what the backbone's tokens see (padding and documents), over all positions: a backbone's
    sliding window is not applied to the side stream.
    """

    cached = True

    def __init__(self, shape: SideShape, *, eps: float) -> None:
        super().__init__(shape, eps=eps)
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.q = _linear(shape.width, shape.width)
        self.k = _linear(shape.width, shape.width)
        self.v = _linear(shape.width, shape.width)
        self.o = _linear(shape.width, shape.width)

    def weights(self) -> dict[str, torch.Tensor]:
        """All roles of :meth:`SideBlock.weights`."""
        return {
            "input_norm": self.attention_norm,
            "q": self.q.weight,
            "k": self.k.weight,
            "v": self.v.weight,
            "o": self.o.weight,
            **super().weights(),
        }

    def forward(
        self,
        u: torch.Tensor,
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        cache_index: int = 0,
    ) -> torch.Tensor:
        """See :meth:`SideBlock.forward`."""
        x = rms_norm(u, self.attention_norm, self.eps)
        q, k, v = (
            projection(x).view(*x.shape[:-1], self.shape.heads, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        if rotary is not None:
            q, k = _turn(q, k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, cache_index)
        u = u + self.o(attend(q, k, v, layout))
        return super().forward(u, layout)


BLOCKS: Mapping[str, type[SideBlock]] = MappingProxyType(
    {"transformer": TransformerBlock, "mlp": MLPBlock}
)
"""Every kind of side block by the name that configurations use."""
