"""Every operator against torch.library's own rules, under torch.compile and with fake tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from ladder_kernels import ops
from ladder_kernels.nf4 import quantize_nf4
from ladder_kernels.ops import _nf4_args

OPERATORS = [
    "nf4_linear",
    "nf4_linear_int8",
    "nf4_linear_transposed",
    "nf4_swiglu",
    "nf4_swiglu_int8",
    "nf4_swiglu_backward",
    "ranged_attention",
    "ranged_attention_backward",
    "rms_norm",
    "add_rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotary_",
    "rung_merge",
    "rung_merge_backward",
    "side_mlp",
    "side_mlp_backward",
    "linear_cross_entropy",
    "nf4_linear_cross_entropy",
    "linear_cross_entropy_head_grad",
]


def tensor(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def flat(rows, columns, double_quant=True):
    weight = quantize_nf4(torch.randn(rows, columns), blocksize=32, double_quant=double_quant)
    return _nf4_args.flatten(weight)


def samples(operator, dtype, grad):
    """Arguments of one operator: usual ones, and ones without rows."""

    def t(*shape):
        return tensor(*shape, dtype=dtype, grad=grad)

    def c(*shape):
        return tensor(*shape, dtype=dtype)

    labels, none = torch.tensor([0, -100, 8]), torch.zeros(0).long()
    if operator == "nf4_linear":
        yield t(2, 3, 6), *flat(8, 6), t(8), t(2, 3, 8)
        yield t(3, 6), *flat(8, 6, False), None, None
        yield t(0, 6), *flat(8, 6), t(8), None
        yield c(6, 3, 2).transpose(0, 2).requires_grad_(grad), *flat(8, 6), None, None
    elif operator == "nf4_linear_int8":
        yield c(2, 3, 32), *flat(8, 32), c(8), c(2, 3, 8)
        yield c(0, 32), *flat(8, 32, False), None, None
        yield c(32, 3, 2).transpose(0, 2), *flat(8, 32), None, None
    elif operator == "nf4_swiglu_int8":
        yield c(2, 3, 32), *flat(8, 32), *flat(8, 32, False)
        yield c(0, 32), *flat(8, 32), *flat(8, 32)
    elif operator == "nf4_linear_transposed":
        yield t(2, 3, 8), *flat(8, 6)
        yield t(0, 8), *flat(8, 6, False)
    elif operator == "nf4_swiglu":
        yield t(2, 3, 6), *flat(8, 6), *flat(8, 6, False)
        yield t(0, 6), *flat(8, 6), *flat(8, 6)
    elif operator == "nf4_swiglu_backward":
        yield c(2, 3, 8), c(2, 3, 6), *flat(8, 6), *flat(8, 6, False)
    elif operator == "ranged_attention":
        yield t(2, 4, 3, 8), t(2, 2, 5, 8), t(2, 2, 5, 8), torch.zeros(2, 3).long(), 0.5, grad
        turned = c(2, 3, 4, 8).transpose(1, 2).requires_grad_(grad)
        yield turned, t(2, 1, 3, 8), c(2, 1, 3, 8), None, 0.5, grad
        yield t(1, 4, 0, 8), t(1, 2, 5, 8), t(1, 2, 5, 8), None, 0.5, grad
    elif operator == "ranged_attention_backward":
        q, k = c(2, 3, 4, 8).transpose(1, 2), c(2, 2, 5, 8)
        out, lse = torch.ops.ladder_kernels.ranged_attention(q, k, k, None, 0.5, True)
        yield c(2, 3, 32), q, k, k, None, 0.5, out, lse
        yield c(3, 2, 32).transpose(0, 1), q, k, k, torch.zeros(2, 3).long(), 0.5, out, lse
    elif operator == "rms_norm":
        yield t(2, 3, 6), t(6), 1e-6
        yield t(0, 6), None, 1e-6
        yield c(6, 3, 2).transpose(0, 2).requires_grad_(grad), t(6), 1e-6
    elif operator == "add_rms_norm":
        yield t(2, 3, 6), t(2, 3, 6), t(6), 1e-6
        yield t(0, 6), t(0, 6), None, 1e-6
    elif operator == "rms_norm_backward":
        yield c(2, 6), c(2, 6), c(6), 1e-6, True
        yield c(2, 6), c(2, 6), None, 1e-6, False
    elif operator == "rotary_":
        yield c(2, 5, 4, 8), c(2, 5, 2, 8), c(1, 5, 1, 4), c(1, 5, 1, 4)
        yield c(2, 4, 5, 8).transpose(1, 2), c(2, 5, 2, 8), c(2, 5, 1, 4), c(2, 5, 1, 4)
        yield c(1, 0, 4, 8), c(1, 0, 2, 8), c(1, 0, 1, 4), c(1, 0, 1, 4)
    elif operator == "rotary":
        yield t(2, 5, 4, 8), t(2, 5, 2, 8), c(1, 5, 1, 4), c(1, 5, 1, 4)
        yield (
            c(2, 4, 5, 8).transpose(1, 2).requires_grad_(grad),
            t(2, 5, 2, 8),
            *(c(2, 5, 1, 4), c(2, 5, 1, 4)),
        )
        yield t(1, 0, 4, 8), t(1, 0, 2, 8), c(1, 0, 1, 4), c(1, 0, 1, 4)
    elif operator == "rung_merge":
        yield t(2, 3, 4), [c(2, 3, 6)], [t(4, 6)], None, "sum", 1e-6
        yield t(5, 4), [c(5, 6), c(5, 7)], [t(4, 6), t(4, 7)], t(1), "gate", 1e-6
        yield t(0, 4), [c(0, 6)], [t(4, 6)], t(4), "channel", 1e-6
    elif operator == "rung_merge_backward":
        arguments = (c(5, 4), c(5, 4), [c(5, 6), c(5, 6)], [c(4, 6), c(4, 6)])
        yield *arguments, c(4), "channel", 1e-6, True, [True, False], True
        yield *arguments, c(1), "gate", 1e-6, False, [True, True], False
        yield *arguments, None, "sum", 1e-6, True, [False, False], False
    elif operator == "side_mlp":
        yield t(2, 3, 6), t(6), t(8, 6), t(8, 6), t(6, 8), 1e-6
        yield t(0, 6), t(6), t(8, 6), t(8, 6), t(6, 8), 1e-6
        turned = c(6, 3, 2).transpose(0, 2).requires_grad_(grad)
        yield turned, t(6), t(8, 6), t(8, 6), t(6, 8), 1e-6
    elif operator == "side_mlp_backward":
        arguments = c(5, 6), c(5, 6), c(6), c(8, 6), c(8, 6), c(6, 8), 1e-6
        yield *arguments, True, True, True
        yield *arguments, False, False, True
        yield *arguments, True, False, False
    elif operator == "linear_cross_entropy":
        yield t(3, 6), t(9, 6), labels, -100, None, 1.0, grad
        yield t(3, 6), c(9, 6), labels, -100, 5.0, 0.5, grad
        yield t(0, 6), t(9, 6), none, -100, None, 1.0, grad
    elif operator == "nf4_linear_cross_entropy":
        yield t(3, 6), *flat(9, 6), labels, -100, 5.0, 1.0, grad
        yield t(0, 6), *flat(9, 6, False), none, -100, None, 1.0, grad
    else:
        assert operator == "linear_cross_entropy_head_grad"
        wide = tensor(3), tensor(3).abs() + 9
        yield wide[0], c(3, 6), c(9, 6), labels, wide[1], -100, 5.0, 0.5


def test_every_operator_is_tested():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ladder_kernels::")
    }
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("dtype", "grad"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
)
def test_opcheck(operator, backend, dtype, grad):
    function = getattr(torch.ops.ladder_kernels, operator).default
    with ops.use_backend(backend):
        for arguments in samples(operator, dtype, grad):
            opcheck(function, arguments)


def everything(x, side, gate, norm, head, labels, weights):
    """All public operations in one graph that ends in a loss."""
    w_gate, w_up, w_down, nf4_head = weights
    h = ops.nf4_swiglu(ops.rms_norm(x, norm, 1e-6), w_gate, w_up)
    y, total = ops.rms_norm(ops.nf4_linear(h, w_down, None, x), norm, 1e-6, x)
    u = ops.rung_merge(side, [x.detach(), total.detach()], [head[:4], head[1:5]], gate, "channel")
    u = ops.side_mlp(u, gate, head[:, :4], head[:, 2:], head[:, :4].t())
    y = y + ops.nf4_linear_transposed(torch.cat([u, u], -1), w_gate)
    loss = ops.linear_cross_entropy(y, head, labels, softcap=5.0)
    return loss + ops.linear_cross_entropy(total, nf4_head, labels, reduction="sum")


def make_weights():
    torch.manual_seed(0)
    return [
        quantize_nf4(torch.randn(shape), blocksize=32) for shape in ((8, 6), (8, 6), (6, 8), (9, 6))
    ]


def make_inputs(length):
    torch.manual_seed(length)
    trained = [
        value.requires_grad_()
        for value in (
            torch.randn(2, length, 6),
            torch.randn(2, length, 4),
            torch.rand(4),
            torch.randn(6),
            torch.randn(9, 6),
        )
    ]
    labels = torch.randint(9, (2, length))
    labels[0, 0] = -100
    return trained, labels


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()
    weights = make_weights()
    compiled = torch.compile(everything, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in (5, 3):
        trained, labels = make_inputs(length)
        loss, expected = (f(*trained, labels, weights) for f in (compiled, everything))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
        )


def test_compile_without_gradients():
    torch._dynamo.reset()
    weights = make_weights()
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    trained, labels = make_inputs(4)
    with torch.no_grad():
        expected = everything(*trained, labels, weights)
        torch.testing.assert_close(compiled(*trained, labels, weights), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_whole_numbers(dynamic):
    torch._dynamo.reset()
    weights = [quantize_nf4(torch.randn(shape), blocksize=32) for shape in ((64, 32), (32, 64))]

    def both(x):
        h = ops.nf4_swiglu_int8(x, weights[0], weights[0])
        return ops.nf4_linear_int8(h, weights[1], None, x)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 3):
        x = torch.randn(2, length, 32)
        assert torch.equal(compiled(x), both(x))


def test_inference_mode():
    weights = make_weights()
    trained, labels = make_inputs(4)
    expected = everything(*trained, labels, weights).detach()
    with torch.inference_mode():
        loss = everything(*trained, labels, weights)
    assert loss.is_inference()
    assert torch.equal(loss.clone(), expected)


def test_fake_tensors():
    trained, labels = make_inputs(4)
    weights = make_weights()
    with FakeTensorMode() as mode:

        def fake(value):
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        loss = everything(
            *[fake(t) for t in trained],
            fake(labels),
            [
                dataclasses.replace(
                    w, **{f.name: fake(getattr(w, f.name)) for f in dataclasses.fields(w)}
                )
                for w in weights
            ],
        )
    assert (loss.shape, loss.dtype) == ((), torch.float32)


def test_meta_tensors():
    w = make_weights()[0]
    weight = dataclasses.replace(w, **{k: v.to("meta") for k, v in w.tensors().items()})
    x = torch.ones(2, 3, 6, device="meta", dtype=torch.bfloat16)
    out = ops.nf4_linear(x, weight)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 8), torch.bfloat16, "meta")
