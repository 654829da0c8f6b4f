"""What every likelihood is: p(x|z), of images given what a decoder's network puts out for z."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Likelihood(nn.Module):
    """p(x|z) of images `... c H W` in [-1, 1], given `... o H W` of a network: all pixels are independent given those.

    outputs: o, how many channels the network must put out. discrete: whether it is a probability of images whose pixels
    have finitely many values, so that they can be coded without loss, and not a density.
    """

    discrete: bool
    outputs: int

    def __init__(self, config: Any, channels: int) -> None:
        """channels: c."""
        super().__init__()
        self.config = config
        self.channels = channels

    def log_prob(self, outputs: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) of each image, in nats: `... o H W` and `... c H W`, whose leading axes broadcast, -> `...`."""
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """`... o H W` -> `... c H W`, in [-1, 1]: of p(x|z)."""
        raise NotImplementedError

    def mode(self, outputs: Tensor) -> Tensor:
        """Likewise: the most likely image."""
        raise NotImplementedError

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Likewise: one draw of p(x|z)."""
        raise NotImplementedError
