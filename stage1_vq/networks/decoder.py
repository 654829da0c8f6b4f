"""What every decoder is: all of it but the last layer, and the last layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Decoder(Protocol):
    """z_q, b d h w -> statistics of the pixels, b c H W: `last(trunk(z_q))`, which is what a call gives.

    In two parts, as an adversarial loss is balanced by gradients at the weight of the last layer
    (stage1_vq/losses/adversarial.py): they cost a pass through that layer alone, also where the trunk is compiled.
    """

    def __call__(self, z_q: Tensor) -> Tensor: ...

    def trunk(self, z_q: Tensor) -> Tensor:
        """What the last layer makes the pixels of."""
        ...

    def last(self, features: Tensor) -> Tensor:
        """The last layer, and what does not learn after it."""
        ...


class SequentialDecoder(nn.Sequential):
    """A decoder that is a row of layers."""

    def trunk(self, z_q: Tensor) -> Tensor:
        x = z_q
        for layer in list(self)[:-1]:
            x = layer(x)
        return x

    def last(self, features: Tensor) -> Tensor:
        return self[-1](features)

    def forward(self, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(z_q))
