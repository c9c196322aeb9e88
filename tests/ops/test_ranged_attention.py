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


def gradients(function, q, k, v, grad):
    """What ``function(q, k, v)`` gives, and the gradients of q, k and v from that of the result."""
    leaves = [value.detach().requires_grad_() for value in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def native(q, k, v, first, scale, grad):
    """As :func:`gradients`, of the native kernels."""
    out, lse = cpu.ranged_attention(q, k, v, first, scale, True)
    grads = cpu.ranged_attention_backward(grad, q, k, v, first, scale, out, lse)
    return [out, *(value.transpose(1, 2) for value in grads)]


def forward(q, k, v, first, scale):
    return cpu.ranged_attention(q, k, v, first, scale, False)[0]


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
    torch.testing.assert_close(reference.differentiable_attention(q, k, v, first, 0.3), wanted)
    torch.testing.assert_close(ops.ranged_attention(q, k, v, first, 0.3), wanted)
    if kind == "causal":
        torch.testing.assert_close(reference.differentiable_attention(q, k, v, None, 0.3), wanted)


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
    assert_as_accurate(forward(q, k, v, first, scale), plain(q, k, v, first, scale), exact)
    if kind == "causal":
        assert torch.equal(forward(q, k, v, None, scale), forward(q, k, v, first, scale))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 2),
    queries=st.integers(1, 150),
    past=st.sampled_from([0, 0, 1, 30]),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_gradients_of_the_reference(kind, batch, queries, past, key_heads, group, seed):
    q, k, v, first = case(kind, batch, queries, past, key_heads, group, 8, torch.float64, seed)
    grad = torch.randn(batch, queries, key_heads * group * 8, dtype=torch.float64)
    wanted = gradients(lambda *qkv: plain(*qkv, first, 0.3), q, k, v, grad)
    found = gradients(lambda *qkv: ops.ranged_attention(*qkv, first, 0.3), q, k, v, grad)
    torch.testing.assert_close(found, wanted)
    by_pytorch = gradients(
        lambda *qkv: reference.differentiable_attention(*qkv, first, 0.3), q, k, v, grad
    )
    torch.testing.assert_close(by_pytorch, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    q, k, v, first = case(kind, 2, 5, 3, 2, 2, 4, torch.float64, 0)
    leaves = [value.contiguous().requires_grad_() for value in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: ops.ranged_attention(*qkv, first, 0.5), leaves)


# Of fewer numbers, the largest error is as large as chance has it.
SIZES = st.one_of(
    st.tuples(st.just(torch.float32), st.integers(5, 300), st.sampled_from([1, 8, 15, 64, 128])),
    st.tuples(st.sampled_from(DTYPES[1:]), st.integers(16, 300), st.sampled_from([8, 15, 64, 128])),
)


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the rule is about maxima of 16-bit roundings
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(KINDS),
    sizes=SIZES,
    batch=st.integers(1, 2),
    past=st.sampled_from([0, 0, 1, 150]),
    key_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 2**31),
)
def test_native_gradients(
    assert_as_accurate,
    use_isa,
    isa,
    kind,
    sizes,
    batch,
    past,
    key_heads,
    group,
    seed,
):
    use_isa(isa)
    dtype, queries, width = sizes
    q, k, v, first = case(kind, batch, queries, past, key_heads, group, width, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(batch, queries, key_heads * group * width, generator=generator).to(dtype)
    scale = width**-0.5

    def by_expression(to):
        inputs = (value.to(to) for value in (q, k, v))
        return gradients(lambda *qkv: plain(*qkv, first, scale), *inputs, grad)

    found = native(q, k, v, first, scale, grad)
    assert torch.equal(found[0], forward(q, k, v, first, scale))
    for ours, same, exact in zip(
        found, by_expression(dtype), by_expression(torch.float64), strict=True
    ):
        assert ours.dtype == dtype
        assert_as_accurate(ours, same, exact)
    if kind == "causal":
        for ours, without in zip(found, native(q, k, v, None, scale, grad), strict=True):
            assert torch.equal(ours, without)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["causal", "documents", "window"])
def test_several_blocks_of_keys(assert_as_accurate, use_isa, isa, dtype, kind):
    use_isa(isa)
    q, k, v, first = case(kind, 1, 900, 40, 1, 2, 16, dtype, 0)
    exact = plain(q.double(), k.double(), v.double(), first, 0.25)
    out, _ = cpu.ranged_attention(q, k, v, first, 0.25, False)
    assert_as_accurate(out, plain(q, k, v, first, 0.25), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, dtype):
    use_isa(isa)
    q, k, v, first = case("documents", 2, 300, 20, 2, 3, 64, dtype, 0)
    grad = torch.randn(2, 300, 6 * 64).to(dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(native(q, k, v, first, 0.125, grad))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores(use_isa, isa):
    """What would overflow without the running maximum."""
    use_isa(isa)
    q, k, v, first = case("documents", 1, 300, 0, 1, 2, 16, torch.float32, 0)
    exact = plain(q.double(), k.double(), v.double(), first, 100.0)
    out = forward(q, k, v, first, 100.0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_query(use_isa, isa):
    use_isa(isa)
    q, k, v, first = case("causal", 1, 60, 0, 1, 2, 16, torch.float32, 0)
    q[0, 1, 7, 3] = torch.nan
    out, dq, _, dv = native(q, k, v, first, 0.25, torch.ones(1, 60, 32))
    assert out.unflatten(2, (2, 16)).isnan().any(-1).nonzero().tolist() == [[0, 7, 1]]
    assert dq.isnan().any(-1).nonzero().tolist() == [[0, 1, 7]]
    assert dv.isnan().any(-1).nonzero().tolist() == [
        [0, 0, key] for key in range(8)
    ]  # those it sees


def test_scores_are_never_whole(recorder):
    q, k, v, first = case("causal", 1, 700, 0, 2, 3, 32, torch.float32, 0)
    with recorder:
        forward(q, k, v, first, 0.1)
    assert recorder.peak == q.numel() * 4  # the result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_training_step(recorder, dtype):
    """Kept: the result and a number a query and head; then gradients, summed in float32."""
    q, k, v, first = case("causal", 1, 700, 0, 2, 3, 32, dtype, 0)
    with recorder:
        out, lse = cpu.ranged_attention(q, k, v, first, 0.1, True)
    kept = out.nbytes + 4 * 6 * 700
    assert recorder.peak == kept
    with recorder:
        grads = cpu.ranged_attention_backward(out, q, k, v, first, 0.1, out, lse)
    sums = 4 * (q.numel() + k.numel() + v.numel())
    assert recorder.peak <= kept + sums + (v.nbytes if dtype == torch.bfloat16 else 0)
    assert [value.dtype for value in grads] == [dtype] * 3


def test_keys_that_nobody_sees_cost_nothing():
    """Not even their gradients, which stay zero; nor are they read."""
    q, k, v, _ = case("causal", 1, 40, 500, 1, 2, 16, torch.float32, 0)
    first = torch.full((1, 40), 384)
    k[:, :, :384], v[:, :, :384] = torch.nan, torch.nan
    grad = torch.randn(1, 40, 32)
    out, dq, dk, dv = native(q, k, v, first, 0.25, grad)
    shown = native(q, k[:, :, 384:], v[:, :, 384:], first - 384, 0.25, grad)
    for ours, wanted in zip((out, dq, dk[:, :, 384:], dv[:, :, 384:]), shown, strict=True):
        assert torch.equal(ours, wanted)
    assert not dk[:, :, :384].any()
    assert not dv[:, :, :384].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_a_query_does_not_see_change_nothing_of_it(use_isa, isa, dtype):
    """Though their scores be far above its own."""
    use_isa(isa)
    q, k, v, first = case("window", 1, 300, 0, 1, 3, 16, dtype, 0)
    grad = torch.randn(1, 300, 48).to(dtype)
    hidden = torch.arange(300) >= 150
    hidden[:100] = True
    large = [torch.where(hidden[:, None], 1000 * value, value) for value in (k, v)]
    out, dq, *_ = native(q, k, v, first, 1.0, grad)
    other, other_dq, *_ = native(q, *large, first, 1.0, grad)
    seen = slice(140, 150)  # keys 100 to 149
    assert torch.equal(out[:, seen], other[:, seen])
    assert torch.equal(dq[:, :, seen], other_dq[:, :, seen])
    assert not torch.equal(out, other)


def test_strides_and_empty_inputs():
    q, k, v, first = case("documents", 2, 50, 0, 2, 2, 16, torch.float32, 0)
    grad = torch.randn(2, 50, 64)
    wanted = native(q, k, v, first, 0.25, grad)
    packed = torch.cat((q, k, v), dim=1).contiguous()
    views = packed.split((4, 2, 2), dim=1)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    along = grad.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (native(*views, first, 0.25, along), native(*turned, first, 0.25, grad)):
        for ours, theirs in zip(strided, wanted, strict=True):
            assert torch.equal(ours, theirs)
    for none in (q[:0], q[:, :, :0]):
        keys = k[: none.shape[0]]
        leaves = [value.detach().requires_grad_() for value in (none, keys, keys)]
        out = ops.ranged_attention(*leaves)
        assert out.shape == (none.shape[0], none.shape[2], 64)
        for value, of in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
            assert torch.equal(value, torch.zeros_like(of))


def test_the_operation_uses_it_and_has_a_default_scale():
    q, k, v, first = case("documents", 1, 60, 0, 1, 2, 16, torch.bfloat16, 0)
    grad = torch.randn(1, 60, 32).bfloat16()
    expected = native(q, k, v, first, 0.25, grad)
    assert torch.equal(ops.ranged_attention(q, k, v, first), expected[0])
    found = gradients(lambda *qkv: ops.ranged_attention(*qkv, first), q, k, v, grad)
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)


def test_gradients_are_of_those_that_ask():
    q, k, v, first = case("documents", 1, 20, 0, 1, 2, 16, torch.float32, 0)
    out = ops.ranged_attention(q, k.requires_grad_(), v, first)
    (dk,) = torch.autograd.grad(out.sum(), k)
    assert torch.equal(dk, native(q, k.detach(), v, first, 0.25, torch.ones(1, 20, 32))[2])


def test_autocast():
    q, k, v, first = case("documents", 1, 60, 0, 1, 2, 16, torch.float32, 0)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.ranged_attention(q.bfloat16(), k, v, first)
    assert torch.equal(out, forward(*(t.bfloat16() for t in (q, k, v)), first, 0.25))


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
