"""VAEs once more in exact arithmetic, for lossless files: the same bit for bit on every machine (common/exact.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from common.errors import UserError
from common.exact import check_device
from stage1_vae.decoders.interleaved import Grid
from stage1_vae.exact.decoders import DECODERS, exact_decoder
from stage1_vae.exact.distributions import (
    LATENT_BITS,
    MOST_COMPONENTS,
    ONE_BITS,
    PIXELS,
    Pixels,
    Shares,
    bins_of,
    check_finite,
    latents_of,
    mean_and_scale,
    posterior_shares,
)
from stage1_vae.exact.networks import exact_encoder
from stage1_vae.likelihoods import Likelihood
from stage1_vae.model import LikelihoodVAE
from stage1_vae.posteriors import DiagonalGaussianLayer
from stage1_vae.priors import StandardNormal
from stage1_vae.vae import VAE

__all__ = [
    "LATENT_BITS",
    "ONE_BITS",
    "ExactVAE",
    "Grid",
    "Pixels",
    "Shares",
    "bins_of",
    "latents_of",
    "posterior_shares",
]


class ExactVAE:
    """The distributions of a VAE, on its device.

    latents: d of an image. image_shape: (H, W, c). bits: of the values of pixels, 8, or 1 of a model of black and
    white.
    """

    def __init__(self, vae: LikelihoodVAE) -> None:
        """Raises UserError for a model whose images cannot be coded without loss, and for a device that computes
        otherwise than others."""
        vae = check_can_code(vae)
        self.device = next(vae.parameters()).device
        check_device(self.device)
        self.latents = math.prod(vae.shape)
        self.image_shape = (*vae.image_size, vae.config.channels)
        self.config = vae.posterior_layer.config
        self.likelihood = vae.config.likelihood
        self.pixels_class = PIXELS[type(cast(Likelihood, vae.decoder.likelihood))]
        self.bits = self.pixels_class.bits
        self.encoder, self.decoder = exact_encoder(vae.encoder), exact_decoder(vae.decoder, 2**self.bits - 1)

    @torch.inference_mode()
    def posterior(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of each image's latents, n d, float64: int64 n H W c from 0 to 2**bits - 1."""
        return mean_and_scale(self.encoder(values * (255 if self.bits == 1 else 1)), self.config)

    @torch.inference_mode()
    def walk(self, bins: Tensor, choose: Callable[[Grid, Pixels], Tensor]) -> Tensor:
        """Images of latents in these bins, int64 n d -> n H W c. choose: the numbers of the pixels of a grid, n h w c,
        given their distributions, and those of the grids before it."""

        def chosen(grid: Grid, outputs: Tensor) -> Tensor:
            check_finite(outputs)
            shape = (*outputs.shape[:-1], self.image_shape[2])
            return choose(grid, self.pixels_class(outputs, self.likelihood, shape[-1])).view(shape)

        return self.decoder.walk(latents_of(bins.flatten()).view(bins.shape), chosen)


def check_can_code(vae: LikelihoodVAE) -> VAE:
    """The model, whose images can be coded without loss. Raises UserError for any other."""
    if not isinstance(vae, VAE):
        raise UserError(
            f"mode=lossless, but this model is a {vae.kind}, expected one of model.kind=vae; name such a model, "
            "or take PNG"
        )
    config = vae.config
    if config.holes:
        raise UserError(
            "mode=lossless, but this model is one of images with holes, expected one of whole images; name another "
            "model, or take PNG"
        )
    if not isinstance(vae.decoder, DECODERS):
        raise UserError(
            "mode=lossless, but the decoder of this model draws pixel after pixel, and a file would take hours; name a "
            "model with another decoder, or take PNG"
        )
    if not isinstance(vae.posterior_layer, DiagonalGaussianLayer) or not isinstance(vae.prior, StandardNormal):
        raise UserError(
            f"mode=lossless, but this model has the posterior {config.posterior.kind} and the prior "
            f"{config.prior.kind}, expected diagonal and standard_normal; name such a model, or take PNG"
        )
    if type(vae.decoder.likelihood) not in PIXELS:
        raise UserError(
            f"mode=lossless, but this model has the likelihood {config.likelihood.kind}, expected logistic_mixture, or "
            "bernoulli for images of black and white; name such a model, or take PNG"
        )
    components = getattr(config.likelihood, "components", 1)
    if components > MOST_COMPONENTS:
        raise UserError(
            f"mode=lossless, but the likelihood of this model has {components} components, expected at most "
            f"{MOST_COMPONENTS}; name another model, or take PNG"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in vae.state_dict().values()):
        raise UserError("the weights of this model are not finite: they are damaged; take an earlier checkpoint")
    return vae
