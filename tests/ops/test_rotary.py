"""Rotary embeddings in place equal transformers' by bits: the reference and the native kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ladder_kernels import native, ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.ops.rotary import cpu, reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(batch, length, half, dtype, generator=None):
    angles = 10 * torch.rand(batch, length, 1, half, generator=generator)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def expected(q, k, cos, sin):
    """transformers', whose heads come before tokens and whose tables hold each angle twice."""
    whole = [torch.cat((table, table), -1)[:, :, 0] for table in (cos, sin)]
    turned = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *whole)
    return [x.transpose(1, 2) for x in turned]


def check(function, q, k, cos, sin):
    wanted = expected(q, k, cos, sin)
    function(q, k, cos, sin)
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(0, 3),
    length=st.integers(0, 40),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 3)),
    half=st.integers(0, 70),
    shared=st.booleans(),
    heads_first=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_bits_equal_transformers(
    use_isa, isa, dtype, batch, length, heads, half, shared, heads_first, seed
):
    use_isa(isa)
    generator = torch.Generator().manual_seed(seed)

    def make(count):
        if heads_first:
            x = torch.randn(batch, count, length, 2 * half + 3, generator=generator).to(dtype)
            return x.transpose(1, 2)[..., 1 : 2 * half + 1]
        return torch.randn(batch, length, count, 2 * half, generator=generator).to(dtype)

    q, k = make(heads[0]), make(heads[1])
    cos, sin = tables(1 if shared else batch, length, half, dtype, generator)
    for function in (reference.rotary_, cpu.rotary_):
        check(function, q.clone(), k.clone(), cos, sin)
    check(cpu.rotary_, q, k, cos, sin)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_on_several_threads(use_isa, isa, dtype):
    use_isa(isa)
    cos, sin = tables(1, 900, 32, dtype)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        q, k = torch.randn(2, 900, 4, 64).to(dtype), torch.randn(2, 900, 2, 64).to(dtype)
        check(cpu.rotary_, q, k, cos, sin)


@pytest.mark.parametrize("function", [reference.rotary_, cpu.rotary_])
def test_channels_that_are_not_adjacent(function):
    q, k = torch.randn(2, 5, 8, 3).transpose(2, 3), torch.randn(2, 5, 8, 3).transpose(2, 3)
    check(function, q, k, *tables(2, 5, 4, torch.float32))


def test_the_operation_uses_it(monkeypatch):
    used = []
    monkeypatch.setattr(cpu, "_turn", lambda *_: used.append(1))
    with torch.inference_mode():
        q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
        ops.rotary_(q, k, *tables(1, 3, 4, torch.float32))
    assert len(used) == 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_inference_mode_and_outside(backend):
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), ops.use_backend(backend):
            q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
            check(ops.rotary_, q, k, *tables(1, 3, 4, torch.float32))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_differentiable_one_has_the_same_bits_and_leaves_its_inputs(backend, dtype):
    q, k = torch.randn(2, 5, 4, 8).to(dtype), torch.randn(2, 5, 2, 8).to(dtype)
    cos, sin = tables(2, 5, 4, dtype)
    kept = q.clone(), k.clone()
    with ops.use_backend(backend):
        turned = ops.rotary(q, k, cos, sin)
        assert torch.equal(q, kept[0])
        assert torch.equal(k, kept[1])
        ops.rotary_(q, k, cos, sin)
    assert torch.equal(turned[0], q)
    assert torch.equal(turned[1], k)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient(backend):
    q = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(2, 3, 2, torch.float64)
    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(lambda q, k: ops.rotary(q, k, cos, sin), (q, k))


def test_compiled():
    torch._dynamo.reset()

    def turned(q, k, cos, sin):
        q, k = q * 2, k * 2
        ops.rotary_(q, k, cos, sin)
        return q, k

    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8)
    cos, sin = tables(1, 3, 4, torch.float32)
    compiled = torch.compile(turned, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(compiled(q, k, cos, sin), turned(q, k, cos, sin), strict=True):
        assert torch.equal(ours, wanted)


Q, K, TABLE = torch.ones(2, 5, 3, 8), torch.ones(2, 5, 1, 8), torch.ones(1, 5, 1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], K, TABLE, TABLE), r"rotary_: q has shape \[5, 3, 8\]; it must be \[B, S, H, hd\]"),
        ((Q[..., :7], K, TABLE, TABLE), r"q has shape \[2, 5, 3, 7\]; .* hd even"),
        ((Q.int(), K, TABLE, TABLE), "q has dtype torch.int32"),
        ((Q, K.half(), TABLE, TABLE), "k has dtype torch.float16"),
        ((Q, K[:, :4], TABLE, TABLE), r"k has shape \[2, 4, 1, 8\]; it must be \[2, 5, 'Hkv', 8\]"),
        ((Q, K, TABLE[:, :4], TABLE), r"cos has shape \[1, 4, 1, 4\]; it must be \[1, 5, 1, 4\]"),
        ((Q, K, TABLE.expand(3, 5, 1, 4), TABLE), r"cos has shape .*it must be \[2, 5, 1, 4\]"),
        ((Q, K, TABLE, TABLE.expand(2, 5, 1, 4)), r"sin has shape .*it must be \[1, 5, 1, 4\]"),
        ((Q, K, TABLE.double(), TABLE), "cos has dtype torch.float64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ops.rotary_(*arguments)
