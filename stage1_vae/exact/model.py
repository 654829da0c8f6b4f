"""What a coder asks of a VAE in exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from common.exact import check_device
from stage1_vae.decoders.interleaved import Grid
from stage1_vae.exact.distributions import PIXELS, Pixels, check_finite
from stage1_vae.likelihoods import Likelihood
from stage1_vae.model import LikelihoodVAE

State = TypeVar("State")
"""What a decoder makes of latents, up to the distributions of pixels."""


class Posterior(NamedTuple):
    """Of a group's latents, n d each, float64: in units of their prior, as if that were N(0, 1)."""

    mean: Tensor
    scale: Tensor


ChooseBins = Callable[[Posterior], Tensor]
"""The bins of a group's latents, int64 n d."""

ChoosePixels = Callable[[Grid, Pixels], Tensor]
"""The numbers of the pixels of a grid, int64 n h w c, given their distributions, and those of the grids before it."""


class ExactModel(Generic[State]):
    """The distributions of a VAE, on its device: groups of latents, the top one first, and pixels below them.

    sizes: latents of each group; latents: of all of them. latent_bits: each latent is one of 2**latent_bits bins that
    are as likely as each other under its prior. image_shape: (H, W, c). bits: of the values of pixels, 8, or 1 of a
    model of black and white.
    """

    latent_bits: int

    def __init__(self, vae: LikelihoodVAE, likelihood: Likelihood, sizes: Sequence[int]) -> None:
        """Raises UserError for a device that computes otherwise than others."""
        self.device = next(vae.parameters()).device
        check_device(self.device)
        self.sizes, self.latents = list(sizes), sum(sizes)
        self.image_shape = (*vae.image_size, vae.config.channels)
        self.likelihood = vae.config.likelihood
        self.pixels_class = PIXELS[type(likelihood)]
        self.bits = self.pixels_class.bits

    def infer(self, values: Tensor, choose: ChooseBins) -> tuple[Tensor, State]:
        """The bins that are chosen, group by group, int64 n d, and what the decoder makes of them: of images, int64
        n H W c from 0 to 2**bits - 1. Raises UserError."""
        raise NotImplementedError

    def descend(self, bins: Tensor) -> State:
        """What the decoder makes of latents in these bins, int64 n d."""
        raise NotImplementedError

    def pixels(self, state: State, choose: ChoosePixels) -> Tensor:
        """Images, grid by grid: n H W c."""
        raise NotImplementedError

    def posteriors(self, values: Tensor, state: State) -> list[Posterior]:
        """Of the groups of images' latents, of which the state is: what `infer` asked about."""
        raise NotImplementedError

    def in_eight_bits(self, values: Tensor) -> Tensor:
        """Black and white are 0 and 255."""
        return values * (255 if self.bits == 1 else 1)

    def distributions(self, outputs: Tensor) -> Pixels:
        """What the decoder says, n h w o. Raises UserError."""
        check_finite(outputs)
        return self.pixels_class(outputs, self.likelihood, self.image_shape[2])
