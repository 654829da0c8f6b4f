"""A VAE of one vector or map of latents in exact arithmetic."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from stage1_vae.decoders.interleaved import Grid
from stage1_vae.exact.decoders import exact_decoder
from stage1_vae.exact.distributions import latents_of, mean_and_scale
from stage1_vae.exact.model import ChooseBins, ChoosePixels, ExactModel, Posterior
from stage1_vae.exact.networks import exact_encoder
from stage1_vae.likelihoods import Likelihood
from stage1_vae.vae import VAE

LATENT_BITS = 16


class ExactVAE(ExactModel[Tensor]):
    """One group of latents under N(0, I). What the decoder makes of them is made grid by grid: its state is latents."""

    latent_bits = LATENT_BITS

    def __init__(self, vae: VAE) -> None:
        super().__init__(vae, cast(Likelihood, vae.decoder.likelihood), [math.prod(vae.shape)])
        self.config = vae.posterior_layer.config
        self.encoder, self.decoder = exact_encoder(vae.encoder), exact_decoder(vae.decoder, 2**self.bits - 1)

    @torch.inference_mode()
    def infer(self, values: Tensor, choose: ChooseBins) -> tuple[Tensor, Tensor]:
        bins = choose(self.posterior(values))
        return bins, self.descend(bins)

    @torch.inference_mode()
    def descend(self, bins: Tensor) -> Tensor:
        return latents_of(bins, self.latent_bits)

    @torch.inference_mode()
    def pixels(self, state: Tensor, choose: ChoosePixels) -> Tensor:
        def chosen(grid: Grid, outputs: Tensor) -> Tensor:
            return choose(grid, self.distributions(outputs)).view(*outputs.shape[:-1], self.image_shape[2])

        return self.decoder.walk(state, chosen)

    @torch.inference_mode()
    def posteriors(self, values: Tensor, state: Tensor) -> list[Posterior]:
        return [self.posterior(values)]

    def posterior(self, values: Tensor) -> Posterior:
        return Posterior(*mean_and_scale(self.encoder(self.in_eight_bits(values)), self.config))
