"""The parts of the side stream: taps, merges, blocks and outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ladder_kernels.nn import block as block_module
from ladder_kernels.nn.attention import SequenceLayout
from ladder_kernels.nn.block import (
    BLOCKS,
    MLPBlock,
    SideBlock,
    SideShape,
    TransformerBlock,
    rotary_tables,
)
from ladder_kernels.nn.merge import MERGES, GateMerge
from ladder_kernels.nn.output import OUTPUTS, Output
from ladder_kernels.nn.tap import TAPS, ResidualTap
from ladder_kernels.ops import rms_norm, side_mlp

SHAPE = SideShape(width=24, head_dim=8, mlp_width=40)
EPS = 1e-6


def filled(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def run(block: SideBlock, u: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    rotary = None
    if block.shape.heads:
        rotary = rotary_tables(layout.position_ids, block.shape.head_dim, 100.0, u.dtype)
    return block(u, layout, rotary)


def test_registries_hold_what_the_documentation_names():
    assert set(MERGES) == {"sum", "gate", "channel"}
    assert set(BLOCKS) == {"transformer", "mlp"}
    assert set(OUTPUTS) == {"residual", "interpolate", "side"}
    assert set(TAPS) == {"residual"}


@given(
    merge=st.sampled_from(sorted(MERGES)),
    taps=st.integers(1, 3),
    tokens=st.integers(0, 5),
    temperature=st.sampled_from([0.1, 1.0]),
)
@settings(max_examples=30, deadline=None)
def test_merges(merge: str, taps: int, tokens: int, temperature: float):
    module = MERGES[merge](6, temperature=temperature, eps=EPS)
    side, sources = torch.randn(2, tokens, 6), [torch.randn(2, tokens, 10) for _ in range(taps)]
    downs = [torch.randn(6, 10) for _ in range(taps)]
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    z = sum(
        x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() @ down.T
        for x, down in zip(sources, downs, strict=True)
    )
    expected = side + z
    if isinstance(module, GateMerge):
        assert module.alpha.shape == ((1,) if merge == "gate" else (6,))
        g = torch.sigmoid(module.alpha / temperature)
        expected = g * side + (1 - g) * z
    torch.testing.assert_close(module(side, sources, downs), expected, rtol=1e-4, atol=1e-4)
    module.reset_parameters()
    gate = module.gate()
    assert gate is None or bool((gate == 0.5).all())


def test_a_tap_reads_its_layer():
    tap = ResidualTap(2, hidden_size=10, width=6)
    tap.reset_parameters(lambda weight: nn.init.constant_(weight, 0.5))
    states = {t: torch.full((1, 2, 10), float(t)) for t in range(4)}
    assert tap.read(states) is states[2]
    assert tap.down.shape == (6, 10)
    assert (tap.down == 0.5).all()


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_causal_and_mind_documents_and_padding(kind: str):
    block = filled(BLOCKS[kind](SHAPE, eps=EPS))
    u = torch.randn(1, 8, 24)
    whole = run(block, u, SequenceLayout.build(1, 8))
    changed = u.clone()
    changed[:, 5:] += 1.0
    torch.testing.assert_close(run(block, changed, SequenceLayout.build(1, 8))[:, :5], whole[:, :5])

    packed = SequenceLayout.build(1, 8, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    parts = [run(block, u[:, a:b], SequenceLayout.build(1, b - a)) for a, b in ((0, 3), (3, 8))]
    torch.testing.assert_close(run(block, u, packed), torch.cat(parts, 1))

    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    padded = run(block, u, SequenceLayout.build(1, 8, attention_mask=mask))
    alone = run(block, u[:, 2:], SequenceLayout.build(1, 6))
    torch.testing.assert_close(padded[:, 2:], alone)
    assert torch.isfinite(padded).all()


def test_attention_uses_relative_positions():
    block = filled(TransformerBlock(SHAPE, eps=EPS))
    u = torch.randn(1, 6, 24)
    start = run(block, u, SequenceLayout.build(1, 6))
    later = SequenceLayout.build(1, 6, position_ids=torch.arange(40, 46)[None])
    torch.testing.assert_close(run(block, u, later), start, rtol=1e-4, atol=1e-4)
    stretched = SequenceLayout(
        position_ids=torch.arange(6)[None] * 3, past_length=0, padding=None, documents=None
    )
    assert not torch.allclose(run(block, u, stretched), start, atol=1e-3)


def test_rotary_tables_agree_with_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=parameters)
    positions = torch.tensor([[0, 1, 2, 70], [5, 6, 7, 8]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = rotary_tables(positions, 16, 500.0, torch.float32)
    torch.testing.assert_close(torch.cat((ours[0], ours[0]), -1)[:, 0], cos)
    torch.testing.assert_close(torch.cat((ours[1], ours[1]), -1)[:, 0], sin)


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_roles(kind: str):
    block = BLOCKS[kind](SHAPE, eps=EPS)
    block.reset_parameters(nn.init.zeros_)
    weights = block.weights()
    assert {id(w) for w in weights.values()} == {id(p) for p in block.parameters()}
    assert block.cached == ("q" in weights)
    u = torch.randn(2, 3, 24)
    assert torch.equal(run(block, u, SequenceLayout.build(2, 3)), u)


def plain_mlp(block: Any, u: torch.Tensor) -> torch.Tensor:
    x = rms_norm(u, block.mlp_norm, EPS)
    return u + block.down(F.silu(block.gate(x)) * block.up(x))


def test_on_a_cpu_blocks_are_pytorchs_operations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_module, "side_mlp", None)
    block = filled(MLPBlock(SHAPE, eps=EPS))
    u = torch.randn(2, 5, 24)
    assert torch.equal(block(u, SequenceLayout.build(2, 5)), plain_mlp(block, u))


def test_on_triton_an_mlp_is_one_operation(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from ladder_kernels.audit import interpreting

    block = filled(MLPBlock(SHAPE, eps=EPS))
    u, called = torch.randn(2, 5, 24), []

    def counted(*args: Any) -> torch.Tensor:
        called.append(args)
        return side_mlp(*args)

    monkeypatch.setattr(block_module, "side_mlp", counted)
    with interpreting():
        out = block(u, SequenceLayout.build(2, 5))
    assert len(called) == 1
    torch.testing.assert_close(out, plain_mlp(block, u), rtol=1e-4, atol=1e-5)


def test_a_block_traces_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_module, "rms_norm", None)  # PyTorch's several would need it
    block = MLPBlock(SHAPE, eps=EPS)

    def fake(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16)

    with FakeTensorMode():
        weights = {name: fake(*weight.shape) for name, weight in block.named_parameters()}
        u = fake(2, 5, 24)
        out = torch.func.functional_call(block, weights, (u, SequenceLayout.build(2, 5)))
    assert (out.shape, out.device.type, out.dtype) == (u.shape, "cuda", torch.bfloat16)


def test_on_triton_queries_and_keys_are_turned_by_a_kernel(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from ladder_kernels.audit import interpreting

    block = filled(TransformerBlock(SHAPE, eps=EPS))
    layout = SequenceLayout.build(2, 5, position_ids=torch.tensor([[0, 1, 2, 0, 1]] * 2))
    u, grad = torch.randn(2, 5, 24).requires_grad_(), torch.randn(2, 5, 24)

    def computed() -> list[torch.Tensor]:
        out = run(block, u, layout)
        return [out, *torch.autograd.grad(out, [u, *block.parameters()], grad)]

    expected = computed()
    monkeypatch.setattr(block_module, "_rotate", None)
    with interpreting():
        found = computed()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_outputs_return_the_backbones_dtype(kind: str, dtype: torch.dtype):
    output: Output = OUTPUTS[kind](hidden_size=10, width=6, eps=EPS)
    output.reset_parameters(nn.init.ones_)
    hidden, side = (30 * torch.randn(2, 3, 10)).to(dtype), torch.randn(2, 3, 6)
    y = output(side, hidden)
    assert (y.dtype, y.shape) == (dtype, hidden.shape)
    if kind != "side":
        assert torch.equal(y, hidden)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_what_the_documentation_says(kind: str):
    output = filled(OUTPUTS[kind](hidden_size=10, width=6, eps=EPS)).double()
    hidden, side = 30 * torch.randn(2, 3, 10).double(), torch.randn(2, 3, 6).double()
    top = side / (side.square().mean(-1, keepdim=True) + EPS).sqrt() @ output.up.T
    expected = {
        "residual": lambda: hidden + hidden.square().mean(-1, keepdim=True).sqrt() * top,
        "interpolate": lambda: (1 - output.keep) * top + output.keep * hidden,
        "side": lambda: top,
    }[kind]()
    torch.testing.assert_close(output(side, hidden), expected)
