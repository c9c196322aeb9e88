"""The live-byte meter: each byte once, from the operation that makes it until nobody holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AutoConfig, AutoModelForCausalLM

from ladder_kernels import (
    LadderConfig,
    LadderForCausalLM,
    accounts,
    nf4_linear,
    nf4_swiglu,
    quantize_nf4,
)
from ladder_kernels.accounts import count_as
from ladder_kernels.memory.ledger import is_file_mapped
from ladder_kernels.memory.meter import Meter
from ladder_kernels.memory.tracing import fake_cuda
from ladder_kernels.models.loading import backbone_from_config, backbone_from_transformers
from ladder_kernels.ops.nf4_linear.configurations import WORKSPACE_BYTES

CONFIG = AutoConfig.for_model(
    "llama",
    vocab_size=512,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LADDERS = {
    "lst": LadderConfig.lst(every=1, reduction=8),
    "recommended": LadderConfig.recommended(),
}
TOKENS = 192


def real(name: str, dtype: torch.dtype = torch.float32) -> LadderForCausalLM:
    torch.manual_seed(0)
    backbone = backbone_from_transformers(AutoModelForCausalLM.from_config(CONFIG), dtype=dtype)
    return LadderForCausalLM.from_backbone(backbone, LADDERS[name]).train()


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: Any, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    ids = torch.arange(TOKENS, device=model.device)[None] % 512
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def allocated_at_most(call: Callable[[], object]) -> int:
    """The most bytes beyond those at the start that PyTorch's own allocator had given out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    profiler: Any = profiled.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in events)]).max())


def test_every_byte_once():
    with Meter() as meter:
        first = torch.ones(1000)
        view = first.view(10, 100)[2:]
        doubled = view * 2
        assert meter.usage.total == 4000 + 3200
        del first
        assert meter.usage.total == 4000 + 3200  # the view holds all of it
        del view
        assert meter.usage.total == 3200
        doubled.add_(1)
        doubled.resize_(2000)
        assert meter.usage.total == 8000
    assert meter.peak.usage.total == 8000
    assert (meter.peak.usage.transients, meter.peak.operation) == (8000, "aten.resize_.default")
    del doubled
    assert meter.usage.total == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.booleans()), max_size=30))
def test_any_order_of_making_and_freeing(plan):
    kept: list[torch.Tensor] = []
    most = live = 0
    with Meter() as meter:
        for size, drop in plan:
            if drop and kept:
                live -= kept.pop(size % len(kept)).nbytes
            kept.append(torch.empty(size, dtype=torch.int16))
            live += 2 * size
            most = max(most, live)
            assert meter.usage.transients == live
    assert meter.peak.usage.total == most


def test_what_autograd_keeps_lives():
    x = torch.ones(1000, requires_grad=True)
    with Meter() as meter:
        total = (x * 2).exp().sum()
        assert meter.usage.total == 4000 + 4000 + 4  # x, what exp saved, the sum
        total.backward()
        del total
        assert meter.usage.total == 4000 + 4000  # x and its gradient
    assert x.grad is not None


def test_inference_mode_and_threads():
    def work() -> None:
        with torch.inference_mode():
            kept.append(count_as("weights", torch.ones(100)))

    kept: list[torch.Tensor] = []
    with Meter() as meter:
        work()
        assert meter.usage.weights == 400
        other = threading.Thread(target=work)
        other.start()
        other.join()
        assert meter.usage.weights == 800
        kept.clear()
        assert meter.usage.total == 0


def test_mapped_files_are_counted_apart(tmp_path):
    np.ones(5000, dtype=np.float32).tofile(tmp_path / "numbers")
    save_file({"a": torch.ones(5000)}, tmp_path / "saved.safetensors")
    mapped = [
        torch.from_numpy(np.memmap(tmp_path / "numbers", dtype=np.float32, mode="c")),
        load_file(tmp_path / "saved.safetensors")["a"],
        torch.from_file(str(tmp_path / "numbers"), size=5000),
    ]
    assert [is_file_mapped(tensor) for tensor in mapped] == [True] * 3
    heap = torch.from_numpy(np.ones(5000, dtype=np.float32))
    shared = torch.ones(5000).share_memory_()
    assert not is_file_mapped(heap)
    assert not is_file_mapped(shared)
    with Meter() as meter:
        copies = [tensor + 1 for tensor in (*mapped, heap)]
        count_as("weights", mapped[0])
        made = torch.from_file(str(tmp_path / "numbers"), size=5000)
    sizes = sum(tensor.untyped_storage().nbytes() for tensor in (*mapped, made))
    assert meter.usage.mapped == sizes
    assert meter.usage.total == meter.usage.transients == 20000 * (len(copies) + 1)


@pytest.mark.parametrize("name", LADDERS)
def test_what_it_is_for(name):
    model = real(name)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    sizes = sum(parameter.nbytes for parameter in trained(model))
    weights = sum(buffer.nbytes for buffer in model.backbone.buffers())
    with Meter(model, optimizer) as meter:
        assert meter.usage == (weights, 0, 0, sizes, 0, 0, 0)
        step(model, optimizer)
        largest = meter.largest()
        layers = len(model.ladder.tap_layers)
        assert largest.taps == TOKENS * 128 * (2 * layers + 4)  # bfloat16, and h[stop] in float32
        assert largest.ladder == 2 * sizes
        assert largest.weights == weights
        left = meter.usage
    states = sum(2 * parameter.nbytes + 4 for parameter in trained(model))
    assert left.optimizer == states
    assert left.ladder == sizes
    assert left.taps == 0
    assert left.transients < 8 * TOKENS + 64  # the tokens, and the loss
    # What is there already is known from the start, and gradients that are kept are the ladder's.
    again = Meter(model, optimizer)
    assert again.usage.optimizer == states
    with again:
        step(model, torch.optim.SGD(trained(model), lr=0.0))
        assert again.largest().ladder == 2 * sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LADDERS)
def test_pytorchs_allocator_counts_the_same(name, dtype):
    model = real(name, dtype)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    step(model, optimizer)  # with states, as all later ones
    expected = allocated_at_most(lambda: step(model, optimizer))
    with Meter(model, optimizer) as meter:
        before = meter.usage.total
        step(model, optimizer)
    # Inside of PyTorch's own kernels (attention's scratch) it cannot look.
    assert expected > 1_000_000
    assert 0.97 * expected <= meter.peak.usage.total - before <= expected


def test_it_sees_the_inside_of_our_own_operations():
    gate, up = (quantize_nf4(torch.randn(4096, 64)) for _ in range(2))
    x = torch.randn(64, 64, requires_grad=True)
    out = nf4_swiglu(x, gate, up).sum()
    with Meter() as meter:
        out.backward()
    # Both products in float32, and more: nothing of this is in inputs and outputs.
    assert meter.peak.usage.total > 5 * 64 * 4096 * 4
    assert any(moment.operation.startswith("ladder_kernels.") for moment in meter.timeline)


def test_numbers_stay_the_same():
    losses = []
    for metered in (False, True):
        model = real("recommended")
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        if metered:
            with Meter(model, optimizer):
                losses.append([step(model, optimizer) for _ in range(3)])
        else:
            losses.append([step(model, optimizer) for _ in range(3)])
    assert all(torch.equal(*pair) for pair in zip(*losses, strict=True))


@pytest.mark.parametrize("name", LADDERS)
def test_a_gpu_that_is_not_there(name):
    model = real(name, torch.bfloat16)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    with Meter(model, optimizer) as here:
        step(model, optimizer)
    with fake_cuda() as device:
        backbone = backbone_from_config(CONFIG, device=device)
        traced = LadderForCausalLM.from_backbone(backbone, LADDERS[name]).train()
        there_optimizer = torch.optim.AdamW(trained(traced), lr=1e-3)
        with Meter(traced, there_optimizer) as there:
            step(traced, there_optimizer)
    for part in ("weights", "taps", "ladder"):
        assert getattr(there.largest(), part) == getattr(here.largest(), part), part
    # Steps are counted on the host.
    steps = 4 * len(trained(model))
    assert there.usage.optimizer == here.usage.optimizer - steps
    assert there.usage.host >= steps


@pytest.mark.parametrize("tokens", [2048, 2056])
def test_workspaces_of_kernels_that_are_not_launched(tokens):
    with fake_cuda() as device:
        weight = quantize_nf4(torch.empty(16384, 4096, dtype=torch.bfloat16, device=device))
        x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device=device)
        with Meter(device=device) as meter:
            out = nf4_linear(x, weight)
    # Above 2,048 tokens, sm_86 dequantises the weight piece by piece.
    workspace = WORKSPACE_BYTES if tokens > 2048 else 0
    assert meter.peak.usage.total == x.nbytes + weight.nbytes + out.nbytes + workspace


def test_bitsandbytes_scales_are_weights():
    from bitsandbytes.nn.modules import Linear4bit

    layer: Any = Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data = torch.randn(128, 256)
    layer.to("cpu")
    state = layer.weight.quant_state
    assert state is not None
    assert state.code is not None
    scales = state.absmax.nbytes + state.code.nbytes
    nested = 0 if state.state2 is None else state.state2.absmax.nbytes + state.state2.code.nbytes
    offset = 0 if state.offset is None else state.offset.nbytes
    assert Meter(layer).usage.weights == 128 * 256 // 2 + scales + nested + offset


def test_nothing_stays_behind():
    model = torch.nn.Linear(8, 8)
    with Meter(model) as meter:
        model(torch.ones(1, 8)).sum().backward()
    assert accounts._watchers == []
    assert not _get_current_dispatch_mode_stack()
    before = meter.usage
    count_as("weights", torch.ones(100))
    torch.optim.SGD(model.parameters()).step()
    assert meter.usage == before


def test_starting_over():
    with Meter() as meter:
        kept = torch.ones(100)
        torch.ones(1000).sum()
        meter.restart()
        assert meter.peak.usage.total == kept.nbytes
        assert meter.timeline == []
