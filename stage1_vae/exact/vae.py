"""A VAE of one vector or map of latents in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from stage1_vae.decoders.interleaved import Grid
from stage1_vae.exact.decoders import exact_decoder
from stage1_vae.exact.distributions import Pixels, latents_of, mean_and_scale
from stage1_vae.exact.model import ChooseBins, ExactModel
from stage1_vae.exact.networks import exact_encoder
from stage1_vae.likelihoods import Likelihood
from stage1_vae.vae import VAE

LATENT_BITS = 16


class ExactVAE(ExactModel):
    """One group of latents under N(0, I)."""

    latent_bits = LATENT_BITS

    def __init__(self, vae: VAE) -> None:
        super().__init__(vae, cast(Likelihood, vae.decoder.likelihood), [math.prod(vae.shape)])
        self.config = vae.posterior_layer.config
        self.encoder, self.decoder = exact_encoder(vae.encoder), exact_decoder(vae.decoder, 2**self.bits - 1)

    @torch.inference_mode()
    def posterior(self, values: Tensor, choose: ChooseBins) -> Tensor:
        mean, scale = mean_and_scale(self.encoder(self.in_eight_bits(values)), self.config)
        return choose(mean, scale)

    @torch.inference_mode()
    def walk(self, bins: Tensor, choose: Callable[[Grid, Pixels], Tensor]) -> Tensor:
        def chosen(grid: Grid, outputs: Tensor) -> Tensor:
            return choose(grid, self.pixels_of(outputs)).view(*outputs.shape[:-1], self.image_shape[2])

        return self.decoder.walk(latents_of(bins, self.latent_bits), chosen)
