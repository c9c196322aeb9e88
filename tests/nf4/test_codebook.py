"""The two code tables, by bits."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch

from ladder_kernels.nf4 import NF4_VALUES
from ladder_kernels.nf4.codebook import dynamic_code, nf4_code


def test_centroids_are_bitsandbytes(assert_same_bits):
    assert_same_bits(nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))


def test_centroids():
    assert len(NF4_VALUES) == 16
    assert list(NF4_VALUES) == sorted(NF4_VALUES)
    assert (NF4_VALUES[0], NF4_VALUES[7], NF4_VALUES[15]) == (-1.0, 0.0, 1.0)
    # Each is a float32 exactly, so that no rounding of the table can differ.
    assert nf4_code().double().tolist() == list(NF4_VALUES)


def test_dynamic_map_is_bitsandbytes(assert_same_bits):
    """Of the map that its own quantiser stores, which on this CPU has the table's last bits."""
    _, state = bnb.quantize_4bit(torch.ones(64), quant_type="nf4", compress_statistics=True)
    assert state.state2 is not None
    ours, theirs = dynamic_code(), state.state2.code
    assert ours.shape == theirs.shape == (256,)
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
    assert_same_bits(ours, theirs)


def test_dynamic_map():
    code = dynamic_code()
    assert code.dtype == torch.float32
    assert bool((code[1:] > code[:-1]).all())
    assert (code[127].item(), code[255].item()) == (0.0, 1.0)
    # Symmetric but for the one at the top, which has no partner.
    assert torch.equal(code[:127], -code[128:255].flip(0))


def test_devices():
    assert nf4_code("meta").device.type == "meta"
    assert dynamic_code("meta").device.type == "meta"
