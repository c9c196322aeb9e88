"""Ladders as their papers describe them, in ordinary PyTorch on bitsandbytes' layers.

Rivals for the benchmarks: what one would write without this library. The frozen model is
transformers' with ``output_hidden_states=True``, without gradients; the side network is made of
PyTorch's modules, one block for each layer of the model; logits of all tokens are built for the
loss.

- :class:`PlainLST`: Ladder Side Tuning (Sung et al. 2022, arXiv:2206.06522). A linear layer brings
  each hidden state down, one gate a block, ``sigmoid(alpha / 0.1)`` with ``alpha`` 0 at first,
  merges it with the side stream, and the side stream alone, brought up again, feeds the head.
- :class:`PlainQST`: Quantized Side Tuning (Zhang et al. 2024, arXiv:2401.07159). The states come
  down through adapters of rank 16, the gates have one ``alpha`` a channel, and the output is
  interpolated with the model's own last state, by a learned weight a channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["PlainLST", "PlainLadder", "PlainQST"]

_TEMPERATURE = 0.1
_ADAPTER_RANK = 16
# sigmoid(1) is the share of the model's own last state where the authors' code starts.
_OWN_STATE = 1.0


class PlainBlock(nn.Module):
    """A pre-norm transformer block: causal attention with rotary positions, then a gated MLP.

    Args:
        width: Of the side stream.
        head_dim: Channels an attention head.
        mlp_width: Width inside the MLP.
    """

    def __init__(self, width: int, head_dim: int, mlp_width: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, side: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``[B, S, d]`` to the same; tables ``[S, head_dim]``."""
        heads = self.qkv(self.attention_norm(side)).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        side = side + self.o(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(side)).chunk(2, dim=-1)
        return side + self.down(F.silu(gate) * up)


class PlainLadder(nn.Module, ABC):
    """A frozen model and a side network of one block a layer.

    Args:
        base: A transformers ``...ForCausalLM`` of the llama family, such as bitsandbytes quantised.
        width: Of the side network, even; the papers' is that of the model divided by 8 or 16.
    """

    def __init__(self, base: Any, *, width: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        config = base.config
        self.layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.width = width
        self.head_dim = max(n for n in range(2, 65, 2) if self.width % n == 0)
        mlp_width = round(self.width * config.intermediate_size / self.hidden_size)
        self.blocks = nn.ModuleList(
            PlainBlock(self.width, self.head_dim, mlp_width) for _ in range(self.layers)
        )
        self.downs = nn.ModuleList(self._down() for _ in range(self.layers + 1))
        self.gates = nn.ParameterList(
            nn.Parameter(torch.zeros(self._gate_size())) for _ in range(self.layers)
        )
        self.norm = nn.RMSNorm(self.width)
        self.up = nn.Linear(self.width, self.hidden_size, bias=False)

    @abstractmethod
    def _down(self) -> nn.Module:
        """What brings a hidden state down, ``[..., D]`` to ``[..., d]``."""

    @abstractmethod
    def _gate_size(self) -> int:
        """Learned numbers of a gate."""

    @abstractmethod
    def _gate(self, alpha: torch.Tensor) -> torch.Tensor:
        """The weight of the side stream, between 0 and 1."""

    @abstractmethod
    def _output(self, up: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """What the head reads, of the side network's end and the model's own last state."""

    def train(self, mode: bool = True) -> PlainLadder:
        """As any module's; the frozen model stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutputWithPast:
        """Loss and logits; ``input_ids`` and ``labels`` ``[B, S]``, -100 for no label."""
        with torch.no_grad():
            frozen = self.base(
                input_ids, output_hidden_states=True, use_cache=False, logits_to_keep=1
            ).hidden_states
        cos, sin = _tables(input_ids.shape[1], self.head_dim, input_ids.device)
        side = self._brought_down(0, frozen[0])
        for index, block in enumerate(self.blocks):
            gate = self._gate(self.gates[index])
            down = self._brought_down(index + 1, frozen[index + 1])
            side = block(gate * side + (1 - gate) * down, cos, sin)
        # transformers' last hidden state is after the final norm already.
        y = self._output(self.up(self.norm(side)), frozen[-1])
        logits = self.base.get_output_embeddings()(y.to(self.base.dtype)).float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)  # type: ignore[arg-type]

    def _brought_down(self, index: int, state: torch.Tensor) -> torch.Tensor:
        return self.downs[index](state.to(self.up.weight.dtype))


class PlainLST(PlainLadder):
    """Ladder Side Tuning; see the module."""

    def _down(self) -> nn.Module:
        return nn.Linear(self.hidden_size, self.width, bias=False)

    def _gate_size(self) -> int:
        return 1

    def _gate(self, alpha: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(alpha / _TEMPERATURE)

    def _output(self, up: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return up


class PlainQST(PlainLadder):
    """Quantized Side Tuning; see the module."""

    def __init__(self, base: Any, *, width: int) -> None:
        super().__init__(base, width=width)
        self.own = nn.Parameter(torch.full((self.hidden_size,), _OWN_STATE))

    def _down(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(self.hidden_size, _ADAPTER_RANK, bias=False),
            nn.SiLU(),
            nn.Linear(_ADAPTER_RANK, self.width, bias=False),
            nn.LayerNorm(self.width),
        )

    def _gate_size(self) -> int:
        return self.width

    def _gate(self, alpha: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(alpha)

    def _output(self, up: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        own = torch.sigmoid(self.own)
        return (1 - own) * up + own * last.to(up.dtype)


def _tables(length: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, device=device), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
