"""What every hierarchy is: groups of latents z_1 ... z_L, the top one first, and an image below them.

    p(x, z) = p(z_1) prod_l p(z_l | z_1 ... z_{l-1}) p(x | z)
    q(z|x) = prod_l q(z_l | x, other groups), in whatever order the system draws them

A system says its distributions by two passes: `infer` draws the groups given an image and gives what their KL terms are
made of, `generate` goes from the top down and asks at each group which latents to take. Everything that is asked of a
`LikelihoodVAE` follows from the two.

All distributions of groups are diagonal Gaussians given other groups, unless a system says otherwise. Outside this
package the latents of an image are one vector, of all groups one after another; its noise likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from stage1_vae.binarise import Binarised
from stage1_vae.likelihoods import LIKELIHOODS, build_likelihood
from stage1_vae.likelihoods.base import at_least_float
from stage1_vae.model import LikelihoodVAE, Move, NoiseSource, Pixels
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors.base import LatentShape
from stage1_vae.posteriors.diagonal import HALF_LOG_TWO_PI


class Normal(NamedTuple):
    """A Gaussian of independent numbers: mean and log of the standard deviation, n *shape each."""

    mean: Tensor
    log_scale: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_scale.exp() * noise

    @classmethod
    def standard(cls, like: Tensor) -> Normal:
        """N(0, I) of as many numbers, n *shape."""
        zeros = torch.zeros_like(like)
        return cls(zeros, zeros)

    def log_density(self, latents: Tensor) -> Tensor:
        """n *shape -> n d, of each number, in nats."""
        noise = (latents - self.mean) * (-self.log_scale).exp()
        return (-0.5 * noise.square() - HALF_LOG_TWO_PI - self.log_scale).flatten(1)

    def at_temperature(self, temperature: float) -> Normal:
        """Its standard deviation times a temperature of 0 or more."""
        shift = math.log(temperature) if temperature > 0 else -math.inf
        return Normal(self.mean, self.log_scale + shift)


def normal_kl(posterior: Normal, prior: Normal) -> Tensor:
    """KL(posterior || prior) of each number, n d, in nats: with d = mu_q - mu_p,
    log s_p - log s_q + (s_q^2 + d^2) / (2 s_p^2) - 1/2."""
    difference = (posterior.mean - prior.mean) * (-prior.log_scale).exp()
    log_ratio = posterior.log_scale - prior.log_scale
    return (0.5 * ((2 * log_ratio).exp() + difference.square() - 1) - log_ratio).flatten(1)


def product(first: Normal, second: Normal) -> Normal:
    """The Gaussian whose density is proportional to the product of two: precisions, 1 / s^2, add up, and each mean
    counts by its share of the sum."""
    share = torch.sigmoid(2 * (second.log_scale - first.log_scale))  # of the first's precision
    log_scale = first.log_scale + 0.5 * F.logsigmoid(2 * (second.log_scale - first.log_scale))
    return Normal(second.mean + share * (first.mean - second.mean), log_scale)


class Group(NamedTuple):
    """What one image's pass says of a group, for n draws of images."""

    latents: Tensor  # n *shape
    log_prior: Tensor  # n m: log p(z_l | z_above) as m terms that add up
    log_posterior: Tensor  # n m: log q(z_l | x, other groups), likewise
    kl: Tensor | None  # n m: KL(q || p) in closed form given the draws of the other groups; None: there is none

    @classmethod
    def of(cls, latents: Tensor, posterior: Normal, prior: Normal) -> Group:
        return cls(latents, prior.log_density(latents), posterior.log_density(latents), normal_kl(posterior, prior))


Choose = Callable[[int, Normal], Tensor]
"""The latents of group l, n *shape, given p(z_l | z_above)."""


class HierarchicalVAE(LikelihoodVAE):
    """Images <-> latents of several groups, the top one first.

    A subclass has a `config_class`, sets `group_shapes` and `likelihood` (by `build_likelihood`), and says `features`,
    `infer`, `generate` and `inference_parameters`.
    """

    config_class: type
    group_shapes: tuple[LatentShape, ...]

    def __init__(self, config: Any, image_size: tuple[int, int], binarised: Binarised | None = None) -> None:
        super().__init__()
        self.config, self.image_size, self.binarised = config, image_size, binarised
        self.likelihood = build_likelihood(config.likelihood, config.channels)
        self.discrete = self.likelihood.discrete

    # ---- what a system says ----

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """What is computed of images, b c H W in [-1, 1], once for all draws of their latents: tensors b ..."""
        raise NotImplementedError

    def infer(self, features: Sequence[Tensor], noise: Sequence[Tensor] | None) -> tuple[list[Group], Tensor]:
        """The groups, the top one first, and what the likelihood is told, n o H W. features: of n images. noise: of
        each group, n *shape; None: each group takes its posterior's mean."""
        raise NotImplementedError

    def generate(self, count: int, choose: Choose) -> Tensor:
        """From the top down: what the likelihood is told, count o H W."""
        raise NotImplementedError

    def inference_parameters(self) -> list[nn.Parameter]:
        """Weights of q(z|x) alone."""
        raise NotImplementedError

    # ---- what follows ----

    @property
    def shape(self) -> LatentShape:  # type: ignore[override]
        return (sum(self.sizes),)

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.group_shapes]

    def split(self, flat: Tensor) -> list[Tensor]:
        """n N, or any leading axes, -> of each group, ... *shape."""
        parts = flat.split(self.sizes, dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.group_shapes, strict=True)]

    def joined(self, groups: Sequence[Tensor]) -> Tensor:
        """n *shape of each group -> n N."""
        return torch.cat([group.flatten(1) for group in groups], dim=1)

    def terms(self, images: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None) -> Terms:
        assert move is None, "objectives that move latents are refused before"
        self.check_images(images)
        count = max(draws, 1) if noise is None else len(noise)
        if noise is None and draws > 0:
            noise = self.noise_source(images[:1]).noise(draws * len(images)).view(draws, len(images), -1)
        features = [
            tensor.expand(count, *tensor.shape).flatten(0, 1) if count > 1 else tensor
            for tensor in self.features(images)
        ]
        groups, outputs = self.infer(features, None if noise is None else self.split(noise.flatten(0, 1)))

        def by_draw(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (count, len(images)))

        return Terms(
            latents=tuple(by_draw(group.latents) for group in groups),
            log_likelihood=self.likelihood.log_prob(by_draw(outputs), images),
            log_prior=tuple(by_draw(group.log_prior) for group in groups),
            log_posterior=tuple(by_draw(group.log_posterior) for group in groups),
            exact_kl=tuple(None if group.kl is None else by_draw(group.kl) for group in groups),
        )

    def noise_source(self, image: Tensor) -> NoiseSource:
        return StandardNormalNoise(self.shape[0], image.device)

    def generator_parameters(self) -> list[nn.Parameter]:
        inference = {id(weight) for weight in self.inference_parameters()}
        return [weight for weight in self.parameters() if id(weight) not in inference]

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat(self.group_means(images), dim=1)

    def group_means(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(group.flatten(1) for group in self.posterior_latents(images))

    def posterior_latents(self, images: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """Of each group, b *shape: b c H W in [-1, 1], and noise, b N, of one draw; None: the means, each given those
        of the other groups."""
        self.check_images(images)
        groups, _ = self.infer(self.features(images), None if noise is None else self.split(noise))
        return [group.latents for group in groups]

    def pixels(self, latents: Tensor, shown: Pixels, generator: torch.Generator | None = None) -> Tensor:
        groups = self.split(latents)
        return self.shown(self.generate(len(latents), lambda place, _: groups[place]), shown, generator)

    def shown(self, outputs: Tensor, shown: Pixels, generator: torch.Generator | None = None) -> Tensor:
        """n o H W -> n c H W in [-1, 1]"""
        if shown == "sample":
            return self.likelihood.sample(outputs, generator).clamp(-1, 1)
        return (self.likelihood.mean(outputs) if shown == "mean" else self.likelihood.mode(outputs)).clamp(-1, 1)

    def draw_latents(
        self,
        count: int,
        generator: torch.Generator | None = None,
        *,
        temperatures: float | Sequence[float] = 1.0,
        known: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """count N, drawn from p(z) from the top down. temperatures, known: as `draw` has them."""
        device = next(self.parameters()).device
        noise = torch.randn(count, *self.shape, device=device, generator=generator)
        return self.draw(noise, temperatures=temperatures, known=known)[0]

    def draw(
        self, noise: Tensor, *, temperatures: float | Sequence[float] = 1.0, known: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor, Tensor]:
        """Latents, n N, as p(z) gives them by noise, n N, from the top down, and what the likelihood is told of them, n
        o H W. temperatures: by which standard deviations are multiplied, of all groups or of each; 0 takes the mean.
        known: latents that groups take instead, n *shape, of the top groups or, with None between, of any. Raises
        UserError."""
        of_group, drawn = self.temperatures(temperatures), self.split(noise)
        taken: list[Tensor] = []

        def choose(place: int, prior: Normal) -> Tensor:
            given = known[place] if place < len(known) else None
            if given is None:  # in float32 whatever the networks compute in, as latents are
                told = Normal(at_least_float(prior.mean), at_least_float(prior.log_scale))
                given = told.at_temperature(of_group[place]).draw(drawn[place])
            taken.append(given)
            return taken[-1]

        outputs = self.generate(len(noise), choose)
        return self.joined(taken), outputs

    def temperatures(self, given: float | Sequence[float]) -> list[float]:
        """Of each group, by one number for all or one for each. Raises UserError."""
        groups = len(self.group_shapes)
        found = [float(given)] * groups if isinstance(given, float | int) else [float(one) for one in given]
        if len(found) != groups or not all(0 <= one < math.inf for one in found):
            raise UserError(
                f"temperatures={given}, expected one of 0 or more for all, or one for each of the {groups} groups of "
                "latents, the top one first; 1 draws as trained"
            )
        return found

    def as_noise(self, latents: Tensor) -> Tensor:
        groups, found = self.split(latents), []

        def choose(place: int, prior: Normal) -> Tensor:
            found.append((groups[place] - prior.mean) * (-prior.log_scale).exp())
            return groups[place]

        self.generate(len(latents), choose)
        return self.joined(found)

    def from_noise(self, noise: Tensor) -> Tensor:
        groups, drawn = self.split(noise), []

        def choose(place: int, prior: Normal) -> Tensor:
            drawn.append(prior.draw(groups[place]))
            return drawn[-1]

        self.generate(len(noise), choose)
        return self.joined(drawn)

    def arguments(self) -> dict[str, Any]:
        binarised = None if self.binarised is None else asdict(self.binarised)
        return {"config": asdict(self.config), "image_size": list(self.image_size), "binarised": binarised}

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config, (height, width) = dict(arguments["config"]), arguments["image_size"]
        config["likelihood"] = LIKELIHOODS[config["likelihood"]["kind"]][1](**config["likelihood"])
        binarised = arguments["binarised"]
        return cls(cls.config_class(**config), (height, width), None if binarised is None else Binarised(**binarised))

    def family(self) -> str:
        return (
            f"{self.config.kind}, {len(self.group_shapes)} groups of latents, {self.config.likelihood.kind} likelihood"
        )

    def traits(self) -> list[str]:
        (height, width), groups = self.image_size, len(self.group_shapes)
        return [f"{sum(self.sizes)} latents in {groups} groups ({height}x{width}x{self.config.channels} images)"]


class StandardNormalNoise(NamedTuple):
    """Of all groups of one image."""

    numbers: int
    device: torch.device

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(count, 1, self.numbers, device=self.device, generator=generator)
