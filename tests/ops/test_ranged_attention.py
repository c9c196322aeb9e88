"""Attention over ranges against plain softmax in float64: the reference and the native kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.ops.ranged_attention import cpu, reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["causal", "documents", "window", "padding", "any"]


def plain(q, k, v, first, scale):
    """[B, S, H * hd] in q's dtype, each step rounded to it."""
    past, groups = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    places = torch.arange(k.shape[2])
    seen = (places <= places[past:, None]) & (places >= first[:, :, None])
    scores = (scale * (q @ k.transpose(2, 3))).masked_fill(~seen[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def ranges(kind, batch, queries, keys, generator):
    """int64 [B, S]: the first key that each query sees."""
    past = keys - queries
    places = torch.arange(past, keys).expand(batch, queries)
    if kind == "causal":
        return torch.zeros_like(places)
    if kind == "window":
        return (places - 40).clamp(min=0)
    if kind == "padding":
        return torch.minimum(places, torch.randint(0, keys, (batch, 1), generator=generator))
    if kind == "any":
        return (torch.rand(batch, queries, generator=generator) * (places + 1)).long()
    begins = torch.rand(batch, queries, generator=generator) < 0.02
    begins[:, 0] = True
    return torch.where(begins, places, 0).cummax(1).values


def case(kind, batch, queries, past, key_heads, group, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def make(heads, tokens):
        return torch.randn(batch, tokens, heads, width, generator=generator).to(dtype)

    q, k, v = (
        make(heads, tokens).transpose(1, 2)
        for heads, tokens in (
            *((key_heads * group, queries), (key_heads, queries + past)),
            (key_heads, queries + past),
        )
    )
    return q, k, v, ranges(kind, batch, queries, queries + past, generator)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    queries=st.integers(1, 70),
    past=st.sampled_from([0, 0, 1, 30]),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_reference(kind, batch, queries, past, key_heads, group, seed):
    q, k, v, first = case(kind, batch, queries, past, key_heads, group, 8, torch.float64, seed)
    wanted = plain(q, k, v, first, 0.3)
    torch.testing.assert_close(reference.ranged_attention(q, k, v, first, 0.3), wanted)
    torch.testing.assert_close(ops.ranged_attention(q, k, v, first, 0.3), wanted)
    if kind == "causal":
        torch.testing.assert_close(reference.ranged_attention(q, k, v, None, 0.3), wanted)


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,  # of 16 bits, a maximum over few numbers is luck
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    queries=st.integers(1, 300),
    past=st.sampled_from([0, 0, 1, 150]),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 4),
    width=st.sampled_from([1, 8, 15, 64, 128]),
    seed=st.integers(0, 2**31),
)
def test_native(
    assert_as_accurate,
    use_isa,
    isa,
    kind,
    dtype,
    batch,
    queries,
    past,
    key_heads,
    group,
    width,
    seed,
):
    use_isa(isa)
    q, k, v, first = case(kind, batch, queries, past, key_heads, group, width, dtype, seed)
    scale = width**-0.5
    exact = plain(q.double(), k.double(), v.double(), first, scale)
    assert_as_accurate(
        cpu.ranged_attention(q, k, v, first, scale), plain(q, k, v, first, scale), exact
    )
    if kind == "causal":
        without = cpu.ranged_attention(q, k, v, None, scale)
        assert torch.equal(without, cpu.ranged_attention(q, k, v, first, scale))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["causal", "documents", "window"])
def test_several_blocks_of_keys(assert_as_accurate, use_isa, isa, dtype, kind):
    use_isa(isa)
    q, k, v, first = case(kind, 1, 900, 40, 1, 2, 16, dtype, 0)
    exact = plain(q.double(), k.double(), v.double(), first, 0.25)
    out = cpu.ranged_attention(q, k, v, first, 0.25)
    assert_as_accurate(out, plain(q, k, v, first, 0.25), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, dtype):
    use_isa(isa)
    q, k, v, first = case("documents", 2, 300, 20, 2, 3, 64, dtype, 0)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(cpu.ranged_attention(q, k, v, first, 0.125))
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores(use_isa, isa):
    """What would overflow without the running maximum."""
    use_isa(isa)
    q, k, v, first = case("documents", 1, 300, 0, 1, 2, 16, torch.float32, 0)
    exact = plain(q.double(), k.double(), v.double(), first, 100.0)
    out = cpu.ranged_attention(q, k, v, first, 100.0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_query(use_isa, isa):
    use_isa(isa)
    q, k, v, first = case("causal", 1, 60, 0, 1, 2, 16, torch.float32, 0)
    q[0, 1, 7, 3] = torch.nan
    out = cpu.ranged_attention(q, k, v, first, 0.25).unflatten(2, (2, 16))
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 7, 1]]


def test_scores_are_never_whole(recorder):
    q, k, v, first = case("causal", 1, 700, 0, 2, 3, 32, torch.float32, 0)
    with recorder:
        cpu.ranged_attention(q, k, v, first, 0.1)
    assert recorder.peak == q.numel() * 4  # the result


def test_strides_and_empty_inputs():
    q, k, v, first = case("documents", 2, 50, 0, 2, 2, 16, torch.float32, 0)
    wanted = cpu.ranged_attention(q, k, v, first, 0.25)
    packed = torch.cat((q, k, v), dim=1).contiguous()
    views = packed.split((4, 2, 2), dim=1)
    assert torch.equal(cpu.ranged_attention(*views, first, 0.25), wanted)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert torch.equal(cpu.ranged_attention(*turned, first, 0.25), wanted)
    assert ops.ranged_attention(q[:0], k[:0], v[:0]).shape == (0, 50, 64)
    assert ops.ranged_attention(q[:, :, :0], k, v).shape == (2, 0, 64)


def test_the_operation_uses_it_and_has_a_default_scale():
    q, k, v, first = case("documents", 1, 60, 0, 1, 2, 16, torch.bfloat16, 0)
    expected = cpu.ranged_attention(q, k, v, first, 0.25)
    assert torch.equal(ops.ranged_attention(q, k, v, first), expected)


Q, K = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], K, K), r"q has shape \[4, 3, 8\]; it must be \[B, H, S, hd\]"),
        ((Q, K[:, :, :2], K[:, :, :2]), r"k has shape .*at least 3, 8\]"),
        ((Q, K.repeat(1, 2, 1, 1)[:, :3], K), r"a divisor of 4"),
        ((Q, K, K[:, :, :4]), r"v has shape \[1, 2, 4, 8\]; it must be \[1, 2, 5, 8\]"),
        ((Q, K.half(), K), "k has dtype torch.float16; it must be torch.float32, as q is"),
        ((Q, K, K, torch.zeros(1, 4).long()), r"first has shape \[1, 4\]; it must be \[1, 3\]"),
        ((Q, K, K, torch.zeros(1, 3)), "first has dtype torch.float32; it must be int64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ops.ranged_attention(*arguments)
