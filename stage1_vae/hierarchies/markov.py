"""Layers of latents of which each depends on the next one alone, with either of two ways of inference.

    p(x, z) = p(z_L) prod_l p(z_l | z_{l+1}) p(x | z_1)                     z_1 next to the image

    bottom_up   q(z|x) = q(z_1|x) prod_l q(z_{l+1} | z_l)                   Burda et al. 2015, "Importance Weighted
                                                                            Autoencoders" (arXiv:1509.00519)
    top_down    q(z|x) = q(z_L|x) prod_l q(z_l | z_{l+1}, x), where         Sønderby et al. 2016, "Ladder Variational
                q(z_l | z_{l+1}, x) ~ p(z_l | z_{l+1}) N(z_l; m_l(x), s_l(x)^2)  Autoencoders" (arXiv:1602.02282)

Bottom-up inference is a chain of draws: what the first layer's noise has covered no layer above can tell, and those
above tend to say nothing. The ladder reads the image on a path without noise, and each layer's posterior is the prior,
as the layer above has it, corrected by what the image says: a product of two Gaussians, whose precisions add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import Tensor, nn

from common.errors import UserError
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.base import Choose, Group, HierarchicalVAE, Normal, product
from stage1_vae.hierarchies.dense import GaussianLayer, Variance, check_levels, hidden_layers
from stage1_vae.likelihoods import BernoulliConfig, LikelihoodConfig
from stage1_vae.networks.dense import Activation


@dataclass(frozen=True, kw_only=True)
class MarkovConfig:
    """Layers of latents from the image up, as the papers count them; groups are counted from the top."""

    kind: Literal["markov"] = "markov"
    channels: int = 1  # c of the images: 3 for colour, 1 for grey
    latents: tuple[int, ...] = (50, 20)  # numbers of each layer
    hidden: tuple[int, ...] = (200, 100)  # units of the hidden layers beneath each layer of latents, on both paths
    hidden_layers: int = 2  # so many on each path
    inference: Literal["bottom_up", "top_down"] = "bottom_up"  # top_down: the ladder
    activation: Activation = "tanh"
    batch_norm: bool = False  # of all hidden layers
    variance: Variance = "exp"  # of the Gaussians: of what a network says, exp(s) or softplus(s)
    likelihood: LikelihoodConfig = field(default_factory=BernoulliConfig)

    def __post_init__(self) -> None:
        check_levels(self)
        for name, allowed in (("inference", ("bottom_up", "top_down")), ("variance", ("exp", "softplus"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name}={getattr(self, name)!r}, expected {' or '.join(allowed)}")


class MarkovHierarchy(HierarchicalVAE):
    """Lists of layers go from the image up, those of groups from the top down."""

    kind = "markov"
    config_class = MarkovConfig
    config: MarkovConfig

    def __init__(self, config: MarkovConfig, image_size: tuple[int, int], binarised: Binarised | None = None) -> None:
        super().__init__(config, image_size, binarised)
        latents, hidden = config.latents, config.hidden
        self.group_shapes = tuple((numbers,) for numbers in reversed(latents))
        self.output_shape = (self.likelihood.outputs, *image_size)
        layers = partial(
            hidden_layers, layers=config.hidden_layers, activation=config.activation, batch_norm=config.batch_norm
        )
        read = [config.channels * math.prod(image_size), *(latents if config.inference == "bottom_up" else hidden)]
        self.up = nn.ModuleList(layers(inputs, units) for inputs, units in zip(read, hidden, strict=False))
        self.recognition = nn.ModuleList(
            GaussianLayer(units, numbers, config.variance) for units, numbers in zip(hidden, latents, strict=True)
        )
        self.down = nn.ModuleList(layers(numbers, units) for numbers, units in zip(latents, hidden, strict=True))
        self.priors = nn.ModuleList(
            GaussianLayer(units, numbers, config.variance) for units, numbers in zip(hidden[1:], latents, strict=False)
        )
        self.output = nn.Linear(hidden[0], math.prod(self.output_shape))

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Mean and log-scale of the Gaussians that the image alone says: of the first layer, q(z_1|x); of a ladder, of
        each layer, N(z_l; m_l(x), s_l(x)^2)."""
        seen = (images.flatten(1) + 1) / 2
        found: list[Tensor] = []
        for up, recognition in zip(self.up, self.recognition, strict=True):
            seen = up(seen)
            found += recognition(seen)
            if self.config.inference == "bottom_up":
                break
        return found

    def infer(self, features: Sequence[Tensor], noise: Sequence[Tensor] | None) -> tuple[list[Group], Tensor]:
        of_layers = [None] * len(self.up) if noise is None else list(reversed(noise))
        if self.config.inference == "bottom_up":
            groups, lowest = self.draw_upwards(Normal(*features), of_layers)
        else:
            seen = [Normal(*features[place : place + 2]) for place in range(0, len(features), 2)]
            groups, lowest = self.draw_downwards(seen, of_layers)
        return groups, self.image_of(lowest)

    def draw_upwards(self, first: Normal, noise: Sequence[Tensor | None]) -> tuple[list[Group], Tensor]:
        """first: q(z_1|x). The groups, and z_1. Only the top layer's KL has a closed form given the draws below it; of
        the others, z_{l+1} depends on z_l."""
        posteriors, latents = [first], [drawn(first, noise[0])]
        for up, recognition, own in zip(self.up[1:], self.recognition[1:], noise[1:], strict=True):
            posteriors.append(recognition(up(latents[-1])))
            latents.append(drawn(posteriors[-1], own))
        top, top_prior = posteriors[-1], Normal.standard(latents[-1])
        groups = [Group.of(latents[-1], top, top_prior)]
        for layer in reversed(range(len(latents) - 1)):
            prior = self.prior_given(layer, latents[layer + 1])
            of_draws = prior.log_density(latents[layer]), posteriors[layer].log_density(latents[layer])
            groups.append(Group(latents[layer], *of_draws, kl=None))
        return groups, latents[0]

    def draw_downwards(self, seen: Sequence[Normal], noise: Sequence[Tensor | None]) -> tuple[list[Group], Tensor]:
        """seen: what the image says of each layer. The groups, and z_1."""
        posterior, prior = seen[-1], Normal.standard(seen[-1].mean)
        groups: list[Group] = []
        for layer in reversed(range(len(seen))):
            if groups:
                prior = self.prior_given(layer, groups[-1].latents)
                posterior = product(seen[layer], prior)
            groups.append(Group.of(drawn(posterior, noise[layer]), posterior, prior))
        return groups, groups[-1].latents

    def prior_given(self, layer: int, above: Tensor) -> Normal:
        """p(z_l | z_{l+1})"""
        prior: Normal = self.priors[layer](self.down[layer + 1](above))
        return prior

    def image_of(self, lowest: Tensor) -> Tensor:
        """z_1 -> n o H W"""
        return self.output(self.down[0](lowest)).unflatten(1, self.output_shape)

    def generate(self, count: int, choose: Choose) -> Tensor:
        top = self.output.weight.new_zeros(count, self.config.latents[-1])
        latents = choose(0, Normal.standard(top))
        for place in range(1, len(self.group_shapes)):
            latents = choose(place, self.prior_given(len(self.group_shapes) - 1 - place, latents))
        return self.image_of(latents)

    def inference_parameters(self) -> list[nn.Parameter]:
        return [*self.up.parameters(), *self.recognition.parameters()]

    def family(self) -> str:
        way = "bottom-up" if self.config.inference == "bottom_up" else "top-down"
        numbers = "-".join(map(str, self.config.latents))
        return f"{numbers} latents from the image up, {way} inference, {self.config.likelihood.kind} likelihood"


def drawn(posterior: Normal, noise: Tensor | None) -> Tensor:
    return posterior.mean if noise is None else posterior.draw(noise)
