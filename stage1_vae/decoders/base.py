"""What every decoder is: p(x|z) of images given latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """p(x|z)."""

    discrete: bool  # whether it is a probability of images whose pixels have finitely many values, not a density
    mean_is_drawn: bool = False  # whether `mean` has no closed form and is one draw

    def log_likelihood(self, latents: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) in nats: latents k b *shape, images b c H W in [-1, 1] -> k b."""
        raise NotImplementedError

    def mean(self, latents: Tensor) -> Tensor:
        """n *shape -> n c H W in [-1, 1]: the mean of p(x|z), or, where that has no closed form, one draw."""
        raise NotImplementedError

    def mode(self, latents: Tensor) -> Tensor:
        """Likewise: the most likely image, or, where it is not known, each pixel's most likely value in turn."""
        raise NotImplementedError

    def sample(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Likewise: a draw of p(x|z)."""
        raise NotImplementedError
