"""The Triton MLP of a side block against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ladder_kernels import ops
from ladder_kernels.audit import interpreting
from ladder_kernels.audit.targets import TARGETS
from ladder_kernels.errors import BackendError
from ladder_kernels.launch import on_host
from ladder_kernels.ops import _triton
from ladder_kernels.ops.side_mlp import gpu, reference
from tests.ops.triton_support import interpreting_amid_poison

# The interpreter computes no products of bfloat16.
DTYPES = [torch.float32, torch.float16]
EPS = 1e-6
ALL = (True, True, True)


def plain(u, norm_weight, gate, up, down):
    """The formula, written down in the dtype of the side stream."""
    x = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + EPS) * norm_weight
    return u + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def use_small_tiles(module, patch):
    """Several programs along each dimension of what tests can afford."""
    small = module._Tile(16, 16, 4, 2)
    for table in ("_FORWARD", "_ROWS", "_MATRICES"):
        patch.setattr(module, table, {key: {"": {256: small}} for key in (False, True)})
    patch.setattr(module, "_PROGRAMS", 8)


def check(assert_as_accurate, module, grad, inputs):
    """Everything that ``module`` computes, against float64."""

    def expected(to):
        leaves = [value.detach().to(to).requires_grad_() for value in inputs]
        out = plain(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    actual = [
        module.side_mlp(*inputs, EPS),
        *module.side_mlp_backward(grad, *inputs, EPS, *ALL),
    ]
    same, exact = expected(grad.dtype), expected(torch.float64)
    for ours, theirs, true in zip(actual, same, exact, strict=True):
        assert ours.dtype == grad.dtype
        assert_as_accurate(ours, theirs, true)


def make_inputs(leading, width, inner, dtype=torch.float32, generator=None, first_column=0):
    shapes = ((*leading, width), (width,), (inner, width), (inner, width), (width, inner))
    made = []
    for shape in shapes:
        wide = torch.randn(*shape[:-1], shape[-1] + 4, generator=generator).to(dtype)
        made.append(wide[..., first_column : first_column + shape[-1]])
    for matrix in made[2:]:
        matrix /= max(1, matrix.shape[1]) ** 0.5
    return made


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    leading=st.lists(st.integers(0, 9), min_size=0, max_size=2),
    width=st.integers(8, 70),  # of one number nothing but rounding is left in the gradient
    inner=st.integers(1, 50),
    first_column=st.integers(0, 3),
    programs=st.sampled_from([1, 8, 128]),
    seed=st.integers(0, 2**31),
)
def test_shapes(assert_as_accurate, leading, width, inner, first_column, programs, seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = leading, width, inner, torch.float32, generator, first_column
    inputs, (grad, *_) = make_inputs(*arguments), make_inputs(*arguments)
    with interpreting_amid_poison() as patch:
        use_small_tiles(gpu, patch)
        patch.setattr(gpu, "_PROGRAMS", programs)
        check(assert_as_accurate, gpu, grad, inputs)


# Enough numbers for the largest error of float16 not to be a matter of luck.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [36, 72, 144, 224])
def test_tiles_as_shipped(assert_as_accurate, dtype, width):
    inputs = make_inputs((70,), width, 100, dtype)
    with interpreting_amid_poison():
        check(assert_as_accurate, gpu, inputs[0].flip(0), inputs)


def test_gradients_through_the_operation():
    inputs = make_inputs((2, 5), 12, 20)

    def compute():
        leaves = [value.detach().requires_grad_() for value in inputs]
        out = ops.side_mlp(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    with interpreting():
        actual = compute()
    for ours, theirs in zip(actual, compute(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (True, True, False)])
def test_only_the_gradients_asked_for(needs):
    inputs = make_inputs((20,), 12, 20)
    launched = []
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        everything = gpu.side_mlp_backward(inputs[0], *inputs, EPS, *ALL)
        launch = _triton.launch
        patch.setattr(
            _triton, "launch", lambda *a, **o: (launched.append(a[0].__name__), launch(*a, **o))
        )
        found = gpu.side_mlp_backward(inputs[0], *inputs, EPS, *needs)
    assert launched == ["_side_mlp_rows_kernel"]
    for value, whole, needed in zip(found, everything, (*needs, False, False), strict=True):
        assert torch.equal(value, whole) if needed else value.numel() == 0


@pytest.mark.parametrize(("tokens", "width", "inner"), [(0, 8, 4), (3, 0, 4), (3, 8, 0)])
def test_nothing_to_do(tokens, width, inner):
    inputs = make_inputs((tokens,), width, inner)
    with interpreting():
        out = gpu.side_mlp(*inputs, EPS)
        actual = gpu.side_mlp_backward(inputs[0], *inputs, EPS, *ALL)
    assert torch.equal(out, inputs[0])
    wanted = reference.side_mlp_backward(inputs[0], *inputs, EPS, *ALL)
    for ours, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(monkeypatch, dtype):
    use_small_tiles(gpu, monkeypatch)
    inputs = make_inputs((50,), 20, 40, dtype)

    def compute():
        out = gpu.side_mlp(*inputs, EPS)
        return out, *gpu.side_mlp_backward(out, *inputs, EPS, *ALL)

    with interpreting():
        first, second = compute(), compute()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_as_wide_as_the_inside(recorder, monkeypatch):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: None)
    tokens, width, inner = 2048, 64, 512
    inputs = make_inputs((tokens,), width, inner)
    inputs = [value.contiguous() for value in inputs]
    with recorder:
        gpu.side_mlp(*inputs, EPS)
    assert recorder.peak == 4 * tokens * width
    recorder.peak = 0
    with recorder:
        gpu.side_mlp_backward(inputs[0], *inputs, EPS, *ALL)
    tiles = gpu._ROWS[True][""][256], gpu._MATRICES[True][""][256]
    splits = gpu._PROGRAMS // (inner // tiles[1].inner)
    allowed = 2 * tokens * width + tokens // tiles[0].tokens * width  # du, rows, their sums
    allowed += 3 * (splits + 1) * inner * width + 2 * width
    assert recorder.peak <= 4 * allowed
    assert recorder.largest < tokens * inner


BROKEN = [
    ("/ D + eps", "/ WIDTH + eps"),
    ("x = (stream * scale[:, None] * weight[None, :])", "x = (stream * scale[:, None])"),
    ("left = along < m - start", "left = along < m"),
    ("(a * tl.sigmoid(a) * b)", "(a * tl.sigmoid(b) * b)"),
    ("total += tl.load(u + at", "total -= tl.load(u + at"),
    ("(1.0 + a * (1.0 - s))", "(1.0 - a * (1.0 - s))"),
    ("dx = tl.dot(db, of_up, dx", "dx = tl.dot(db, of_gate, dx"),
    ("shared = tl.sum(dx * stream, 1) / D", "shared = tl.sum(dx, 1) / D"),
    ("tokens = split * share", "tokens = split * TOKENS"),
    ("(tokens < T - start)", "(tokens < T)"),
    ("at_partial += 3 * size", "at_partial += 2 * size"),
    ("tl.trans(of_down).to(dtype)", "tl.trans(of_up).to(dtype)"),
]


@pytest.mark.parametrize(("right", "wrong"), BROKEN)
def test_a_wrong_kernel_is_found(assert_as_accurate, monkeypatch, broken, right, wrong):
    wrong_gpu = broken(gpu, right, wrong)
    use_small_tiles(wrong_gpu, monkeypatch)
    with interpreting_amid_poison(), pytest.raises(AssertionError):
        check(assert_as_accurate, wrong_gpu, *for_wrong_kernels())


def test_the_right_kernel_passes_for_right(assert_as_accurate, monkeypatch):
    use_small_tiles(gpu, monkeypatch)
    with interpreting():
        check(assert_as_accurate, gpu, *for_wrong_kernels())


def for_wrong_kernels():
    inputs = make_inputs((72,), 24, 40, torch.float16)
    return inputs[0].flip(0), inputs


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (torch.bfloat16, 8, "miscomputes matrix products of bfloat16"),
        (torch.float64, 8, "not torch.float64"),
        (torch.float32, 257, "a side stream of 257 channels is wider than the 256 that a program"),
    ],
)
def test_what_is_refused(dtype, width, message):
    inputs = make_inputs((2,), width, 6, dtype)
    with interpreting(), pytest.raises(BackendError, match=message):
        ops.side_mlp(*inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_all_kernels_take_streams_of_the_same_widths(target, dtype):
    u = torch.empty(0, 1, dtype=dtype)
    with on_host("interpreter", target):
        widest = {max(gpu._tiles(each, u)) for each in (gpu._FORWARD, gpu._ROWS, gpu._MATRICES)}
    assert len(widest) == 1


def test_narrower_on_rdna():
    with (
        interpreting(),
        on_host("interpreter", "gfx1100"),
        pytest.raises(BackendError, match="of 72 channels is wider than the 32 that a program hol"),
    ):
        ops.side_mlp(*make_inputs((2,), 72, 6))


def test_a_gpu_without_tensor_cores_for_triton_is_refused():
    with (
        interpreting(),
        on_host("interpreter", "sm_75"),
        pytest.raises(BackendError, match="without tensor cores on sm_75"),
    ):
        ops.side_mlp(*make_inputs((2,), 8, 6))
