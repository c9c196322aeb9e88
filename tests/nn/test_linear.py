"""Frozen linear layers."""

from __future__ import annotations

import pytest
import torch

from ladder_kernels.nf4 import NF4Weight, quantize_nf4
from ladder_kernels.nn.linear import FrozenLinear, NF4Linear


def same_bits(a: NF4Weight, b: NF4Weight) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_result(double_quant: bool, bias: bool):
    weight = quantize_nf4(torch.randn(48, 40), double_quant=double_quant)
    offset = torch.randn(48) if bias else None
    layer = NF4Linear.from_weight(weight, offset)
    x, residual = torch.randn(2, 3, 40), torch.randn(2, 3, 48)
    dense = FrozenLinear(weight.dequantize(torch.float32), offset)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x, residual), dense(x) + residual)
    torch.testing.assert_close(dense(x, residual), dense(x) + residual)
    assert (layer.in_features, layer.out_features) == (40, 48)
    assert (dense.in_features, dense.out_features) == (40, 48)
    assert "blocksize=64" in repr(layer)


def test_casts_leave_the_quantised_state_alone():
    weight = quantize_nf4(torch.randn(32, 64))
    layer = NF4Linear(weight, torch.randn(32)).to(torch.bfloat16).half().double()
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float64
    assert same_bits(layer.weight, weight)
    assert layer.to("meta").packed.device.type == "meta"
    assert layer.weight.packed.dtype == torch.uint8


def test_no_parameters_and_nothing_to_save():
    layer = NF4Linear(quantize_nf4(torch.randn(32, 64)), torch.randn(32))
    assert list(layer.parameters()) == []
    assert layer.state_dict() == {}
    dense = FrozenLinear(torch.randn(3, 4, requires_grad=True))
    assert list(dense.parameters()) == []
    assert not dense.weight.requires_grad
    assert "in_features=4" in repr(dense)


def test_gradients_pass_through():
    weight = quantize_nf4(torch.randn(32, 64))
    layer = NF4Linear(weight)
    x = torch.randn(5, 64, requires_grad=True)
    residual = torch.randn(5, 32, requires_grad=True)
    layer(x, residual).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize(torch.float32).sum(0).expand(5, 64))
    torch.testing.assert_close(residual.grad, torch.ones(5, 32))


def test_the_weight_follows_its_tensors():
    layer = NF4Linear(quantize_nf4(torch.randn(8, 64)))
    weight = layer.weight
    assert layer.weight is weight  # not made and checked anew for every product
    layer.packed = layer.packed.clone()
    assert layer.weight.packed is layer.packed
    layer.to("meta")
    assert layer.weight.device.type == "meta"
