"""Checks of what users pass to operations, and the casts that autocast asks for.

Every failure is one line that names the operation, the argument, what was found and what is
allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ladder_kernels.errors import ConfigError
from ladder_kernels.nf4 import NF4Weight

__all__ = [
    "autocast",
    "check_floating",
    "check_nf4",
    "check_same_device",
    "check_same_dtype",
    "check_shape",
    "check_tensor",
    "refuse",
]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse(op: str, argument: str, found: str, allowed: str) -> ConfigError:
    """Build the one-line error of a bad argument; the caller raises it."""
    return ConfigError(f"{op}: {argument} {found}; {allowed}")


def check_tensor(op: str, argument: str, value: object) -> None:
    """Refuse what is not a tensor."""
    if not isinstance(value, Tensor):
        raise refuse(op, argument, f"is a {type(value).__name__}", "it must be a torch.Tensor")


def check_floating(op: str, argument: str, value: Tensor) -> None:
    """Refuse what is not a tensor of a floating dtype that operations compute in."""
    check_tensor(op, argument, value)
    if value.dtype not in _FLOATING:
        raise refuse(
            op,
            argument,
            f"has dtype {value.dtype}",
            "allowed are float16, bfloat16, float32 and float64",
        )


def check_same_dtype(op: str, argument: str, value: Tensor, like: str, other: Tensor) -> None:
    """Refuse a tensor whose dtype is not that of ``other``, the argument named ``like``."""
    check_tensor(op, argument, value)
    if value.dtype != other.dtype:
        raise refuse(
            op, argument, f"has dtype {value.dtype}", f"it must be {other.dtype}, as {like} is"
        )


def check_same_device(op: str, argument: str, value: Tensor, like: str, other: Tensor) -> None:
    """Refuse a tensor on another device than ``other``, the argument named ``like``."""
    if value.device != other.device:
        raise refuse(
            op, argument, f"is on device {value.device}", f"it must be on {other.device}, as {like}"
        )


def check_shape(op: str, argument: str, value: Tensor, allowed: Sequence[int], why: str) -> None:
    """Refuse a tensor whose shape is not ``allowed``; ``why`` says where that shape comes from."""
    if tuple(value.shape) != tuple(allowed):
        raise refuse(
            op, argument, f"has shape {list(value.shape)}", f"it must be {list(allowed)} ({why})"
        )


def check_nf4(op: str, argument: str, weight: object) -> None:
    """Refuse what is not a two-dimensional :class:`NF4Weight`."""
    if not isinstance(weight, NF4Weight):
        raise refuse(
            op,
            argument,
            f"is a {type(weight).__name__}",
            "it must be an NF4Weight (quantize_nf4 makes one)",
        )
    if len(weight.shape) != 2:
        raise refuse(op, argument, f"has shape {list(weight.shape)}", "it must be [N, K]")


# Asked once: compilers of older PyTorch cannot follow the question.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


def autocast(value: Tensor) -> Tensor:
    """Cast to autocast's dtype where autocast is enabled for the tensor's device.

    As PyTorch's own autocast does, this leaves float64 and what is not floating as it is.
    """
    device = value.device.type
    if (
        not value.is_floating_point()
        or value.dtype == torch.float64
        or device not in _AUTOCAST
        or not torch.is_autocast_enabled(device)
    ):
        return value
    return value.to(torch.get_autocast_dtype(device))
