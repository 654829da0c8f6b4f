"""What training, judging and generating ask of every likelihood VAE, of one group of latents or of a hierarchy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import PretrainedModel
from stage1_vae.binarise import Binarised
from stage1_vae.networks.batch_norm import forget_all_noted, take_all_noted
from stage1_vae.objectives.spectral import Regularised
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors.base import LatentShape, Posterior
from stage1_vae.priors.base import LatentPrior

Pixels = Literal["mean", "mode", "sample"]
"""What is shown of p(x|z): its mean, its most likely image, or one drawn from it."""


class Move(Protocol):
    def __call__(
        self, latents: Tensor, log_posterior: Tensor, log_joint: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Other latents in the place of draws, k b *shape, and how likely it was to come there, log q, k b n, like what
        is given. log_joint: log p(x, z) of latents, k b *shape -> k b."""
        ...


class NoiseSource(Protocol):
    """Where the noise of one image's latents comes from, which depends on nothing learned: a posterior is one."""

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count 1 *shape`, float32"""
        ...


class LikelihoodVAE(PretrainedModel):
    """Images, b c H W in [-1, 1] and of one size, <-> latents, b *shape: those of all groups, one after another in one
    vector, where there are several.

    config: has at least `channels` and `likelihood`.
    """

    config: Any
    image_size: tuple[int, int]  # (H, W) of all images
    binarised: Binarised | None  # how those that it was trained on were made black and white; None: not known
    shape: LatentShape
    discrete: bool  # whether the likelihood is a probability of images whose pixels have finitely many values
    mean_is_drawn: bool = False  # whether the mean image has no closed form and is one draw

    def terms(self, images: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None) -> Terms:
        """What objectives are made of: b c H W in [-1, 1], and `draws` draws of the latents of each image, or those of
        `noise`, k b *shape, as `noise_source` gives it. With draws=0 the posterior's mean is the one draw. `move`
        replaces the draws before anything is computed of them; there is no closed KL then."""
        raise NotImplementedError

    def forward(self, images: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None) -> Terms:
        """`terms`, by the name under which a wrapped model (DDP, compile) is called."""
        return self.terms(images, draws, noise, move)

    def noise_source(self, image: Tensor) -> NoiseSource:
        """Of one image, 1 c H W: the noise of all."""
        raise NotImplementedError

    def generator_parameters(self) -> list[nn.Parameter]:
        """The weights of p(z) and p(x|z): all but those of q(z|x)."""
        raise NotImplementedError

    @property
    def start_images(self) -> int:
        """How many training images `start` is best given; 0 for none."""
        return 0

    def start(self, images: Tensor) -> None:
        """Before the first step: what the model takes from training images, b c H W in [-1, 1], nan where pixels are
        missing, the same ones on all processes."""

    def after_step(self) -> None:
        """After each optimiser step, but not after a skipped one: takes up what the step's forward passes noted."""
        take_all_noted(self)

    def discard_step(self) -> None:
        """After a skipped step, in place of `after_step`: forgets what its forward passes noted."""
        forget_all_noted(self)

    def regularised(self) -> Regularised | None:
        """Weights whose size an objective may keep small; None: the model does not say."""
        return None

    def encode(self, images: Tensor) -> Tensor:
        """The means of their posteriors: b c H W -> b *shape. Of a hierarchy each group's, given those above it."""
        raise NotImplementedError

    def group_means(self, images: Tensor) -> tuple[Tensor, ...]:
        """`encode`, parted into groups: b n each."""
        return (self.encode(images).flatten(1),)

    def pixels(self, latents: Tensor, shown: Pixels, generator: torch.Generator | None = None) -> Tensor:
        """n *shape -> n c H W in [-1, 1]"""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """n *shape -> n c H W in [-1, 1]: the mean image of each."""
        return self.pixels(latents, "mean")

    @property
    def sizes(self) -> list[int]:
        """How many numbers each group has."""
        return [math.prod(self.shape)]

    def as_noise(self, latents: Tensor) -> Tensor:
        """n *shape -> n *shape: what walks through latents go along. Of one group they themselves; of a hierarchy
        the noise of which p(z) draws them, in which each group is N(0, I) whatever those above it are."""
        return latents

    def from_noise(self, noise: Tensor) -> Tensor:
        """n *shape -> n *shape: the latents that `as_noise` makes this of."""
        return noise

    def draw_latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """count *shape, drawn from p(z)."""
        raise NotImplementedError

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Images of latents that the prior draws: count c H W."""
        return self.decode(self.draw_latents(count, generator))

    def traits(self) -> list[str]:
        (height, width), shape = self.image_size, "x".join(map(str, self.shape))
        return [f"{shape} latents ({height}x{width}x{self.config.channels} images)"]

    def family(self) -> str:
        """One line: of which prior, posterior and likelihood it is."""
        raise NotImplementedError

    def check_images(self, images: Tensor) -> None:
        """Raises UserError unless they are float b c H W of this model's channels and size."""
        expected = (self.config.channels, *self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
            raise UserError(
                f"got images of shape {tuple(images.shape)} and type {images.dtype}, expected floats in [-1, 1] of "
                f"(batch, {', '.join(map(str, expected))}): a VAE knows one size; resize or crop them"
            )


def terms_of_one_group(
    posterior: Posterior,
    prior: LatentPrior,
    log_likelihood: Callable[[Tensor], Tensor],
    draws: int,
    noise: Tensor | None,
    move: Move | None,
) -> Terms:
    """The terms of a model whose latents are one group, of one posterior. log_likelihood: log p(x|z) of latents,
    k b *shape -> k b. draws, noise, move: as `LikelihoodVAE.terms` has them."""
    if draws == 0:
        latents = posterior.mean.unsqueeze(0)
        log_posterior = posterior.log_density(latents)
    else:
        latents, log_posterior = posterior.draw(posterior.noise(draws) if noise is None else noise)
    if move is not None:

        def log_joint(moved: Tensor) -> Tensor:
            return log_likelihood(moved) + prior.log_density(moved).sum(-1)

        latents, log_posterior = move(latents, log_posterior, log_joint)
    return Terms(
        latents=(latents,),
        log_likelihood=log_likelihood(latents),
        log_prior=(prior.log_density(latents),),
        log_posterior=(log_posterior,),
        exact_kl=(prior.kl(posterior) if move is None else None,),
        posteriors=(posterior,),
        priors=(prior,),
    )
