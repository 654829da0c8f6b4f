"""The variational autoencoder of Kingma and Welling 2013, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), with any
posterior, prior, network and likelihood of this package."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import in_type_of
from stage1_vae.binarise import Binarised
from stage1_vae.decoders import DecoderConfig, FactorisedDecoder, build_decoder, decoder_config
from stage1_vae.holes import seen_pixels, with_indicators
from stage1_vae.likelihoods import LIKELIHOODS, BernoulliConfig, LikelihoodConfig, build_likelihood
from stage1_vae.model import LikelihoodVAE, Move, NoiseSource, Pixels, terms_of_one_group
from stage1_vae.networks import (
    DenseConfig,
    NetworkConfig,
    build_encoder,
    latent_shape,
    network_config,
)
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors import POSTERIORS, DiagonalGaussianConfig, Posterior, PosteriorConfig, build_posterior
from stage1_vae.posteriors.base import LatentShape
from stage1_vae.posteriors.matrix_normal import MatrixNormalConfig
from stage1_vae.priors import PRIORS, LatentPriorConfig, StandardNormalConfig


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """p(z) p(x|z) and q(z|x)."""

    kind: Literal["vae"] = "vae"
    channels: int = 1  # c of the images: 3 for colour, 1 for grey
    latents: int = 20  # d: numbers of an image's latent vector; or channels of its map, see encoder.map
    encoder: NetworkConfig = field(default_factory=DenseConfig)
    posterior: PosteriorConfig = field(default_factory=DiagonalGaussianConfig)
    prior: LatentPriorConfig = field(default_factory=StandardNormalConfig)
    decoder: DecoderConfig = field(default_factory=DenseConfig)
    likelihood: LikelihoodConfig = field(default_factory=BernoulliConfig)
    holes: bool = False  # of images with missing pixels: the encoder is told which, the likelihood counts the others

    def __post_init__(self) -> None:
        for name in ("channels", "latents"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}, expected at least 1")
        if getattr(self.encoder, "skip", False):
            raise UserError(
                "model.encoder.skip=True, expected False: skip connections lead from latents to the layers of a decoder"
            )
        if self.posterior.kind == "matrix_normal" and getattr(self.encoder, "map", False):
            raise UserError(
                "model.encoder.map=True with model.posterior.kind=matrix_normal, expected False: of each map rows and "
                "columns are told, by numbers that have no place on a map"
            )
        if self.holes and self.decoder.kind in ("pixelcnn", "interleaved"):
            raise UserError(
                f"model.holes=True with model.decoder.kind={self.decoder.kind}, whose pixels go by those before them, "
                "expected a decoder that says all of them at once, such as dense or convolutional"
            )
        if self.holes and getattr(self.likelihood, "variance", None) == "optimal":
            raise UserError(
                "model.holes=True with model.likelihood.variance=optimal, expected fixed, learned or per_pixel: the "
                "optimal one is of whole images"
            )
        sphere = self.posterior.kind == "von_mises_fisher"
        if sphere != (self.prior.kind == "uniform_sphere") and self.prior.kind != "vamp":
            raise UserError(
                f"model.posterior.kind={self.posterior.kind} with model.prior.kind={self.prior.kind}, expected either "
                "von_mises_fisher with uniform_sphere, or neither: the latents of one are unit vectors"
            )


class VAE(LikelihoodVAE):
    """Images, b c H W in [-1, 1] and of one size, <-> latents, b *shape, of one group."""

    kind = "vae"
    config_class = VAEConfig

    def __init__(self, config: VAEConfig, image_size: tuple[int, int], binarised: Binarised | None = None) -> None:
        """image_size: (H, W) of all images. binarised: how those that it is trained on were made black and white, by
        which its figures are to be taken; None: not known."""
        super().__init__()
        self.binarised = binarised
        self.config = config
        self.image_size = image_size
        self.shape: LatentShape = latent_shape(config.encoder, config.latents, image_size)
        if isinstance(config.posterior, MatrixNormalConfig):
            self.shape = (config.latents, config.posterior.height, config.posterior.width)
        images = (config.channels, *image_size)
        self.posterior_layer = build_posterior(config.posterior, self.shape)
        told = (config.channels + config.holes, *image_size)
        self.encoder = build_encoder(config.encoder, told, self.posterior_layer.features)
        self.prior = PRIORS[config.prior.kind][0](config.prior, self.shape)
        self.prior.bind(images, self.posterior)
        likelihood = build_likelihood(config.likelihood, config.channels)
        self.decoder = build_decoder(config.decoder, likelihood, self.shape, image_size)
        self.discrete, self.mean_is_drawn = self.decoder.discrete, self.decoder.mean_is_drawn

    def arguments(self) -> dict[str, Any]:
        binarised = None if self.binarised is None else asdict(self.binarised)
        return {"config": asdict(self.config), "image_size": list(self.image_size), "binarised": binarised}

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config, (height, width) = dict(arguments["config"]), arguments["image_size"]
        for name, kinds in (("posterior", POSTERIORS), ("prior", PRIORS), ("likelihood", LIKELIHOODS)):
            config[name] = kinds[config[name]["kind"]][1](**config[name])
        config["encoder"], config["decoder"] = network_config(config["encoder"]), decoder_config(config["decoder"])
        binarised = arguments.get("binarised")  # an earlier version took none down
        return cls(VAEConfig(**config), (height, width), None if binarised is None else Binarised(**binarised))

    def family(self) -> str:
        config = self.config
        return f"{config.prior.kind} prior, {config.posterior.kind} posterior, {config.likelihood.kind} likelihood"

    def posterior(self, images: Tensor) -> Posterior:
        """q(z|x) of images, b c H W in [-1, 1], nan where pixels are missing, which `config.holes` allows. Raises
        UserError for images of another shape."""
        self.check_images(images)
        seen = in_type_of(self.encoder, with_indicators(images) if self.config.holes else images)
        features = self.encoder(seen)
        # Where the networks alone were cast, the posterior is computed in the type of the images all the same.
        return self.posterior_layer(features if seen.dtype == images.dtype else features.to(images.dtype))

    def log_likelihood(self, latents: Tensor, images: Tensor) -> Tensor:
        """log p(x|z), of the pixels that are not nan: k b *shape, b c H W -> k b."""
        if not self.config.holes:
            return self.decoder.log_likelihood(latents, images)
        assert isinstance(self.decoder, FactorisedDecoder)
        seen = seen_pixels(images)
        return self.decoder.log_likelihood(latents, images.nan_to_num(0.0), seen)

    def terms(self, images: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None) -> Terms:
        posterior = self.posterior(images)
        return terms_of_one_group(
            posterior, self.prior, lambda latents: self.log_likelihood(latents, images), draws, noise, move
        )

    def noise_source(self, image: Tensor) -> NoiseSource:
        return self.posterior(image)

    def generator_parameters(self) -> list[nn.Parameter]:
        return [*self.prior.parameters(), *self.decoder.parameters()]

    @property
    def start_images(self) -> int:
        return self.prior.start_images

    def start(self, images: Tensor) -> None:
        self.prior.start(images)

    def encode(self, images: Tensor) -> Tensor:
        return self.posterior(images).mean

    def pixels(self, latents: Tensor, shown: Pixels, generator: torch.Generator | None = None) -> Tensor:
        if shown == "sample":
            return self.decoder.sample(latents, generator).clamp(-1, 1)
        return (self.decoder.mean(latents) if shown == "mean" else self.decoder.mode(latents)).clamp(-1, 1)

    def draw_latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return self.prior.sample(count, generator)
