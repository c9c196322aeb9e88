"""Deliberate breakage of our own kernels as compiled: what the executor does not let pass.

A barrier, a wait for a copy, or a mask is taken out of a kernel, and the call is executed again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ladder_kernels.audit import executing
from ladder_kernels.audit.ptx import Kernel, MemoryAccessError, PTXError
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops.linear_cross_entropy import gpu as loss
from ladder_kernels.ops.linear_cross_entropy import gpu_forward, gpu_gradient
from ladder_kernels.ops.nf4_linear import gpu as linear
from ladder_kernels.ops.nf4_linear.configurations import Configuration, using
from ladder_kernels.ops.rms_norm import gpu as norm
from ladder_kernels.ops.rung_merge import gpu as rung
from tests.ops.triton_support import take_kernels

BF16 = torch.bfloat16
PIPELINED = Configuration("fused", 32, 32, 32, num_warps=4, num_stages=3)
# One warp after the other between barriers; together they find what the order of warps can change.
ORDERS = ({"lockstep": False}, {"lockstep": False, "reverse": True})


@dataclass
class Call:
    """A launcher's result, and what it is in float64."""

    run: Callable[[], Tensor]
    exact: Tensor

    def survives(self, kernel: str, change: Callable[[str], str], **order: bool) -> bool:
        """Whether the result is right though the PTX of a kernel was changed."""
        try:
            with changed(kernel, change), executing(86, **order):
                found = self.run()
        except PTXError:
            return False
        return bool((found - self.exact).abs().max() <= 0.02 * self.exact.abs().max())


def product(*, transposed: bool) -> Call:
    weight = quantize_nf4(torch.randn(70, 192) / 14)
    dense = weight.dequantize(torch.float64)
    x = torch.randn(40, 70 if transposed else 192).to(BF16)
    function = linear.nf4_linear_transposed if transposed else linear.nf4_linear

    def run() -> Tensor:
        with using(PIPELINED):
            return function(x, weight).double()

    return Call(run, x.double() @ (dense if transposed else dense.t()))


def cross_entropy() -> Call:
    hidden, head = torch.randn(40, 80).to(BF16), (torch.randn(136, 80) / 9).to(BF16)
    labels = torch.randint(136, (40,))
    wide = hidden.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(wide @ head.double().t(), labels, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), wide)

    def run() -> Tensor:
        found = loss.linear_cross_entropy(hidden, head, labels, -100, None, 1.0, True)
        return torch.cat((found[0].double()[:, None], found[2].double()), 1)

    return Call(run, torch.cat((losses.detach()[:, None], grad), 1))


PIPELINES = {
    "_nf4_linear_forward_kernel": lambda: product(transposed=False),
    "_nf4_linear_transposed_kernel": lambda: product(transposed=True),
    "_linear_cross_entropy_logits_kernel": cross_entropy,
    "_linear_cross_entropy_expected_kernel": cross_entropy,
}
pipelines = pytest.mark.parametrize("kernel", PIPELINES)


@contextmanager
def changed(kernel: str, change: Callable[[str], str]) -> Iterator[None]:
    """Within it, the executor runs changed PTX of one kernel."""
    parse = Kernel.parse

    def parse_changed(ptx: str, name: str | None = None) -> Kernel:
        return parse(change(ptx) if name == kernel else ptx, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "parse", parse_changed)
        yield


def compiled(call: Call, kernel: str, *orders: dict[str, bool]) -> str:
    """The PTX of a kernel, which gives the right result in lockstep and in further orders."""
    seen = []

    def keep(ptx: str) -> str:
        seen.append(ptx)
        return ptx

    assert all(call.survives(kernel, keep, **order) for order in ({}, *orders))
    return seen[0]


def within_loops(ptx: str, pattern: str) -> list[re.Match[str]]:
    """Where a pattern is in code that is jumped back over."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE)}
    jumps = re.finditer(r"bra(?:\.uni)?\s+(\$L\w+);", ptx)
    loops = [(labels[jump[1]], jump.start()) for jump in jumps]
    return [
        found
        for found in re.finditer(pattern, ptx)
        if any(start < found.start() < end for start, end in loops)
    ]


def without(*found: re.Match[str]) -> Callable[[str], str]:
    """A change that takes out matches of the same text."""

    def change(ptx: str) -> str:
        for each in reversed(found):
            ptx = ptx[: each.start()] + ptx[each.end() :]
        return ptx

    return change


@pipelines
def test_each_barrier_of_a_pipelined_loop_is_needed_in_both_orders_of_warps(kernel):
    """Each removed alone. In step, warps cannot overtake each other and none is missed.

    Every loop has two: one before a tile is read that all warps copied, one around the part that
    warps exchange. None is redundant.
    """
    call = PIPELINES[kernel]()
    ptx = compiled(call, kernel, *ORDERS)
    barriers = within_loops(ptx, r"bar\.sync\s+0;")
    assert len(barriers) == 2
    assert call.survives(kernel, without(*barriers))
    for barrier in barriers:
        for order in ORDERS:
            assert not call.survives(kernel, without(barrier), **order)


@pipelines
def test_a_removed_wait_for_copies_is_caught_because_they_land_late(kernel):
    call = PIPELINES[kernel]()
    ptx = compiled(call, kernel)
    waits = within_loops(ptx, r"cp\.async\.wait_group\s+\d+\s*;")
    assert waits
    assert not call.survives(kernel, without(*waits))
    with changed(kernel, without(*waits)), executing(86, late_copies=False):
        found = call.run()
    assert (found - call.exact).abs().max() <= 0.02 * call.exact.abs().max()


def test_a_wait_after_the_loop_that_nobody_needs():
    """It drains copies of tiles beyond the last, which were masked and which nobody reads."""
    kernel = "_nf4_linear_forward_kernel"
    call = PIPELINES[kernel]()
    ptx = compiled(call, kernel)
    inside = {found.start() for found in within_loops(ptx, r"cp\.async\.wait_group")}
    (last,) = [
        found
        for found in re.finditer(r"cp\.async\.wait_group\s+0\s*;", ptx)
        if found.start() not in inside
    ]
    assert all(call.survives(kernel, without(last), **order) for order in ({}, *ORDERS))


GUARD = r"@%p\d+ (?={}\.global)"


@pytest.mark.parametrize(
    ("kernel", "pattern", "argument"),
    [
        ("_nf4_linear_forward_kernel", GUARD.format("st"), "y"),
        ("_nf4_linear_transposed_kernel", GUARD.format("st"), "dx"),
        # Of a copy, how many of its bytes are read instead of filled with zeros.
        ("_nf4_linear_forward_kernel", r"(?<=, 0x10), %r\d+(?=;)", "x"),
        ("_linear_cross_entropy_logits_kernel", r"(?<=, 0x10), %r\d+(?=;)", "head"),
    ],
)
def test_a_removed_predicate_is_an_access_out_of_bounds(kernel, pattern, argument):
    call = PIPELINES[kernel]()
    masks = list(re.finditer(pattern, compiled(call, kernel)))
    assert masks
    with (
        changed(kernel, without(*masks)),
        executing(86),
        pytest.raises(MemoryAccessError, match="out-of-bounds") as caught,
    ):
        call.run()
    assert caught.value.argument == argument


def _loss(module):
    return module.linear_cross_entropy(
        torch.randn(21, 40).to(BF16), torch.randn(200, 40).to(BF16), torch.arange(21), -100, None,
        1.0, True,
    )  # fmt: skip


def _rung(module):
    tap, down = torch.randn(35, 72).to(BF16), torch.randn(24, 72).to(BF16)
    return module.rung_merge(torch.randn(35, 24).to(BF16), [tap], [down], None, "sum", 1e-6)


def _norm(module):
    return module.rms_norm(torch.randn(3, 300).to(BF16), torch.randn(300).to(BF16), 1e-6)


@pytest.mark.parametrize(
    ("part", "module", "right", "wrong", "call", "argument"),
    [
        (norm, norm, "tl.load(x + row * x_stride + columns, mask=inside, other=0.0)",
         "tl.load(x + row * x_stride + columns)", _norm, "x"),
        (norm, norm, "normalized.to(y.dtype.element_ty), mask=inside",
         "normalized.to(y.dtype.element_ty)", _norm, "y"),
        (rung, rung, "mask=is_token[:, None] & left[None, :], other=0.0", "mask=left[None, :]",
         _rung, "tap"),
        (rung, rung, "product.to(out.dtype.element_ty), mask=inside",
         "product.to(out.dtype.element_ty)", _rung, "out"),
        (gpu_forward, loss, "mask=is_entry[:, None] & left[None, :]", "mask=left[None, :]",
         _loss, "head"),
        (gpu_gradient, loss, "tl.store(expected + at_sum, summed, mask=inside)",
         "tl.store(expected + at_sum, summed)", _loss, "expected"),
    ],
)  # fmt: skip
def test_a_removed_mask_is_an_access_out_of_bounds(
    monkeypatch, broken, part, module, right, wrong, call, argument
):
    take_kernels(monkeypatch, module, broken(part, right, wrong))
    with executing(86), pytest.raises(MemoryAccessError, match="out-of-bounds") as caught:
        call(module)
    assert caught.value.argument == argument
    monkeypatch.undo()
    with executing(86):
        call(module)
