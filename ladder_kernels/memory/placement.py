"""Where the parts of a frozen model are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ladder_kernels.errors import ConfigError

__all__ = ["EMBEDDINGS", "ON_DEVICE", "WEIGHTS", "Placement"]

WEIGHTS = ("resident", "streamed", "host")
"""Where the quantised weights of the layers may be: all on the device; in their file, from which
one layer after another is read; or in pinned host memory beside a GPU, to which one after another
is copied."""

EMBEDDINGS = ("device", "host")
"""Where the embeddings may be: on the device; or on the host, in their file where they lie in one,
from which the rows that occur are gathered."""


@dataclass(frozen=True)
class Placement:
    """Where the parts of a frozen model are kept.

    Attributes:
        weights: Of the layers, one of :data:`WEIGHTS`.
        embeddings: One of :data:`EMBEDDINGS`.
    """

    weights: str = "resident"
    embeddings: str = "device"

    @classmethod
    def of(cls, weights: str = "resident", embeddings: str | None = None) -> Placement:
        """A placement from options.

        Args:
            weights: Of the layers.
            embeddings: Default "device", and "host" if weights are streamed.

        Raises:
            ConfigError: If there is no such place.
        """
        if embeddings is None:
            embeddings = "host" if weights == "streamed" else "device"
        for name, value, allowed in (
            ("weights", weights, WEIGHTS),
            ("embeddings", embeddings, EMBEDDINGS),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{name}: found {value!r}; allowed are {', '.join(map(repr, allowed))}"
                )
        return cls(weights, embeddings)

    @property
    def streams(self) -> bool:
        """Whether layers are brought to the device one after another."""
        return self.weights != "resident"

    def check_device(self, device: torch.device) -> None:
        """Refuse what makes no sense on a device.

        Raises:
            ConfigError: If weights shall wait in host memory and the device is the host.
        """
        if self.weights == "host" and device.type == "cpu":
            raise ConfigError(
                "weights: found 'host' on a CPU, where it is the same as 'resident'; allowed are "
                "'resident' and 'streamed'"
            )


ON_DEVICE = Placement()
"""Everything on the device."""
