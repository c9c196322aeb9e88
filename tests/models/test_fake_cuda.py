"""Whole steps of models on a GPU that is not there: traced, with no numbers and no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import BackendError, ConfigError
from ladder_kernels.memory import tracing
from ladder_kernels.memory.peak import peak_memory_bytes
from ladder_kernels.memory.tracing import fake_cuda
from ladder_kernels.models.loading import backbone_from_config, backbone_from_transformers
from ladder_kernels.nf4 import NF4Weight, quantize_nf4

LADDERS = {
    "lst": LadderConfig.lst(every=1, reduction=16),
    "xladder": LadderConfig.xladder(connected=2, free=2, reduction=16, merge="channel"),
    "recommended": LadderConfig.recommended(),
}
QWEN_7B = AutoConfig.for_model(
    "qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
)
TOKENS = 2048


class Watch(TorchDispatchMode):
    """The operations that run, and the largest number of elements of what they make on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.__name__.split(".")[0])
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                self.largest = max(self.largest, value.numel())
        return out


def trained(model: LadderForCausalLM) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: LadderForCausalLM, tokens: int) -> torch.Tensor:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    loss: Any = model(ids, labels=ids).loss
    loss.backward()
    return loss


def made(config: Any, name: str, device: torch.device, **options: Any) -> LadderForCausalLM:
    backbone = backbone_from_config(config, device=device, **options)
    return LadderForCausalLM.from_backbone(backbone, LADDERS[name]).train()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LADDERS)
def test_a_step_has_the_gradients_that_it_has_on_a_cpu(make, name, recompute):
    real = make("qwen2", use_sliding_window=False, num_hidden_layers=4)
    on_cpu = LadderForCausalLM.from_backbone(
        backbone_from_transformers(real, dtype=torch.bfloat16), LADDERS[name]
    ).train()
    on_cpu.gradient_checkpointing = recompute
    expected = step(on_cpu, 24)
    with fake_cuda() as device:
        model = made(real.config, name, device)
        model.gradient_checkpointing = recompute
        loss = step(model, 24)
        torch.optim.AdamW(trained(model).values(), lr=1e-3).step()
    assert (loss.shape, loss.dtype, loss.device) == (expected.shape, expected.dtype, device)
    assert model.num_parameters() == on_cpu.num_parameters()
    theirs = trained(on_cpu)
    assert trained(model).keys() == theirs.keys()
    for key, parameter in trained(model).items():
        found, wanted = parameter.grad, theirs[key].grad
        assert (found is None) == (wanted is None), key
        if found is not None and wanted is not None:
            assert found.device == parameter.device == device
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), key


@pytest.mark.parametrize("name", LADDERS)
def test_seven_billion_parameters(name):
    before = peak_memory_bytes()
    with fake_cuda() as device, Watch() as watch:
        model = made(QWEN_7B, name, device, quantize_head=True)
        assert model.num_parameters() > 7.6e9
        watch.largest = 0
        loss = step(model, TOKENS)
        torch.optim.AdamW(trained(model).values(), lr=1e-3).step()
    assert loss.device == device
    for key, parameter in trained(model).items():
        assert parameter.grad is not None, key
        assert parameter.grad.device == device
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.float32)
    # Neither logits nor scores nor a dequantised head: the widest is what an MLP is made of.
    assert watch.largest <= TOKENS * QWEN_7B.intermediate_size
    kernels = {"nf4_linear", "nf4_swiglu", "rms_norm", "rung_merge", "rung_merge_backward"}
    kernels |= {"nf4_linear_cross_entropy", "scaled_dot_product_attention", "rotary_"}
    # The side stream is float32; the model's own layers above a re-entry are not.
    above = name == "recommended"
    attention = f"_scaled_dot_product_{'flash' if above else 'efficient'}_attention"
    kernels |= {attention, f"{attention}_backward"}
    kernels |= {"nf4_linear_transposed"} if above else set()
    assert kernels <= watch.names
    # The weights alone would be four gigabytes.
    assert peak_memory_bytes() - before < 1e9


@pytest.mark.parametrize("model_type", ["gpt2", "gemma", "olmo2"])
@pytest.mark.filterwarnings("ignore:.*transformers' own layers")
def test_layers_of_transformers(make, model_type):
    config = make(model_type).config
    with fake_cuda() as device:
        model = LadderForCausalLM.from_backbone(
            backbone_from_config(config, device=device), LadderConfig.lst(every=1, reduction=4)
        ).train()
        if model_type == "gpt2":
            with pytest.raises(DataDependentOutputException):
                step(model, 9)  # it asks for the last position, which must be in its table
        else:
            assert step(model, 9).device == device


def test_whole_numbers(make):
    with fake_cuda() as device:
        config = make("qwen2", use_sliding_window=False).config
        backbone = backbone_from_config(config, device=device, blocksize=32)
        model = LadderForCausalLM.from_backbone(backbone, LADDERS["lst"], activations="int8")
        with Watch() as watch:
            step(model.train(), 9)
    assert {"nf4_linear_int8", "nf4_swiglu_int8"} <= watch.names


def test_models_can_be_moved_and_cast(make):
    with fake_cuda() as device:
        model: Any = made(make("llama").config, "lst", device)
        model.to(torch.float16).to("cpu").to("cuda").to(device)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert {t.device for t in (*model.parameters(), *model.backbone.buffers())} == {device}
        assert model.backbone.dtype == torch.float16
        step(model, 9)


@pytest.mark.parametrize(
    ("dtype", "masked", "shared", "kernel"),
    [
        (torch.bfloat16, False, True, "_scaled_dot_product_flash_attention"),
        (torch.float16, True, False, "_scaled_dot_product_efficient_attention"),
        (torch.float32, False, False, "_scaled_dot_product_efficient_attention"),
        (torch.float32, False, True, "_safe_softmax"),
    ],
)
def test_attention_takes_a_gpus_kernels(dtype, masked, shared, kernel):
    with fake_cuda() as device, Watch() as watch:
        q = torch.randn(2, 4, 9, 20, dtype=dtype, device=device, requires_grad=True)
        k = torch.randn(2, 2 if shared else 4, 9, 20, dtype=dtype, device=device)
        mask = torch.ones(2, 1, 9, 9, dtype=torch.bool, device=device) if masked else None
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, k, mask, is_causal=not masked, enable_gqa=shared
        )
        out.sum().backward()
    # The efficient kernel reads four channels of float32 and eight of float16 at a time.
    assert (kernel in watch.names) != (dtype == torch.float16)
    assert (out.shape, out.dtype, out.device) == (q.shape, dtype, device)
    assert q.grad is not None
    assert (q.grad.shape, q.grad.device) == (q.shape, device)


@pytest.mark.parametrize("name", ["silu", "mish"])
def test_gradients_are_taken_whole(name):
    with fake_cuda() as device, Watch() as watch:
        x = torch.randn(3, 4, device=device, requires_grad=True)
        getattr(torch.nn.functional, name)(x).sum().backward()
    assert f"{name}_backward" in watch.names
    assert "sigmoid" not in watch.names
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_getters_tell_the_truth():
    with fake_cuda() as device:
        x = torch.ones(3, 4, device="cuda", requires_grad=True)
        assert (x.device, x.is_cuda, x.is_meta, x.get_device()) == (device, True, False, 0)
        assert x.to(device) is x
        # A mask may choose every row.
        assert x[torch.ones(3, dtype=torch.bool, device=device)].shape == (3, 4)
        (doubled,) = torch.autograd.grad((x.to("cpu") * 2).sum(), x)
        assert doubled.device == device
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            torch.add(x, torch.ones(3, 4))


def test_nothing_stays_behind():
    with fake_cuda() as device:
        torch.ones(2, device=device, requires_grad=True).sum().backward()
    assert torch.autograd.is_multithreading_enabled()
    x = torch.ones(2, requires_grad=True)
    (x * 3).sum().backward()
    assert torch.equal(torch.as_tensor(x.grad), torch.full((2,), 3.0))
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.ones(2, device="cuda")


@pytest.mark.skipif(torch.cuda._is_compiled(), reason="this PyTorch has guards for CUDA")
def test_a_pytorch_that_hides_its_guards(monkeypatch):
    monkeypatch.setattr(tracing, "_GUARDS", "no such symbol")
    with pytest.raises(BackendError, match="built without CUDA"), fake_cuda():
        pass


def test_weights_without_values():
    with fake_cuda() as device:
        weight = quantize_nf4(torch.empty(96, 80, dtype=torch.float16, device=device))
        assert weight.dequantize().shape == (96, 80)
        assert weight.dequantize_rows(3, 7, torch.float32).device == device
        for double_quant in (True, False):
            real = quantize_nf4(torch.ones(3, 50), 32, double_quant)
            empty = NF4Weight.empty((3, 50), blocksize=32, double_quant=double_quant, device=device)
            for name, tensor in real.tensors().items():
                found = empty.tensors()[name]
                assert (found.shape, found.dtype, found.device) == (
                    *(tensor.shape, tensor.dtype),
                    device,
                )
    with pytest.raises(ConfigError, match="blocksize is 48"):
        NF4Weight.empty((3, 50), blocksize=48)


def test_no_garbage_for_weights(make):
    config = make("llama").config
    with pytest.raises(ConfigError, match="device: found 'cpu', where tensors have values"):
        backbone_from_config(config, device="cpu")
    empty = backbone_from_config(config, device="meta")
    assert {tensor.device.type for tensor in empty.buffers()} == {"meta"}
    assert empty.fingerprint != backbone_from_transformers(make("llama")).fingerprint
