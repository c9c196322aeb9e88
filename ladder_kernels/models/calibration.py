"""A few texts on their way through a backbone that is being quantised.

Each linear layer is quantised for the inputs that it will have (GPTQ, arXiv:2210.17323): those that
the texts give behind the layers quantised before it, block by block, and within a block queries,
keys and values first, then the attention's output, then gate and up, then down. Only the matrix at
hand is ever held in float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.rotary import Rotary

__all__ = ["CalibratedBlock", "CalibrationPass", "check_rows", "second_moments"]


class CalibratedBlock(Protocol):
    """A block whose parts can be run one after the other, as its layers come."""

    o: Callable[[Tensor, Tensor], Tensor]
    down: Callable[[Tensor, Tensor], Tensor]

    def attention_input(self, hidden: Tensor) -> Tensor:
        """What queries, keys and values are made of, ``[B, S, D]``."""
        ...

    def attention(
        self, x: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor], cache: Any
    ) -> Tensor:
        """What the attention's output projection reads."""
        ...

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """What gate and up read, ``[B, S, D]``."""
        ...

    def gated(self, x: Tensor) -> Tensor:
        """What the down projection reads."""
        ...


def check_rows(
    rows: Sequence[Sequence[int] | Tensor], *, vocab_size: int, max_context: int | None
) -> list[Tensor]:
    """Token ids to calibrate with, as int64 tensors ``[S]``.

    Args:
        rows: Texts, each as its token ids: a list or a 1-D tensor of whole numbers.
        vocab_size: Ids are below it.
        max_context: Most tokens a text; ``None``: any number.

    Raises:
        ConfigError: Saying which text is wrong, and how.
    """
    if isinstance(rows, str) or not isinstance(rows, (Sequence, Tensor)):
        raise ConfigError(
            f"calibration: found a {type(rows).__name__}; it must be a sequence of texts, each as "
            "its token ids"
        )
    if not len(rows):
        raise ConfigError("calibration: found no texts; there must be at least one")
    return [
        _checked(f"calibration[{index}]", row, vocab_size, max_context)
        for index, row in enumerate(rows)
    ]


def _checked(
    label: str, row: Sequence[int] | Tensor, vocab_size: int, max_context: int | None
) -> Tensor:
    allowed = "it must be a list or 1-D tensor of token ids"
    try:
        ids = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{label}: found {repr(row)[:40]}; {allowed}") from None
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 1 or not (whole or not ids.numel()):
        dtype = str(ids.dtype).removeprefix("torch.")
        raise ConfigError(f"{label}: found {dtype} of shape {list(ids.shape)}; {allowed}")
    if not ids.numel():
        raise ConfigError(f"{label}: found no tokens; there must be at least one")
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ConfigError(f"{label}: found token {wrong}; allowed are 0 to {vocab_size - 1}")
    if max_context is not None and len(ids) > max_context:
        raise ConfigError(
            f"{label}: found {len(ids)} tokens; the model allows {max_context}; cut the text"
        )
    return ids.to(torch.int64)


class CalibrationPass:
    """Some texts' states on their way up: at first the embeddings.

    For each of the ``T`` tokens of all texts, ``D`` numbers of the compute dtype are held, and in a
    block those that one of its layers reads.

    Args:
        rows: Token ids, int64 ``[S]`` each; see :func:`check_rows`.
        embedding: ``[V, D]``, in the compute dtype, on the device to run on.
        rotary: Of the model.

    Attributes:
        hidden: The residual stream of each text, ``[1, S, D]``.
    """

    def __init__(self, rows: Sequence[Tensor], embedding: Tensor, rotary: Rotary) -> None:
        device = embedding.device
        self._rotary = rotary
        self._layouts = [SequenceLayout.build(1, len(row), device=device) for row in rows]
        self.hidden = [
            torch.nn.functional.embedding(row.to(device)[None], embedding) for row in rows
        ]

    # Not under inference mode, as the frozen pass: what is made here stays, as the model's weights.
    @torch.no_grad()
    def advance(self, block: CalibratedBlock, load: Callable[[str, Tensor], None]) -> None:
        """Go through a block, whose layers are loaded on the way.

        Args:
            block: With its norms, and no layers yet.
            load: Loads the layer of a role (``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``)
                and quantises it for inputs of the given second moments.
        """
        hidden = self.hidden
        with torch.autocast(hidden[0].device.type, enabled=False):
            x = [block.attention_input(state) for state in hidden]
            self._load(("q", "k", "v"), x, load)
            for index, layout in enumerate(self._layouts):
                rotary = self._rotary(layout.position_ids, x[index].dtype)
                x[index] = block.attention(x[index], layout, rotary, None)
            self._load(("o",), x, load)
            for index, state in enumerate(x):
                hidden[index] = block.o(state, hidden[index])
                x[index] = block.mlp_input(hidden[index])
            self._load(("gate", "up"), x, load)
            for index, state in enumerate(x):
                x[index] = block.gated(state)
            self._load(("down",), x, load)
            for index, state in enumerate(x):
                hidden[index] = block.down(state, hidden[index])

    @staticmethod
    def _load(
        roles: Sequence[str], inputs: Sequence[Tensor], load: Callable[[str, Tensor], None]
    ) -> None:
        moments = second_moments(inputs)
        for role in roles:
            load(role, moments)


def second_moments(inputs: Sequence[Tensor]) -> Tensor:
    """``sum x x^T`` over all vectors ``x`` of some tensors ``[..., K]``: float32 ``[K, K]``."""
    size = inputs[0].shape[-1]
    total = torch.zeros(size, size, dtype=torch.float32, device=inputs[0].device)
    for tensor in inputs:
        vectors = tensor.reshape(-1, size).float()
        total.addmm_(vectors.t(), vectors)
    return total
