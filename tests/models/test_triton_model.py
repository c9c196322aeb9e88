"""Whole ladders on the Triton kernels: interpreted, and executed as compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ladder_kernels import LadderConfig, LadderForCausalLM, ops
from ladder_kernels.audit import executing, interpreting
from ladder_kernels.models.loading import backbone_from_transformers
from ladder_kernels.nn.attention import SequenceLayout

CONFIGS = {
    "ladder": LadderConfig.lst(every=1, reduction=4),
    "xladder": LadderConfig.xladder(connected=2, free=1, reduction=4, merge="channel"),
    "re-entry": LadderConfig.lst(every=1, reduction=4, block="mlp", reentry=1, adapter_rank=4),
}
IDS = torch.randint(3, 128, (1, 21), generator=torch.Generator().manual_seed(2))
LABELS = torch.where(torch.arange(21) % 3 == 0, -100, IDS)
PACKED = torch.tensor([[*range(8), *range(13)]])


def step(model: LadderForCausalLM) -> dict[str, torch.Tensor]:
    """Loss and gradients of a training step."""
    model.train()
    loss: Any = model(IDS, position_ids=PACKED, labels=LABELS).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.detach().clone()
            parameter.grad = None
    return found


def made(make: Callable[..., Any], name: str, dtype: torch.dtype, **fields: Any) -> Any:
    """A ladder whose every parameter matters."""
    backbone = backbone_from_transformers(make("llama", **fields), dtype=dtype)
    model = LadderForCausalLM.from_backbone(backbone, CONFIGS[name], tap_dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_interpreted(make, name):
    model = made(make, name, torch.float32)
    with interpreting():
        found = step(model)
    with ops.use_backend("reference"):
        expected = step(model)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for key, value in expected.items():
        apart = (found[key] - value).norm() / value.norm().clamp_min(1e-6)
        assert apart < 1e-4, key


@pytest.mark.parametrize("name", ["ladder", "re-entry"])
def test_executed(make, name):
    """A backbone block, a rung and the loss in bf16, warp by warp."""
    model = made(make, name, torch.bfloat16, num_hidden_layers=2)
    with executing(86, lockstep=False, reverse=True) as launches:
        found = step(model)
    names = {launch.name for launch in launches}
    assert {
        "_rms_norm_forward_kernel",
        "_rotary_turn_kernel",
        "_rung_merge_forward_kernel",
        "_rung_merge_product_kernel",
        "_side_mlp_forward_kernel",
        "_side_mlp_rows_kernel",
        "_side_mlp_matrices_kernel",
        "_linear_cross_entropy_logits_kernel",
    } <= names
    assert any(each.startswith("_nf4_") for each in names)
    with ops.use_backend("reference"):
        same = step(model)
    exact = made(make, name, torch.float32, num_hidden_layers=2)
    with ops.use_backend("reference"):
        truth = step(exact)
    # As near to float32 as the reference in bfloat16 is, give or take what rounding does.
    for key, value in truth.items():
        scale = value.norm().clamp_min(1e-6)
        ours, theirs = ((each[key].float() - value).norm() / scale for each in (found, same))
        assert ours < 2 * theirs + 0.02, key


@pytest.mark.parametrize(
    ("machine", "dtype", "share"),
    [(interpreting, torch.float32, 0.1), (executing, torch.bfloat16, 0.7)],
    ids=["interpreted", "executed"],
)
def test_activations_in_int8(make, machine, dtype, share):
    """The frozen pass takes the kernels, and is nearer to the reference than rounding moves it."""
    backbone = backbone_from_transformers(
        make("qwen2", num_hidden_layers=2), blocksize=32, dtype=dtype
    )

    def hidden(activations: str) -> torch.Tensor:
        layout = SequenceLayout.build(*IDS.shape)
        return backbone.frozen_pass(IDS, layout=layout, activations=activations).hidden.float()

    with ops.use_backend("reference"):
        exact, expected = hidden("exact"), hidden("int8")
    with machine() as launches:
        found = hidden("int8")
    assert (found - expected).norm() < share * (expected - exact).norm()
    if machine is executing:
        names = {launch.name for launch in launches}
        assert {
            "_nf4_linear_int8_quantize_kernel",
            "_nf4_linear_int8_forward_kernel",
            "_nf4_swiglu_int8_forward_kernel",
        } <= names
        assert "_nf4_linear_forward_kernel" not in names
