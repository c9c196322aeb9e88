"""The whole ladder against its mathematics in plain PyTorch, options crossed pairwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.loading import backbone_from_transformers
from ladder_kernels.nn.attention import SequenceLayout

EPS = 1e-6
FACTORS: dict[str, tuple[Any, ...]] = {
    "rungs": (
        {"kind": "lst"},
        {"kind": "lst", "every": 2},
        {"kind": "xladder", "connected": 2, "free": 2},
        {"rungs": ((1,), (2, 3), ())},
        {"rungs": ((0, 1, 3), (), (2,), (3,))},
    ),
    "merge": ("sum", "gate", "channel"),
    "output": ("residual", "interpolate", "side"),
    "init": ("orthogonal", "xavier", "he", "pruned"),
    "block": ("transformer", "mlp"),
    "sizes": ({"reduction": 4}, {"width": 24, "head_dim": 4, "mlp_ratio": 1.5}),
    "batch": ("plain", "left", "right", "packed"),
    "tap_dtype": ("bfloat16", "float16", "float32"),
    "temperature": (0.1, 1.0),
    "return_logits": (False, True),
}


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Cases in which every two values of two factors meet at least once, greedily chosen."""
    names = list(factors)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while open_pairs:
        case = dict(min(open_pairs))
        for name in names:
            if name not in case:
                gains = [
                    sum(
                        tuple(sorted(((name, i), item), key=lambda p: names.index(p[0])))
                        in open_pairs
                        for item in case.items()
                    )
                    for i in range(len(factors[name]))
                ]
                # Ties turn with the number of cases, so that no value is preferred throughout.
                best = [i for i, gain in enumerate(gains) if gain == max(gains)]
                case[name] = best[len(cases) % len(best)]
        met = {pair for pair in open_pairs if all(case[name] == index for name, index in pair)}
        assert met
        open_pairs -= met
        cases.append({name: factors[name][index] for name, index in case.items()})
    return cases


CASES = pairwise(FACTORS)


def n(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def visible(kind: str, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Who sees whom, [B, S, S], token by token."""
    batch, length = mask.shape
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        document, documents = 0, []
        for i in range(length):
            if kind == "packed" and i > 0 and positions[b, i] == 0:
                document += 1
            documents.append(document)
        for i in range(length):
            for j in range(i + 1):
                both = bool(mask[b, i]) and bool(mask[b, j])  # padding sees itself alone
                seen[b, i, j] = i == j or (both and documents[i] == documents[j])
    return seen


def turn(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions on [B, S, H, hd], as products of complex numbers."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = positions[:, :, None, None].to(x.dtype) * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def plain_ladder(
    config: LadderConfig,
    weights: dict[str, torch.Tensor],
    rungs: tuple[tuple[int, ...], ...],
    taps: dict[int, torch.Tensor],
    hidden: torch.Tensor,
    seen: torch.Tensor,
    positions: torch.Tensor,
    theta: float,
    head_dim: int,
) -> torch.Tensor:
    s = n(taps[0]) @ weights["entry.down"].T
    for i, layers in enumerate(rungs):
        here = {
            name.removeprefix(f"rungs.{i}."): weight
            for name, weight in weights.items()
            if name.startswith(f"rungs.{i}.")
        }
        if layers:
            z = sum(n(taps[t]) @ here[f"taps.{j}.down"].T for j, t in enumerate(layers))
            if config.merge == "sum":
                s = s + z
            else:
                g = 1 / (1 + torch.exp(-here["merge.alpha"] / config.temperature))
                s = g * s + (1 - g) * z
        if config.block == "transformer":
            x = n(s) * here["block.attention_norm"]
            q, k, v = (
                (x @ here[f"block.{role}.weight"].T).unflatten(-1, (-1, head_dim)) for role in "qkv"
            )
            q, k = turn(q, positions, theta), turn(k, positions, theta)
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / head_dim**0.5
            scores = scores.masked_fill(~seen[:, None], float("-inf"))
            mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
            s = s + mixed @ here["block.o.weight"].T
        x = n(s) * here["block.mlp_norm"]
        gate, up = x @ here["block.gate.weight"].T, x @ here["block.up.weight"].T
        s = s + (gate * torch.sigmoid(gate) * up) @ here["block.down.weight"].T
    top = n(s) @ weights["output.up"].T
    if config.output == "residual":
        return hidden + hidden.square().mean(-1, keepdim=True).sqrt() * top
    if config.output == "interpolate":
        return (1 - weights["output.keep"]) * top + weights["output.keep"] * hidden
    return top


@pytest.fixture(scope="module")
def backbone(make: Callable[..., Any]) -> Backbone:
    return backbone_from_transformers(make("llama", rope_theta=500.0), dtype=torch.float64)


@pytest.fixture(scope="module")
def batches() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (2, 9), generator=generator)
    full, left, right = (torch.ones(2, 9, dtype=torch.long) for _ in range(3))
    left[1, :4] = 0
    right[1, 6:] = 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 0]])
    return {
        "plain": {"input_ids": ids, "attention_mask": full},
        "left": {"input_ids": ids, "attention_mask": left},
        "right": {"input_ids": ids, "attention_mask": right},
        "packed": {"input_ids": ids, "attention_mask": full, "position_ids": packed},
    }


def test_every_pair_of_options_meets():
    for (a, left), (b, right) in itertools.combinations(FACTORS.items(), 2):
        for x, y in itertools.product(left, right):
            assert any(case[a] == x and case[b] == y for case in CASES), (a, x, b, y)


@pytest.mark.parametrize("case", CASES, ids=[str(i) for i in range(len(CASES))])
def test_loss_and_gradients_equal_plain_autograd(
    case: dict[str, Any], backbone: Backbone, batches: dict[str, dict[str, torch.Tensor]]
):
    options = {key: case[key] for key in ("merge", "output", "init", "block", "temperature")}
    config = LadderConfig(**case["rungs"], **case["sizes"], **options, eps=EPS)
    model = LadderForCausalLM.from_backbone(backbone, config, tap_dtype=case["tap_dtype"])
    model.ladder.double().requires_grad_()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    batch = batches[case["batch"]]
    mask = batch["attention_mask"]
    positions = batch.get("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    labels[0, 2:4] = -100
    out = model(**batch, labels=labels, return_logits=case["return_logits"])
    out.loss.backward()

    layout = SequenceLayout.build(2, 9, attention_mask=mask, position_ids=batch.get("position_ids"))
    frozen = backbone.frozen_pass(
        batch["input_ids"],
        layout=layout,
        tap_layers=range(4),
        tap_dtype=getattr(torch, case["tap_dtype"]),
    )
    weights = {
        name.removeprefix("ladder."): weight.detach().clone().requires_grad_()
        for name, weight in model.named_parameters()
    }
    y = plain_ladder(
        config,
        weights,
        config.resolve(3),
        {t: tap.double() for t, tap in frozen.taps.items()},
        frozen.hidden,
        visible(case["batch"], mask, positions),
        positions,
        500.0,
        model.ladder.shape.head_dim,
    )
    named = dict(backbone.named_weights())
    head, norm = named["lm_head.weight"], named["model.norm.weight"]
    assert isinstance(head, torch.Tensor)
    assert isinstance(norm, torch.Tensor)
    y_normed = y / (y.square().mean(-1, keepdim=True) + backbone.config.rms_norm_eps).sqrt()
    logits = (y_normed * norm) @ head.T
    log_p = logits.log_softmax(-1)
    picked = [
        -log_p[b, i, labels[b, i + 1]]
        for b in range(2)
        for i in range(8)
        if labels[b, i + 1] != -100
    ]
    loss = torch.stack(picked).mean()
    loss.backward()

    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    if case["return_logits"]:
        torch.testing.assert_close(out.logits, logits, rtol=1e-9, atol=1e-9)
    else:
        assert out.logits is None
    for name, parameter in model.named_parameters():
        expected = weights[name.removeprefix("ladder.")].grad
        assert parameter.grad is not None, name
        assert expected is not None, name
        assert expected.abs().max() > 0, name
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            parameter.grad,
            expected,
            rtol=1e-6,
            atol=1e-7 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
