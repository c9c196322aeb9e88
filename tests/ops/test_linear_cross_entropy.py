from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ladder_kernels import ops
from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops.linear_cross_entropy import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("reference_backend")


def plain(hidden, head, labels, ignore_index=-100, reduction="mean", softcap=None, logit_scale=1.0):
    logits = F.linear(hidden, head) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=ignore_index,
        reduction=reduction,
    )


def make_labels(shape, vocabulary, generator=None, ignored=0.3, ignore_index=-100):
    labels = torch.randint(vocabulary, shape, generator=generator)
    dropped = torch.rand(shape, generator=generator) < ignored
    return labels.masked_fill(dropped, ignore_index)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(8, 40),  # a maximum over fewer numbers is luck
    width=st.integers(1, 40),
    vocabulary=st.integers(2, 90),
    softcap=st.sampled_from([None, 3.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    block=st.sampled_from([5, 16, 1024]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(
    assert_as_accurate, dtype, tokens, width, vocabulary, softcap, logit_scale, block, seed
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    head = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = make_labels((tokens,), vocabulary, generator)
    # A sum: the mean's 1/T would round once more in every dtype, and it is tested below.
    options = {"reduction": "sum", "softcap": softcap, "logit_scale": logit_scale}

    def compute(function, to):
        leaves = [t.detach().to(to).requires_grad_() for t in (hidden, head)]
        loss = function(*leaves, labels, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "TOKENS", block)
        patch.setattr(reference, "VOCABULARY", block)
        actual = compute(ops.linear_cross_entropy, dtype)
    same, exact = compute(plain, dtype), compute(plain, torch.float64)
    assert actual[0].dtype == torch.float32
    assert [t.dtype for t in actual[1:]] == [dtype, dtype]
    for ours, theirs, true in zip(actual, same, exact, strict=True):
        assert_as_accurate(ours, theirs, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions(assert_as_accurate, dtype, reduction):
    hidden, head = torch.randn(4, 30, 32).to(dtype), torch.randn(64, 32).to(dtype)
    labels = make_labels((4, 30), 64)

    def compute(function, to):
        leaf = hidden.detach().to(to).requires_grad_()
        loss = function(leaf, head.to(to), labels, reduction=reduction)
        (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 1.5))
        return loss.detach(), grad

    actual = compute(ops.linear_cross_entropy, dtype)
    same, exact = compute(plain, dtype), compute(plain, torch.float64)
    assert actual[0].shape == ((4, 30) if reduction == "none" else ())
    assert_as_accurate(actual[0].flatten(), same[0].flatten(), exact[0].flatten())
    assert_as_accurate(actual[1], same[1], exact[1])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(softcap, reduction):
    hidden = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, -100, 6], [0, 3, -100]])
    options = {"reduction": reduction, "softcap": softcap, "logit_scale": 0.7}
    assert gradcheck(lambda h, w: ops.linear_cross_entropy(h, w, labels, **options), (hidden, head))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_head_counts_as_dequantised_to_the_dtype(dtype, double_quant, monkeypatch):
    monkeypatch.setattr(reference, "VOCABULARY", 33)
    head = quantize_nf4(torch.randn(100, 48), blocksize=32, double_quant=double_quant)
    labels = make_labels((11,), 100)
    results = []
    for weight in (head, head.dequantize(dtype)):
        hidden = torch.linspace(-1, 1, 11 * 48).view(11, 48).to(dtype).requires_grad_()
        loss = ops.linear_cross_entropy(hidden, weight, labels, softcap=5.0)
        loss.backward()
        results.append((loss, hidden.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_nf4_gradcheck():
    head = quantize_nf4(torch.randn(7, 6), blocksize=32)
    hidden = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 6])
    assert gradcheck(lambda h: ops.linear_cross_entropy(h, head, labels, softcap=3.0), (hidden,))


def test_head_of_another_dtype():
    hidden, head = torch.randn(5, 8).bfloat16(), torch.randn(9, 8)
    labels = torch.arange(5)
    loss = ops.linear_cross_entropy(hidden, head, labels)
    torch.testing.assert_close(loss, plain(hidden.float(), head, labels))


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_token_that_counts(tokens):
    hidden = torch.randn(tokens, 8, requires_grad=True)
    head = torch.randn(9, 8, requires_grad=True)
    labels = torch.full((tokens,), -100)
    assert ops.linear_cross_entropy(hidden, head, labels).isnan()
    loss = ops.linear_cross_entropy(hidden, head, labels, reduction="sum")
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not head.grad.any()
    none = ops.linear_cross_entropy(hidden, head, labels, reduction="none")
    assert torch.equal(none, torch.zeros(tokens))


def test_ignored_tokens_are_dropped_before_anything():
    hidden, head = torch.randn(6, 8), torch.randn(9, 8)
    labels = torch.tensor([1, 2, -7, 3, -7, 4])
    poisoned = hidden.clone()
    poisoned[labels == -7] = torch.nan
    kept = labels != -7
    poisoned.requires_grad_()
    loss = ops.linear_cross_entropy(poisoned, head, labels, ignore_index=-7)
    loss.backward()
    assert torch.equal(loss, ops.linear_cross_entropy(hidden[kept], head, labels[kept]))
    assert not poisoned.grad[~kept].any()
    assert poisoned.grad.isfinite().all()


def test_ignore_index_inside_the_vocabulary():
    hidden, head = torch.randn(6, 8), torch.randn(9, 8)
    labels = torch.tensor([1, 0, 2, 0, 3, 4])
    loss = ops.linear_cross_entropy(hidden, head, labels, ignore_index=0)
    torch.testing.assert_close(loss, plain(hidden, head, labels, ignore_index=0))


def test_huge_logits_do_not_overflow():
    hidden = torch.tensor([[300.0, -300.0]], requires_grad=True)
    head = torch.tensor([[-300.0, 300.0], [300.0, -300.0], [0.0, 0.0]])
    loss = ops.linear_cross_entropy(hidden, head, torch.tensor([0]))
    loss.backward()
    assert loss == 360_000
    assert torch.equal(hidden.grad, torch.tensor([[600.0, -600.0]]))


def test_nan_stays_visible():
    hidden = torch.randn(3, 4)
    hidden[1] = torch.nan
    loss = ops.linear_cross_entropy(hidden, torch.randn(5, 4), torch.zeros(3).long())
    assert loss.isnan()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_label_dtypes(dtype):
    hidden, head, labels = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 8, 3, 1])
    loss = ops.linear_cross_entropy(hidden, head, labels.to(dtype))
    assert torch.equal(loss, ops.linear_cross_entropy(hidden, head, labels))


def test_non_contiguous_inputs():
    hidden, head = torch.randn(8, 3, 4).transpose(0, 2), torch.randn(8, 9).t()
    labels = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]).repeat(1, 2)[:, :3]
    loss = ops.linear_cross_entropy(hidden, head, labels)
    assert torch.equal(
        loss, ops.linear_cross_entropy(hidden.contiguous(), head.contiguous(), labels.contiguous())
    )


def test_the_same_bits_every_time():
    hidden, head = torch.randn(300, 32).bfloat16(), torch.randn(3000, 32).bfloat16()
    labels = make_labels((300,), 3000)

    def compute():
        leaf = hidden.clone().requires_grad_()
        weight = head.clone().requires_grad_()
        loss = ops.linear_cross_entropy(leaf, weight, labels)
        loss.backward()
        return loss, leaf.grad, weight.grad

    first, second = compute(), compute()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("need_grad", [True, False])
def test_logits_are_never_whole(recorder, monkeypatch, need_grad):
    monkeypatch.setattr(reference, "TOKENS", 64)
    monkeypatch.setattr(reference, "VOCABULARY", 64)
    tokens, vocabulary, width = 512, 640, 16
    hidden, head = torch.randn(tokens, width), torch.randn(vocabulary, width)
    labels = make_labels((tokens,), vocabulary)
    with recorder:
        _, lse, _ = reference.linear_cross_entropy(hidden, head, labels, -100, 9.0, 1.0, need_grad)
    workspace = 4 * (3 * 64 * 64 + 5 * 64 * width + 2 * 64 * width)
    results = 4 * (2 * tokens + need_grad * tokens * width)
    of_tokens = 3 * 8 * tokens  # labels, indices and masks of the tokens that count
    assert recorder.largest <= max(tokens * width, 64 * 64)
    assert recorder.peak <= workspace + results + of_tokens
    with recorder:
        reference.head_grad(torch.ones(tokens), hidden, head, labels, lse, -100, 9.0, 1.0)
    assert recorder.largest <= max(vocabulary * width, 64 * 64)


def test_nf4_head_is_never_whole(recorder, monkeypatch):
    monkeypatch.setattr(reference, "VOCABULARY", 64)
    head = quantize_nf4(torch.randn(2048, 64))
    hidden, labels = torch.randn(8, 64), make_labels((8,), 2048)
    with recorder:
        reference.linear_cross_entropy(hidden, head, labels, -100, None, 1.0, True)
    assert recorder.largest < 2048 * 64 / 4


def test_autocast_casts_hidden_and_leaves_float32_inside():
    hidden, head, labels = torch.randn(6, 8), torch.randn(9, 8), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, head, labels)
    assert torch.equal(loss, ops.linear_cross_entropy(hidden.bfloat16(), head, labels))


def test_second_derivative_is_refused():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = ops.linear_cross_entropy(hidden, torch.randn(5, 4), torch.zeros(3).long())
    with pytest.raises(ConfigError, match="create_graph is True; only False is allowed"):
        torch.autograd.grad(loss, hidden, create_graph=True)


HIDDEN, HEAD, LABELS = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((HIDDEN, HEAD, LABELS, -100, "average"), "reduction is 'average'; allowed are"),
        ((HIDDEN, HEAD, LABELS, -100, "mean", 0.0), "softcap is 0.0; it must be above 0, or None"),
        ((HIDDEN, HEAD, LABELS, -100, "mean", -1.0), "softcap is -1.0"),
        ((HIDDEN, HEAD, LABELS, -100, "mean", math.nan), "softcap is nan"),
        ((HIDDEN, HEAD.T, LABELS), r"head has shape \[4, 5\]; it must be \['V', 4\]"),
        ((HIDDEN, HEAD[0], LABELS), r"head has shape \[4\]"),
        ((HIDDEN, HEAD.int(), LABELS), "head has dtype torch.int32"),
        ((HIDDEN, HEAD.to("meta"), LABELS), "head is on device meta"),
        ((HIDDEN, HEAD, LABELS[:2]), r"labels has shape \[2\]; it must be \[3\]"),
        ((HIDDEN, HEAD, LABELS.float()), "labels has dtype torch.float32; it must be integers"),
        ((HIDDEN, HEAD, [0, 0, 0]), "labels is a list"),
        ((HIDDEN, HEAD, LABELS + 5), "labels holds 5; allowed are 0 to 4 and ignore_index"),
        ((HIDDEN, HEAD, LABELS - 1), "labels holds -1; allowed are 0 to 4 and ignore_index"),
        ((HIDDEN.int(), HEAD, LABELS), "hidden has dtype torch.int32"),
        ((torch.tensor(1.0), HEAD, LABELS), "hidden has no dimension"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ops.linear_cross_entropy(*arguments)
