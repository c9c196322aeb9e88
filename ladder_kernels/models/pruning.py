"""Cut side blocks out of a backbone's blocks.

Structural pruning as Ladder Side Tuning starts its side network (arXiv:2206.06522, section 3.3),
with weight norms in the place of Fisher information, which would need gradients of the whole
backbone:

- *channels*: one choice for the whole ladder, the ``d`` residual channels with the largest summed
  squares of all weights that read them (times the norm's weight, which scales what they see) or
  write them, over every block that a rung is cut from. Taps and the ladder's first projection start
  as that selection;
- *heads*: in each block, those with the largest summed squares of their q, k, v and o weights.
  Where side heads are narrower than the backbone's, rotary pairs are taken evenly spaced, which
  keeps the spread of their frequencies, and value channels by summed squares;
- *MLP neurons*: those with the largest summed squares of their gate, up and down weights.

Matrices are multiplied by ``sqrt(K / K')``, the square root of how many times fewer inputs they
sum, which keeps the size of their outputs. Biases and the norms of queries and keys have no place
in a side block and are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ladder_kernels.errors import ConfigError

if TYPE_CHECKING:
    from ladder_kernels.models.backbone import Backbone
    from ladder_kernels.models.ladder import Ladder

__all__ = ["prune_into", "source_blocks"]

_READERS = {"q": "input_norm", "k": "input_norm", "v": "input_norm"} | {
    "gate": "post_norm",
    "up": "post_norm",
}
_WRITERS = ("o", "down")


def source_blocks(rungs: tuple[tuple[int, ...], ...], num_layers: int) -> list[int]:
    """Index of the backbone block that each rung is cut from.

    A rung that taps layer ``t`` comes from the block that produced it, ``t - 1`` (the highest tap
    where there are several, block 0 for the embeddings); the ``f`` rungs without taps come from the
    last ``f`` blocks.
    """
    free = sum(not rung for rung in rungs)
    blocks, seen = [], 0
    for rung in rungs:
        if rung:
            blocks.append(max(max(rung) - 1, 0))
        else:
            blocks.append(max(num_layers - free + seen, 0))
            seen += 1
    return blocks


def prune_into(ladder: Ladder, backbone: Backbone | None) -> None:
    """Write pruned backbone weights into ``ladder``, in place; output and gates stay.

    Raises:
        ConfigError: If there is no backbone, or the ladder is larger than it in some dimension.
        UnsupportedModelError: If the backbone's blocks are not of the llama family.
    """
    if backbone is None:
        raise ConfigError("ladder.init: found 'pruned'; a ladder without a backbone cannot have it")
    shape, hidden = ladder.shape, backbone.hidden_size
    if shape.width > hidden:
        raise ConfigError(
            f"ladder.width: found {shape.width}; init 'pruned' needs at most the backbone's "
            f"{hidden}"
        )
    if shape.mlp_width > backbone.intermediate_size:
        raise ConfigError(
            f"ladder.mlp_ratio: found an MLP {shape.mlp_width} wide; init 'pruned' needs at most "
            "the "
            f"backbone's {backbone.intermediate_size}"
        )
    head_dim = _head_dim(backbone)
    if shape.head_dim > head_dim:
        raise ConfigError(
            f"ladder.head_dim: found {shape.head_dim}; init 'pruned' needs at most the backbone's "
            f"{head_dim}"
        )

    sources = source_blocks(ladder.rung_taps, backbone.num_layers)
    channels = _channels(backbone, sorted(set(sources)), shape.width)
    with torch.no_grad():
        selection = torch.zeros(shape.width, hidden)
        selection[torch.arange(shape.width), channels] = 1.0
        for down in ladder.projections():
            down.copy_(selection)
        for block, source in zip(ladder.blocks(), sources, strict=True):
            weights = block.weights()
            cut = dict(_cut(backbone.block_weights(source), backbone, ladder, channels))
            for role, parameter in weights.items():
                parameter.copy_(cut[role])


def _head_dim(backbone: Backbone) -> int:
    config = backbone.config
    head_dim = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def _strongest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest entries, in their own order."""
    return importance.topk(count).indices.sort().values


def _channels(backbone: Backbone, blocks: list[int], count: int) -> torch.Tensor:
    importance = torch.zeros(backbone.hidden_size)
    for layer in blocks:
        weights = {role: w.cpu() for role, w in backbone.block_weights(layer).items()}
        for role, norm in _READERS.items():
            importance += weights[role].square().sum(0) * weights[norm].square()
        for role in _WRITERS:
            importance += weights[role].square().sum(1)
    return _strongest(importance, count)


def _cut(
    weights: dict[str, torch.Tensor], backbone: Backbone, ladder: Ladder, channels: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The roles of a side block, cut out of one block of the backbone."""
    shape = ladder.shape
    weights = {role: weight.cpu() for role, weight in weights.items()}
    for role in set(_READERS.values()):
        yield role, weights[role][channels]
    reading = math.sqrt(backbone.hidden_size / shape.width)

    inner = {role: weights[role][:, channels] for role in _READERS}
    outer = {role: weights[role][channels] for role in _WRITERS}
    importance = sum(w.square().sum(1) for w in (inner["gate"], inner["up"], outer["down"].t()))
    neurons = _strongest(torch.as_tensor(importance), shape.mlp_width)
    yield "gate", inner["gate"][neurons] * reading
    yield "up", inner["up"][neurons] * reading
    writing = math.sqrt(backbone.intermediate_size / shape.mlp_width)
    yield "down", outer["down"][:, neurons] * writing

    if not shape.heads:
        return
    queries, values = _head_rows(inner, outer, backbone, ladder)
    q_rows, kv_rows = queries
    yield "q", inner["q"][q_rows] * reading
    yield "k", inner["k"][kv_rows] * reading
    o_columns, v_rows = values
    yield "v", inner["v"][v_rows] * reading
    yield "o", outer["o"][:, o_columns] * math.sqrt(outer["o"].shape[1] / shape.width)


def _head_rows(
    inner: dict[str, torch.Tensor],
    outer: dict[str, torch.Tensor],
    backbone: Backbone,
    ladder: Ladder,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Rows of (q, k) and of (o's columns, v) that make the side block's heads, ``[d]`` each."""
    shape, head_dim = ladder.shape, _head_dim(backbone)
    heads = inner["q"].shape[0] // head_dim
    groups = heads // (inner["k"].shape[0] // head_dim)

    def norms(weight: torch.Tensor) -> torch.Tensor:
        return weight.square().sum(1).view(-1, head_dim)

    q, o = norms(inner["q"]), norms(outer["o"].t())
    k, v = (norms(inner[role]).repeat_interleave(groups, dim=0) for role in ("k", "v"))
    importance = (q + k + v + o).sum(1)
    # A ladder of many small heads may have more of them than the backbone: start over from the
    # strongest.
    ranked = importance.argsort(descending=True)
    chosen = ranked.repeat(-(-shape.heads // heads))[: shape.heads].sort().values

    half, side_half = head_dim // 2, shape.head_dim // 2
    pairs = torch.arange(side_half) * half // side_half
    turned = torch.cat((pairs, pairs + half))
    q_rows, kv_rows, o_columns, v_rows = [], [], [], []
    for head in chosen.tolist():
        kept = _strongest(v[head] + o[head], shape.head_dim)
        q_rows.append(head * head_dim + turned)
        kv_rows.append(head // groups * head_dim + turned)
        o_columns.append(head * head_dim + kept)
        v_rows.append(head // groups * head_dim + kept)
    return (torch.cat(q_rows), torch.cat(kv_rows)), (torch.cat(o_columns), torch.cat(v_rows))
