"""A few texts on their way through a backbone that is being quantised, and through it in float.

Each linear layer is quantised for the inputs that it will have (GPTQ, arXiv:2210.17323): those that
the texts give behind the layers quantised before it, block by block, and within a block queries,
keys and values first, then the attention's output, then gate and up, then down. And it is made to
give, from these, what the float layer gives from the inputs of the float model (GPTAQ,
arXiv:2504.02692), so that errors of earlier layers are made up for as far as can be. One block is
held in float at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.rotary import Rotary

__all__ = ["CalibratedBlock", "CalibrationPass", "LayerInputs", "check_rows"]


RIDGE = 1.0
"""Added to the diagonal of the second moments, as a share of its mean, when a layer is fitted to
the float model: what holds it near its own weight where the texts say little. Of 0.3 and 1,
that with which the kind of text that loses most lost least (``bench/quantization.py``)."""


@dataclass(frozen=True)
class LayerInputs:
    """What is known of the inputs of layers that are quantised next.

    Attributes:
        moments: ``sum x x^T``, float32 ``[K, K]``, of the inputs ``x`` in the quantised model.
        shift: float32 ``[K, K]``: with ``W (1 + shift)``, inputs ``x`` give most nearly what ``W``
            gives for the inputs of the float model.
    """

    moments: Tensor
    shift: Tensor

    @classmethod
    def of(cls, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> LayerInputs:
        """From the same tokens' inputs ``[..., K]`` in the quantised and in the float model.

        ``shift`` is ``D inv(H + ridge)``, ``D = sum (f - x) x^T`` and ``H = sum x x^T``: least
        squares of ``W f - V x``, in which ``V`` is held near ``W``.
        """
        size = inputs[0].shape[-1]
        moments = torch.zeros(size, size, dtype=torch.float32, device=inputs[0].device)
        drift = torch.zeros_like(moments)
        for tensor, other in zip(inputs, wanted, strict=True):
            x, f = (each.reshape(-1, size).float() for each in (tensor, other))
            moments.addmm_(x.t(), x)
            drift.addmm_((f - x).t(), x)
        damped = moments.double()
        mean = damped.diagonal().mean()
        damped.diagonal().add_(torch.where(mean > 0, RIDGE * mean, 1.0))
        factor = torch.linalg.cholesky(damped)
        shift = torch.cholesky_solve(drift.t().double(), factor).t().float()
        return cls(moments, shift)

    def target(self, weight: Tensor) -> Tensor:
        """The matrix to be quantised in a weight's place: ``W (1 + shift)``, in its dtype."""
        wide = weight.float()
        return torch.addmm(wide, wide, self.shift).to(weight.dtype)


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
    """Some texts' states on their way up, quantised and in float: at first the embeddings.

    For each of the ``T`` tokens of all texts, ``2 D`` numbers of the compute dtype are held, and in
    a block twice those that one of its layers reads.

    Args:
        rows: Token ids, int64 ``[S]`` each; see :func:`check_rows`.
        embedding: ``[V, D]``, in the compute dtype, on the device to run on.
        rotary: Of the model.

    Attributes:
        hidden: The residual stream of each text, ``[1, S, D]``.
        exact: The same of the float model.
    """

    def __init__(self, rows: Sequence[Tensor], embedding: Tensor, rotary: Rotary) -> None:
        device = embedding.device
        self._rotary = rotary
        self._layouts = [SequenceLayout.build(1, len(row), device=device) for row in rows]
        self.hidden = [
            torch.nn.functional.embedding(row.to(device)[None], embedding) for row in rows
        ]
        self.exact = list(self.hidden)

    # Not under inference mode, as the frozen pass: what is made here stays, as the model's weights.
    @torch.no_grad()
    def advance(
        self,
        block: CalibratedBlock,
        twin: CalibratedBlock,
        load: Callable[[str, LayerInputs], None],
    ) -> None:
        """Go through a block, whose layers are loaded on the way.

        Args:
            block: With its norms, and no layers yet.
            twin: The same block in float.
            load: Loads the layer of a role (``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``)
                and quantises it for its inputs.
        """
        with torch.autocast(self.hidden[0].device.type, enabled=False):
            streams = ((block, self.hidden), (twin, self.exact))
            x, f = ([part.attention_input(h) for h in hidden] for part, hidden in streams)

            def load_all(*roles: str) -> None:
                inputs = LayerInputs.of(x, f)
                for role in roles:
                    load(role, inputs)

            load_all("q", "k", "v")
            for (part, _), states in zip(streams, (x, f), strict=True):
                for index, layout in enumerate(self._layouts):
                    rotary = self._rotary(layout.position_ids, states[index].dtype)
                    states[index] = part.attention(states[index], layout, rotary, None)
            load_all("o")
            for (part, hidden), states in zip(streams, (x, f), strict=True):
                for index, state in enumerate(states):
                    hidden[index] = part.o(state, hidden[index])
                    states[index] = part.mlp_input(hidden[index])
            load_all("gate", "up")
            for (part, _), states in zip(streams, (x, f), strict=True):
                for index, state in enumerate(states):
                    states[index] = part.gated(state)
            load_all("down")
            for (part, hidden), states in zip(streams, (x, f), strict=True):
                for index, state in enumerate(states):
                    hidden[index] = part.down(state, hidden[index])
