from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ladder_kernels as lk
from ladder_kernels import backend, native, ops
from ladder_kernels.errors import BackendError, BackendFallbackWarning, ConfigError
from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.ops._dispatch import has_gpu_kernel


@pytest.fixture(autouse=True)
def _as_at_the_start() -> Iterator[None]:
    backend.warn_once.cache_clear()
    yield
    ops.set_backend("auto")
    backend.warn_once.cache_clear()


def test_default_and_process_wide_choice():
    assert ops.get_backend() == "auto"
    for name in ops.BACKENDS:
        ops.set_backend(name)
        assert ops.get_backend() == name


def test_blocks_nest_and_end():
    with ops.use_backend("reference"):
        with ops.use_backend("cpu"):
            assert ops.get_backend() == "cpu"
            ops.set_backend("triton")  # the default below; blocks stay in force
            assert ops.get_backend() == "cpu"
        assert ops.get_backend() == "reference"
    assert ops.get_backend() == "triton"


def test_block_ends_with_an_exception():
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert ops.get_backend() == "auto"


def test_decorator():
    @ops.use_backend("reference")
    def inside():
        return ops.get_backend()

    assert [inside(), ops.get_backend(), inside()] == ["reference", "auto", "reference"]


@pytest.mark.parametrize(
    "choose", [ops.set_backend, lambda name: ops.use_backend(name).__enter__()]
)
@pytest.mark.parametrize("name", ["cuda", "", "Auto", None])
def test_unknown_name(choose, name):
    with pytest.raises(
        ConfigError, match=f"backend {name!r} is not known; allowed are 'auto', 'triton', 'cpu', "
    ):
        choose(name)
    assert ops.get_backend() == "auto"


def test_public_names_are_the_same_functions():
    assert lk.use_backend is ops.use_backend
    with lk.use_backend("reference"):
        assert lk.get_backend() == "reference"


def test_a_block_holds_for_its_own_thread():
    seen = []
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        seen.append(ops.get_backend())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with ops.use_backend("reference"):
        inside.set()
        assert done.wait(10)
    thread.join()
    assert seen == ["auto"]


def test_a_block_holds_for_its_own_task():
    async def choose(name: str) -> list[str]:
        with ops.use_backend(name):
            seen = []
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(ops.get_backend())
        return seen

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(choose("cpu"), choose("reference")))

    assert asyncio.run(both()) == [["cpu"] * 3, ["reference"] * 3]


def test_triton_needs_a_gpu():
    with (
        ops.use_backend("triton"),
        pytest.raises(
            BackendError,
            match=r"rms_norm: backend 'triton' needs tensors on device type 'cuda', found 'cpu'",
        ),
    ):
        ops.rms_norm(torch.ones(2, 3), None, 1e-6)


def test_whether_a_gpu_kernel_would_run():
    x = torch.ones(2, 8)
    assert not has_gpu_kernel("side_mlp", "side_mlp", x)
    for name in ("reference", "cpu"):
        with ops.use_backend(name):
            assert not has_gpu_kernel("side_mlp", "side_mlp", x)
    message = r"side_mlp: backend 'triton' needs tensors on device type 'cuda', found 'cpu'"
    with ops.use_backend("triton"), pytest.raises(BackendError, match=message):
        has_gpu_kernel("side_mlp", "side_mlp", x)


def test_fake_tensors_have_gpu_kernels_by_their_device():
    with FakeTensorMode():
        x = torch.empty(2, 8, device="cuda")
        assert has_gpu_kernel("side_mlp", "side_mlp", x)
        assert not has_gpu_kernel("side_mlp", "side_mlp", x, by_name_only=True)
        assert not has_gpu_kernel("side_mlp", "side_mlp", torch.empty(2, 8))


def test_a_compiler_can_ask_for_a_gpu_kernel():
    @torch.compile(backend="eager", fullgraph=True)
    def asked(x):
        return x + 1 if has_gpu_kernel("side_mlp", "side_mlp", x) else x

    assert torch.equal(asked(torch.zeros(2)), torch.zeros(2))


def test_cpu_accepts_operations_that_have_no_native_kernel():
    x = torch.randn(2, 3)
    with ops.use_backend("cpu"):
        y = ops.rms_norm(x, None, 1e-6)
    assert torch.equal(y, ops.rms_norm(x, None, 1e-6))


@pytest.fixture
def _no_native_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "MODULE", "ladder_kernels.native._no_such_library")
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def quantized(rows: int, columns: int) -> NF4Weight:
    """On the reference: quantising, too, would say that the native library is missing."""
    with ops.use_backend("reference"):
        return quantize_nf4(torch.randn(rows, columns))


@pytest.mark.usefixtures("_no_native_library")
def test_falling_back_is_said_once():
    x, weight = torch.randn(2, 32), quantized(8, 32)
    with pytest.warns(
        BackendFallbackWarning,
        match="operations run on plain PyTorch instead of their 'cpu' kernels: the native library "
        "is not installed",
    ):
        first = ops.nf4_linear(x, weight)
    with ops.use_backend("reference"):
        assert torch.equal(ops.nf4_linear(x, weight), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.nf4_linear(x, weight), first)
        ops.nf4_linear_transposed(torch.randn(2, 8), weight)


@pytest.mark.usefixtures("_no_native_library")
def test_a_forced_backend_says_that_the_library_is_missing():
    weight = quantized(8, 32)
    with (
        ops.use_backend("cpu"),
        pytest.raises(
            BackendError, match="nf4_linear: backend 'cpu' cannot run this call: the native library"
        ),
    ):
        ops.nf4_linear(torch.randn(2, 32), weight)


def test_float64_is_the_references_own():
    x, weight = torch.randn(2, 32, dtype=torch.float64), quantized(8, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = ops.nf4_linear(x, weight)
    torch.testing.assert_close(out, x @ weight.dequantize(torch.float64).t())


def test_a_forced_backend_does_not_fall_back():
    x, weight = torch.randn(2, 32, dtype=torch.float64), quantized(8, 32)
    with (
        ops.use_backend("cpu"),
        pytest.raises(BackendError, match="nf4_linear: backend 'cpu' cannot run this call: "),
    ):
        ops.nf4_linear(x, weight)


@pytest.mark.usefixtures("_no_native_library")
def test_reference_says_nothing():
    x, weight = torch.randn(2, 32), quantized(8, 32)
    with ops.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.nf4_linear(x, weight)


@pytest.mark.usefixtures("_no_native_library")
def test_backward_runs_where_the_forward_did():
    weight = quantized(8, 32)
    x = torch.randn(2, 32, requires_grad=True)
    with ops.use_backend("reference"):
        loss = ops.nf4_linear(x, weight).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.backward()  # "auto" is in force here, and would say that it falls back
    assert x.grad is not None


def test_native_and_reference_agree_through_the_operation():
    weight, other = quantized(48, 128), quantized(48, 128)
    results = []
    for name in ("cpu", "reference"):
        x = torch.linspace(-1, 1, 5 * 128).view(5, 128).requires_grad_()
        with ops.use_backend(name):
            out = ops.nf4_linear(x, weight) + ops.nf4_swiglu(x, weight, other)
            out.square().sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_inference_passes_the_dispatcher_by_unless_somebody_watches():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def profiled():
        with torch.profiler.profile() as profiler:
            result = ops.rms_norm(x, None, 1e-6)
        return result, {event.key for event in profiler.key_averages()}

    x = torch.randn(3, 8)
    expected, events = profiled()
    assert "ladder_kernels::rms_norm" in events
    with torch.inference_mode():
        result, events = profiled()
        assert "ladder_kernels::rms_norm" not in events
        assert torch.equal(result, expected)
        with Watch():
            assert torch.equal(ops.rms_norm(x, None, 1e-6), expected)
    assert "ladder_kernels.rms_norm.default" in seen
