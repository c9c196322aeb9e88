"""The Triton cross entropy of a linear head against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import interpreting
from ladder_kernels.errors import BackendError, ConfigError
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.ops import _triton
from ladder_kernels.ops.linear_cross_entropy import gpu, gpu_forward, gpu_gradient, reference
from tests.ops.triton_support import interpreting_amid_poison, take_kernels

# The interpreter computes no products of bfloat16.
DTYPES = [torch.float32, torch.float16]


def plain(hidden, head, labels, softcap, logit_scale):
    """Losses [T] and logsumexps [T]; 0 at ignored tokens."""
    logits = F.linear(hidden, head) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses, logits.logsumexp(1).masked_fill(labels == -100, 0.0)


def make_labels(tokens, vocabulary, generator=None):
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    return labels


def use_small_tiles(module, patch, tokens=4096):
    """Several programs, tiles and chunks along each dimension of what tests can afford."""
    for table, tile in (("_LOGITS", (16, 32, 16, 4, 2)), ("_PRODUCT", (32, 16, 16, 4, 2))):
        tiles = {"": module._Tile(*tile)}
        patch.setattr(module, table, {False: tiles, True: tiles})
    for name, value in (("_COMBINED", 16), ("_GRADIENT", 32), ("TOKENS", tokens)):
        patch.setattr(module, name, value)
    patch.setattr(module, "VOCABULARY", 64)


def check(assert_as_accurate, module, hidden, head, labels, along, *options):
    """Everything that ``module`` computes, against float64; ``along`` is the losses' gradient."""
    nf4 = isinstance(head, NF4Weight)
    dense = head.dequantize(hidden.dtype) if nf4 else head

    def expected(to):
        leaves = [value.detach().to(to).requires_grad_() for value in (hidden, dense)]
        losses, lse = plain(*leaves, labels, *options)
        (grad,) = torch.autograd.grad(losses.sum(), leaves[0], retain_graph=True)
        (of_head,) = torch.autograd.grad((losses * along).sum(), leaves[1])
        # PyTorch's would be of the head's dtype, which may be narrower than hidden's.
        of_head = of_head if to == torch.float64 else of_head.to(dense.dtype)
        return losses.detach(), lse.detach(), grad, of_head

    actual = list(module.linear_cross_entropy(hidden, head, labels, -100, *options, True))
    without = module.linear_cross_entropy(hidden, head, labels, -100, *options, False)
    assert [t.dtype for t in actual] == [torch.float32, torch.float32, hidden.dtype]
    assert torch.equal(without[0], actual[0])
    assert torch.equal(without[1], actual[1])
    assert without[2].shape == (0, hidden.shape[1])
    for result in actual:
        assert (result[labels == -100] == 0).all()
    if not nf4:
        arguments = along, hidden, head, labels, actual[1], -100, *options
        actual.append(module.head_grad(*arguments))
    same, exact = expected(hidden.dtype), expected(torch.float64)
    for ours, theirs, true in zip(actual, same, exact, strict=False):
        assert_as_accurate(ours, theirs, true)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    head_dtype=st.sampled_from([None, *DTYPES]),
    T=st.integers(8, 40),  # a maximum over fewer numbers is luck
    V=st.integers(2, 150),
    D=st.integers(8, 40),  # the same
    softcap=st.sampled_from([None, 3.0, 30.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    first_column=st.integers(0, 3),
    tokens=st.sampled_from([16, 4096]),
    seed=st.integers(0, 2**31),
)
@example(
    dtype=torch.float32,
    head_dtype=torch.float32,
    T=20,
    V=2,
    D=1,
    softcap=30.0,
    logit_scale=0.25,
    first_column=1,
    tokens=16,
    seed=0,
)
def test_values_and_gradients(
    assert_as_accurate,
    dtype,
    head_dtype,
    T,
    V,
    D,
    softcap,
    logit_scale,
    first_column,
    tokens,
    seed,
):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, to):
        wide = torch.randn(*shape[:-1], shape[-1] + 4, generator=generator).to(to)
        return wide[..., first_column : first_column + shape[-1]]

    hidden = make(T, D, to=dtype)
    weight = make(V, D, to=head_dtype or torch.float32) * (4 / D**0.5)
    labels, along = make_labels(T, V, generator), torch.rand(T, generator=generator)
    head = quantize_nf4(weight, blocksize=32) if head_dtype is None else weight
    with interpreting_amid_poison() as patch:
        use_small_tiles(gpu, patch, tokens)
        check(assert_as_accurate, gpu, hidden, head, labels, along, softcap, logit_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_mean_through_the_operation(assert_as_accurate, dtype):
    hidden, head = torch.randn(2, 9, 24).to(dtype), torch.randn(40, 24).to(dtype)
    labels = make_labels(18, 40).view(2, 9)

    def compute(function, to):
        leaves = [value.detach().to(to).requires_grad_() for value in (hidden, head)]
        loss = function(*leaves, labels)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def mean(hidden, head, labels):
        return F.cross_entropy(F.linear(hidden, head).flatten(0, 1), labels.flatten())

    with interpreting_amid_poison():
        actual = compute(ops.linear_cross_entropy, dtype)
    for ours, same, exact in zip(
        actual, compute(mean, dtype), compute(mean, torch.float64), strict=True
    ):
        assert_as_accurate(ours, same, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_losses_and_their_gradients_keep_their_digits(dtype):
    head = torch.randn(70, 16).to(dtype)
    labels = torch.arange(0, 70, 7)
    hidden = (head[labels].float() * 2).to(dtype)
    with interpreting_amid_poison() as patch:
        use_small_tiles(gpu, patch)
        loss, _, grad = gpu.linear_cross_entropy(hidden, head, labels, -100, None, 1.0, True)
    exact = reference.linear_cross_entropy(
        hidden.double(), head.double(), labels, -100, None, 1.0, True
    )
    assert exact[0].min() < 1e-6
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-4, atol=0)
    if dtype == torch.float32:
        error = (grad.double() - exact[2]).abs().amax(1)
        assert (error <= 1e-4 * exact[2].abs().amax(1)).all()


def test_small_gradients_of_a_head_in_float16():
    """Each token's part is below what float16 holds; their sum is not."""
    hidden, head = torch.randn(64, 16).half() + 3, torch.randn(100, 16).half() * 0.01
    labels, along = torch.zeros(64).long(), torch.full((64,), 2e-5)
    with interpreting():
        _, lse, _ = gpu.linear_cross_entropy(hidden, head, labels, -100, None, 1.0, False)
        actual = gpu.head_grad(along, hidden, head, labels, lse, -100, None, 1.0)
    exact = reference.head_grad(
        along.double(), hidden.double(), head.double(), labels, lse.double(), -100, None, 1.0
    )
    torch.testing.assert_close(actual.double(), exact, rtol=5e-3, atol=0)


def test_ignored_tokens_are_never_read():
    hidden, head = torch.randn(40, 8), torch.randn(9, 8)
    labels = make_labels(40, 9)
    kept = labels != -100
    poisoned = hidden.masked_fill(~kept[:, None], torch.nan)
    along = torch.rand(40)
    with interpreting_amid_poison() as patch:
        use_small_tiles(gpu, patch)
        loss, lse, grad = gpu.linear_cross_entropy(poisoned, head, labels, -100, None, 1.0, True)
        packed = hidden[kept], head, labels[kept]
        wanted = gpu.linear_cross_entropy(*packed, -100, None, 1.0, True)
        of_head = gpu.head_grad(
            along.masked_fill(~kept, torch.inf), poisoned, head, labels, lse, -100, None, 1.0
        )
        same = gpu.head_grad(along[kept], *packed, lse[kept], -100, None, 1.0)
    for ours, theirs in zip((loss, lse, grad), wanted, strict=True):
        assert torch.equal(ours[kept], theirs)
        assert not ours[~kept].any()
    assert torch.equal(of_head, same)


def test_a_loss_without_gradient():
    head = torch.randn(9, 8, requires_grad=True)
    with interpreting():
        (0 * ops.linear_cross_entropy(torch.randn(4, 8), head, torch.arange(4))).backward()
    assert torch.equal(head.grad, torch.zeros(9, 8))


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_token_that_counts(tokens):
    hidden = torch.randn(tokens, 8, requires_grad=True)
    head = torch.randn(9, 8, requires_grad=True)
    labels = torch.full((tokens,), -100)
    with interpreting():
        assert ops.linear_cross_entropy(hidden, head, labels).isnan()
        loss = ops.linear_cross_entropy(hidden, head, labels, reduction="sum")
        loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_a_label_alone_in_the_vocabulary():
    hidden = torch.randn(3, 5, requires_grad=True)
    with interpreting():
        loss = ops.linear_cross_entropy(hidden, torch.randn(1, 5), torch.zeros(3).long())
        loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_huge_logits_do_not_overflow():
    hidden = torch.tensor([[300.0, -300.0]], requires_grad=True)
    head = torch.tensor([[-300.0, 300.0], [300.0, -300.0], [0.0, 0.0]])
    with interpreting():
        loss = ops.linear_cross_entropy(hidden, head, torch.tensor([0]))
        loss.backward()
    assert loss == 360_000
    assert torch.equal(hidden.grad, torch.tensor([[600.0, -600.0]]))


def test_nan_stays_visible():
    hidden = torch.randn(3, 4)
    hidden[1] = torch.nan
    arguments = hidden, torch.randn(5, 4), torch.zeros(3).long()
    with interpreting():
        loss, _, grad = gpu.linear_cross_entropy(*arguments, -100, None, 1.0, True)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("wrong", [-1, 5])
def test_labels_out_of_range(wrong):
    labels = torch.tensor([0, wrong, -100])
    with interpreting(), pytest.raises(ConfigError, match=f"labels holds {wrong}; allowed are 0"):
        ops.linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(monkeypatch, dtype):
    use_small_tiles(gpu, monkeypatch)
    hidden, head = torch.randn(40, 20).to(dtype), torch.randn(100, 20).to(dtype)
    labels, along = make_labels(40, 100), torch.rand(40)

    def compute():
        results = gpu.linear_cross_entropy(hidden, head, labels, -100, 5.0, 1.0, True)
        lse = results[1]
        return *results, gpu.head_grad(along, hidden, head, labels, lse, -100, 5.0, 1.0)

    with interpreting():
        first, second = compute(), compute()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_logits_are_never_whole(recorder, monkeypatch):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: None)
    use_small_tiles(gpu, monkeypatch, tokens=64)
    tokens, vocabulary, width = 512, 640, 16
    hidden, head = torch.randn(tokens, width), torch.randn(vocabulary, width)
    labels = make_labels(tokens, vocabulary)
    with recorder:
        _, lse, _ = gpu.linear_cross_entropy(hidden, head, labels, -100, 9.0, 1.0, True)
    workspace = 4 * 64 * (64 + 2 * width + 2 * 2 + 1)
    results = 4 * (5 * tokens + tokens * width)
    assert recorder.largest <= tokens * width
    assert recorder.peak <= workspace + results + 3 * 8 * tokens
    with recorder:
        gpu.head_grad(torch.ones(tokens), hidden, head, labels, lse, -100, 9.0, 1.0)
    assert recorder.largest <= max(vocabulary * width, tokens * 32)


def test_nf4_head_is_never_whole(recorder, monkeypatch):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: None)
    use_small_tiles(gpu, monkeypatch)
    head = quantize_nf4(torch.randn(2048, 64))
    hidden, labels = torch.randn(8, 64), make_labels(8, 2048)
    with recorder:
        gpu.linear_cross_entropy(hidden, head, labels, -100, None, 1.0, True)
    assert recorder.largest < 2048 * 64 / 4


def test_nothing_waits_for_the_device(monkeypatch):
    """Tensors without values: whoever asks for one fails."""
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: None)
    hidden, head, along = (torch.empty(n, 8, device="meta") for n in (40, 9, 40))
    labels = torch.empty(40, dtype=torch.int64, device="meta")
    loss, lse, grad = gpu.linear_cross_entropy(hidden, head, labels, -100, 3.0, 1.0, True)
    of_head = gpu.head_grad(along[:, 0], hidden, head, labels, lse, -100, 3.0, 1.0)
    assert [value.shape for value in (loss, grad, of_head)] == [(40,), (40, 8), (9, 8)]


@pytest.mark.parametrize(
    ("part", "right", "wrong"),
    [
        (gpu_forward, "logits *= logit_scale", "logits *= 1.0"),
        (gpu_forward, "left = along < D - start", "left = along < D"),
        (gpu_forward, "own | (entries >= rows)[None, :]", "own"),
        (gpu_forward, "own | (entries >= rows)[None, :]", "(entries >= rows)[None, :] & own"),
        (gpu_forward, "tl.store(highest + at_tile, factors, mask=inside)", "pass"),
        (gpu_forward, "tl.load(total + tokens, mask=is_token, other=0.0) * shrunk", "0.0"),
        (gpu_forward, "slope = 1.0 - capped * capped", "slope = 1.0"),
        (gpu_gradient, "(start // TILE) * block", "0"),
        (gpu_gradient, "mask=inside, other=0.0) * scale[:, None]", "mask=inside, other=0.0)"),
        (gpu_gradient, "found -= row * label_scale", "pass"),
        (gpu_gradient, "slope = 1.0 - (own / softcap) * (own / softcap)", "slope = 1.0"),
        (gpu_gradient, "tl.load(order + start + positions", "tl.load(order + positions"),
        (gpu_gradient, "shares - 1.0, shares", "shares, shares"),
        (gpu_gradient, "product *= tl.load(unit)", "pass"),
    ],
)
def test_a_wrong_kernel_is_found(assert_as_accurate, monkeypatch, broken, part, right, wrong):
    hidden, head = torch.randn(40, 20).half(), torch.randn(100, 20).half()
    arguments = hidden, head, make_labels(40, 100), torch.rand(40), 5.0, 0.5
    use_small_tiles(gpu, monkeypatch)
    take_kernels(monkeypatch, gpu, broken(part, right, wrong))
    with interpreting_amid_poison(), pytest.raises(AssertionError):
        check(assert_as_accurate, gpu, *arguments)


def test_the_right_kernel_passes_for_right(assert_as_accurate, monkeypatch):
    """On what the wrong kernels are given."""
    hidden, head = torch.randn(40, 20).half(), torch.randn(100, 20).half()
    arguments = hidden, head, make_labels(40, 100), torch.rand(40), 5.0, 0.5
    use_small_tiles(gpu, monkeypatch)
    with interpreting():
        check(assert_as_accurate, gpu, *arguments)


@pytest.mark.parametrize(
    ("hidden", "head", "message"),
    [
        (torch.bfloat16, torch.bfloat16, "miscomputes matrix products of bfloat16"),
        (torch.float32, torch.bfloat16, "miscomputes matrix products of bfloat16"),
        (torch.float32, torch.float64, "not torch.float64"),
    ],
)
def test_dtypes_that_are_refused(hidden, head, message):
    arguments = torch.ones(2, 4, dtype=hidden), torch.ones(3, 4, dtype=head), torch.zeros(2).long()
    with interpreting(), pytest.raises(BackendError, match=message):
        ops.linear_cross_entropy(*arguments)
