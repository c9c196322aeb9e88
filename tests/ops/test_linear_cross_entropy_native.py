"""The native cross entropy against float64, in every instruction set variant that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladder_kernels import native, ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops.linear_cross_entropy import cpu, reference

ISAS = native.status().isas
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(hidden, head, labels, softcap, logit_scale):
    """Losses [T] and logsumexps [T]; 0 at ignored tokens."""
    logits = F.linear(hidden, head) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses, logits.logsumexp(1).masked_fill(labels == -100, 0.0)


def check(
    assert_as_accurate, T, V, D, dtype, head_dtype=None, softcap=None, logit_scale=1.0, seed=0
):
    """An NF4 head where ``head_dtype`` is ``None``, else a dense one."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator) * (4 / D**0.5)
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < 0.3] = -100
    if head_dtype is None:
        head = quantize_nf4(weight, blocksize=32)
        dense = head.dequantize(dtype)
    else:
        head = dense = weight.to(head_dtype)

    def expected(to):
        leaf = hidden.detach().to(to).requires_grad_()
        losses, lse = plain(leaf, dense.to(to), labels, softcap, logit_scale)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), lse.detach(), grad

    actual = cpu.linear_cross_entropy(hidden, head, labels, -100, softcap, logit_scale, True)
    assert [t.dtype for t in actual] == [torch.float32, torch.float32, dtype]
    for ours, same, exact in zip(actual, expected(dtype), expected(torch.float64), strict=True):
        assert_as_accurate(ours, same, exact)
    without = cpu.linear_cross_entropy(hidden, head, labels, -100, softcap, logit_scale, False)
    assert torch.equal(without[0], actual[0])
    assert torch.equal(without[1], actual[1])
    assert without[2].shape == (0, D)
    ignored = labels == -100
    for result in actual:
        assert (result[ignored] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    head_dtype=st.sampled_from([None, *DTYPES]),
    T=st.integers(8, 60),  # a maximum over fewer numbers is luck
    V=st.integers(2, 900),
    D=st.integers(1, 100),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradient(
    assert_as_accurate, use_isa, isa, dtype, head_dtype, T, V, D, softcap, logit_scale, seed
):
    use_isa(isa)
    check(assert_as_accurate, T, V, D, dtype, head_dtype, softcap, logit_scale, seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("T", "V", "D"), [(1700, 400, 33), (30, 500, 1300), (9, 3000, 64)])
def test_more_than_one_block(assert_as_accurate, use_isa, isa, dtype, head_dtype, T, V, D):
    use_isa(isa)
    check(assert_as_accurate, T, V, D, dtype, head_dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(use_isa, isa, dtype):
    use_isa(isa)
    hidden, head = torch.randn(700, 96).to(dtype), quantize_nf4(torch.randn(800, 96))
    labels = torch.randint(800, (700,))
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(cpu.linear_cross_entropy(hidden, head, labels, -100, 5.0, 1.0, True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_large_logits(use_isa, isa):
    """What would overflow without the running maximum, in both directions."""
    use_isa(isa)
    head = torch.randn(1000, 16)
    hidden = torch.randn(40, 16) * 1000
    labels = torch.randint(1000, (40,))
    loss, lse, grad = cpu.linear_cross_entropy(hidden, head, labels, -100, None, 1.0, True)
    leaf = hidden.double().requires_grad_()
    exact, exact_lse = plain(leaf, head.double(), labels, None, 1.0)
    exact.sum().backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_labels_that_are_almost_certain(use_isa, isa, softcap):
    """Losses down to 1e-12 keep their digits, and so do their gradients."""
    function = reference.linear_cross_entropy
    if isa != "reference":
        use_isa(isa)
        function = cpu.linear_cross_entropy
    head = torch.eye(40)
    hidden = 0.1 * torch.randn(20, 40)
    labels = torch.arange(20)
    hidden[labels, labels] = torch.linspace(5, 27, 20)
    loss, _, grad = function(hidden, head, labels, -100, softcap, 1.0, True)
    leaf = hidden.double().requires_grad_()
    exact, _ = plain(leaf, head.double(), labels, softcap, 1.0)
    exact.sum().backward()
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=2e-5, atol=0)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=2e-5, atol=0)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
def test_a_vocabulary_of_one(use_isa, isa):
    function = reference.linear_cross_entropy
    if isa != "reference":
        use_isa(isa)
        function = cpu.linear_cross_entropy
    hidden, head = torch.randn(3, 4), torch.randn(1, 4)
    labels = torch.zeros(3, dtype=torch.int64)
    loss, lse, grad = function(hidden, head, labels, -100, None, 1.0, True)
    assert torch.equal(loss, torch.zeros(3))
    torch.testing.assert_close(lse, (hidden @ head.t()).squeeze(1))
    assert torch.equal(grad, torch.zeros(3, 4))


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_row(use_isa, isa):
    use_isa(isa)
    head, hidden = torch.randn(500, 16), torch.randn(40, 16)
    hidden[3, 2] = torch.nan
    loss, lse, grad = cpu.linear_cross_entropy(
        hidden, head, torch.arange(40), -100, None, 1.0, True
    )
    for result in (loss, lse, grad.sum(1)):
        assert result.isnan().nonzero().flatten().tolist() == [3]


def test_logits_are_never_whole(recorder):
    hidden, head = torch.randn(600, 64), quantize_nf4(torch.randn(5000, 64))
    with recorder:
        cpu.linear_cross_entropy(hidden, head, torch.zeros(600).long(), -100, None, 1.0, True)
    assert recorder.peak < 2.5 * hidden.nbytes


def test_strided_inputs():
    wide, head = torch.randn(20, 100), torch.randn(80, 200)
    labels = torch.randint(80, (40,))[::2]
    wanted = cpu.linear_cross_entropy(
        wide[:, 3:67].contiguous(), head[:, 9:73].contiguous(), labels, -100, None, 1.0, True
    )
    got = cpu.linear_cross_entropy(wide[:, 3:67], head[:, 9:73], labels, -100, None, 1.0, True)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_the_operation_uses_it():
    hidden = torch.randn(30, 64, requires_grad=True)
    head, labels = quantize_nf4(torch.randn(200, 64)), torch.randint(200, (30,))
    loss = ops.linear_cross_entropy(hidden, head, labels, reduction="none")
    expected = cpu.linear_cross_entropy(hidden.detach(), head, labels, -100, None, 1.0, True)
    assert torch.equal(loss, expected[0])
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    assert torch.equal(grad, expected[2])


def test_a_label_that_is_no_row_of_the_head():
    with pytest.raises(ConfigError, match="labels holds 9; allowed are 0 to 8"):
        ops.linear_cross_entropy(torch.randn(2, 4), torch.randn(9, 4), torch.tensor([0, 9]))
