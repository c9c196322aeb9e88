"""The Triton rotary embeddings equal the reference by bits, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import interpreting
from ladder_kernels.errors import BackendError
from ladder_kernels.ops.rotary import gpu, reference

# The interpreter cuts stores of bfloat16 instead of rounding them.
DTYPES = [torch.float32, torch.float16]


def tables(batch, length, half, dtype, generator=None):
    angles = 10 * torch.rand(batch, length, 1, half, generator=generator)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(0, 3),
    length=st.integers(0, 7),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 3)),
    half=st.integers(0, 70),
    shared=st.booleans(),
    heads_first=st.booleans(),
    channel_step=st.integers(1, 2),
    elements=st.sampled_from([1, 64, 2048]),
    seed=st.integers(0, 2**31),
)
def test_bits_equal_the_reference_and_nothing_around_is_touched(
    dtype, batch, length, heads, half, shared, heads_first, channel_step, elements, seed
):
    generator = torch.Generator().manual_seed(seed)

    def make(count):
        """A buffer of NaN, and the values within it."""
        shape = (batch, count, length) if heads_first else (batch, length, count)
        around = torch.full((*shape, 2 * half * channel_step + 3), torch.nan, dtype=dtype)
        view = around[..., 1 : 1 + 2 * half * channel_step : channel_step]
        view.copy_(torch.randn(*shape, 2 * half, generator=generator))
        return around, view.transpose(1, 2) if heads_first else view

    def wide_table(table):
        """The same values, further apart."""
        return torch.stack((table, torch.full_like(table, torch.nan)), -1)[..., 0]

    cos, sin = tables(1 if shared else batch, length, half, dtype, generator)
    buffers, values = zip(*(make(count) for count in heads), strict=True)
    wanted = [value.clone() for value in values]
    reference.rotary_(*wanted, cos, sin)
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_ELEMENTS", elements)
        ops.rotary_(*values, cos, wide_table(sin))
    for buffer, value, want in zip(buffers, values, wanted, strict=True):
        assert torch.equal(value, want)
        value.fill_(torch.nan)
        assert buffer.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_turns_back(dtype):
    cos, sin = tables(2, 5, 4, dtype)

    def compute():
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        turned = ops.rotary(*leaves, cos, sin)
        return [*turned, *torch.autograd.grad(turned, leaves, (k.repeat(1, 1, 3, 1), k))]

    q, k = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(2, 5, 1, 8).to(dtype)
    with interpreting():
        actual = compute()
    for ours, theirs in zip(actual, compute(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(own - other)", "(own + other)"),
        ("(channels + half)", "(channels + 1)"),
        ("heads < H", "heads <= H"),
        ("(second * s).to(dtype).to(tl.float32)", "second * s"),
    ],
)
def test_a_wrong_kernel_is_found(broken, right, wrong):
    wrong_gpu = broken(gpu, right, wrong)
    cos, sin = tables(1, 3, 4, torch.float16)
    around = torch.randn(1, 3, 4, 8).half()
    q, k = around[:, :, :3], torch.randn(1, 3, 1, 8).half()
    wanted = [around.clone(), k.clone()]
    reference.rotary_(wanted[0][:, :, :3], wanted[1], cos, sin)
    with interpreting():
        wrong_gpu.rotary_(q, k, cos, sin)
    assert not (torch.equal(around, wanted[0]) and torch.equal(k, wanted[1]))


def test_heads_wider_than_a_program_are_refused():
    x, table = torch.ones(1, 1, 1, 65538), torch.ones(1, 1, 1, 32769)
    with interpreting(), pytest.raises(BackendError, match="a head of 65538 channels is wider"):
        ops.rotary_(x, x.clone(), table, table)
