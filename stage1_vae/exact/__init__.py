"""VAEs once more in exact arithmetic, for lossless files: the same bit for bit on every machine (common/exact.py)."""

from __future__ import annotations

from typing import Any

from common.errors import UserError
from common.wording import an
from stage1_vae.decoders.interleaved import Grid
from stage1_vae.exact.decoders import DECODERS
from stage1_vae.exact.distributions import (
    MOST_COMPONENTS,
    ONE_BITS,
    PIXELS,
    Pixels,
    Shares,
    bins_of,
    latents_of,
    posterior_shares,
)
from stage1_vae.exact.model import ChooseBins, ChoosePixels, ExactModel, Posterior
from stage1_vae.exact.vae import ExactVAE
from stage1_vae.exact.vdvae import ExactVDVAE
from stage1_vae.hierarchies.vdvae import VDVAE
from stage1_vae.model import LikelihoodVAE
from stage1_vae.posteriors import DiagonalGaussianLayer
from stage1_vae.priors import StandardNormal
from stage1_vae.vae import VAE

__all__ = [
    "ONE_BITS",
    "ChooseBins",
    "ChoosePixels",
    "ExactModel",
    "ExactVAE",
    "ExactVDVAE",
    "Grid",
    "Pixels",
    "Posterior",
    "Shares",
    "bins_of",
    "exact_model",
    "latents_of",
    "posterior_shares",
]


def exact_model(vae: LikelihoodVAE) -> ExactModel[Any]:
    """Raises UserError for a model whose images cannot be coded without loss, and for a device that computes otherwise
    than others."""
    found = check_can_code(vae)
    return ExactVDVAE(found) if isinstance(found, VDVAE) else ExactVAE(found)


def check_can_code(vae: LikelihoodVAE) -> VAE | VDVAE:
    """The model, whose images can be coded without loss. Raises UserError for any other."""
    if not isinstance(vae, VAE | VDVAE):
        raise UserError(
            f"mode=lossless, but this model is {an(vae.kind)}, expected one of model.kind=vae or vdvae; name such a "
            "model, or take PNG"
        )
    if isinstance(vae, VAE):
        check_parts(vae)
    likelihood = vae.likelihood if isinstance(vae, VDVAE) else vae.decoder.likelihood
    if type(likelihood) not in PIXELS:
        raise UserError(
            f"mode=lossless, but this model has the likelihood {vae.config.likelihood.kind}, expected "
            "logistic_mixture, or bernoulli for images of black and white; name such a model, or take PNG"
        )
    components = getattr(vae.config.likelihood, "components", 1)
    if components > MOST_COMPONENTS:
        raise UserError(
            f"mode=lossless, but the likelihood of this model has {components} components, expected at most "
            f"{MOST_COMPONENTS}; name another model, or take PNG"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in vae.state_dict().values()):
        raise UserError("the weights of this model are not finite: they are damaged; take an earlier checkpoint")
    return vae


def check_parts(vae: VAE) -> None:
    """Raises UserError unless its decoder, posterior and prior can be said in exact arithmetic."""
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
    for half in ("encoder", "decoder"):
        if getattr(config, half).kind == "titok":
            raise UserError(
                f"mode=lossless, but the {half} of this model is a vision transformer, expected dense or convolutional "
                "networks; name a model of these, or take PNG"
            )
    if not isinstance(vae.posterior_layer, DiagonalGaussianLayer) or not isinstance(vae.prior, StandardNormal):
        raise UserError(
            f"mode=lossless, but this model has the posterior {config.posterior.kind} and the prior "
            f"{config.prior.kind}, expected diagonal and standard_normal; name such a model, or take PNG"
        )
