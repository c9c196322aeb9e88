"""A name for the exact function that a backbone computes.

A saved ladder holds the fingerprint of its base and refuses another one. It does not depend on the
compute dtype, on the device, on the file format or on how a checkpoint is cut into files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nf4.quantize import has_values

__all__ = ["combine", "digest_float", "digest_nf4", "digest_pieces"]

_CHUNK = 1 << 22


def _update(digest: Any, tensor: torch.Tensor) -> None:
    if not has_values(tensor):
        digest.update(b"no values")
        return
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].cpu()
        digest.update(chunk.contiguous().view(torch.uint8).numpy())


def digest_float(tensor: torch.Tensor) -> bytes:
    """sha256 of a float tensor's shape and values, widened to fp32."""
    if not has_values(tensor):
        return digest_pieces(tuple(tensor.shape), [tensor])
    flat = tensor.detach().reshape(-1)
    starts = range(0, flat.numel(), _CHUNK)
    return digest_pieces(tuple(tensor.shape), (flat[start : start + _CHUNK] for start in starts))


def digest_pieces(shape: tuple[int, ...], pieces: Iterable[torch.Tensor]) -> bytes:
    """As :func:`digest_float`, of a tensor that comes in pieces, flattened."""
    digest = hashlib.sha256(repr(("float", shape)).encode())
    for piece in pieces:
        _update(digest, piece.float())
    return digest.digest()


def digest_nf4(weight: NF4Weight) -> bytes:
    """sha256 of a quantised weight's shape, blocksize and bits."""
    digest = hashlib.sha256(repr(("nf4", tuple(weight.shape), weight.blocksize)).encode())
    for name, tensor in sorted(weight.tensors().items()):
        digest.update(name.encode())
        _update(digest, tensor)
    return digest.digest()


def combine(digests: Mapping[str, bytes], fields: Mapping[str, Any]) -> str:
    """sha256 (hex) over all tensors, by name, and the fields that change the function.

    Args:
        digests: Of each tensor, by its name in a transformers checkpoint.
        fields: Anything that json can write.
    """
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(digests):
        digest.update(name.encode())
        digest.update(digests[name])
    return digest.hexdigest()
