"""Deep latent Gaussian model of Rezende, Mohamed and Wierstra 2014, "Stochastic Backpropagation and Approximate
Inference in Deep Generative Models" (arXiv:1401.4082): independent latents at every layer, added to what comes from
above.

    z_l ~ N(0, I),  h_L = G_L z_L,  h_l = T_l(h_{l+1}) + G_l z_l,  x ~ p(x | T_0(h_1))        z_1 next to the image

Inference is by one path up, without noise: d_l of d_{l-1}, and of it the posterior of z_l, which knows no other's:

    diagonal   N(m_l, s_l^2)
    rank_one   C^-1 = diag(1 / s_l^2) + u_l u_l^T, which the paper has beside it
    product    the prior N(0, I) times N(m_l, s_l^2): a ladder (see `markov`) over independent priors
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from common.errors import UserError
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.base import Choose, Group, HierarchicalVAE, Normal, product
from stage1_vae.hierarchies.dense import check_levels, hidden_layers
from stage1_vae.likelihoods import BernoulliConfig, LikelihoodConfig
from stage1_vae.likelihoods.base import at_least_float
from stage1_vae.networks.dense import Activation
from stage1_vae.posteriors import DiagonalGaussian, Posterior
from stage1_vae.posteriors.rank_one import RankOne

DESCRIBED_BY = {"diagonal": 2, "rank_one": 3, "product": 2}  # and how many numbers describe one of the latents


@dataclass(frozen=True, kw_only=True)
class DeepLatentGaussianConfig:
    """Layers of latents from the image up, as the paper counts them; groups are counted from the top."""

    kind: Literal["deep_latent_gaussian"] = "deep_latent_gaussian"
    channels: int = 1  # c of the images: 3 for colour, 1 for grey
    latents: tuple[int, ...] = (50, 20)  # numbers of each layer
    hidden: tuple[int, ...] = (200, 100)  # numbers of h_l, and units of T_l's hidden layers and of the path up
    hidden_layers: int = 1  # of each T_l, and on the path up to each layer of latents
    posterior: Literal["diagonal", "rank_one", "product"] = "diagonal"
    activation: Activation = "relu"
    likelihood: LikelihoodConfig = field(default_factory=BernoulliConfig)

    def __post_init__(self) -> None:
        check_levels(self)
        if self.posterior not in DESCRIBED_BY:
            raise UserError(f"model.posterior={self.posterior!r}, expected {', '.join(DESCRIBED_BY)}")


class DeepLatentGaussian(HierarchicalVAE):
    """Lists of layers go from the image up, those of groups from the top down."""

    kind = "deep_latent_gaussian"
    config_class = DeepLatentGaussianConfig
    config: DeepLatentGaussianConfig

    def __init__(
        self, config: DeepLatentGaussianConfig, image_size: tuple[int, int], binarised: Binarised | None = None
    ) -> None:
        super().__init__(config, image_size, binarised)
        latents, hidden = config.latents, config.hidden
        self.group_shapes = tuple((numbers,) for numbers in reversed(latents))
        self.output_shape = (self.likelihood.outputs, *image_size)
        layers = partial(hidden_layers, layers=config.hidden_layers, activation=config.activation)
        read = [config.channels * math.prod(image_size), *hidden]
        self.up = nn.ModuleList(layers(inputs, units) for inputs, units in zip(read, hidden, strict=False))
        described = DESCRIBED_BY[config.posterior]
        self.recognition = nn.ModuleList(
            nn.Linear(units, described * numbers) for units, numbers in zip(hidden, latents, strict=True)
        )
        self.injections = nn.ModuleList(
            nn.Linear(numbers, units, bias=False) for numbers, units in zip(latents, hidden, strict=True)
        )  # G_l
        self.transitions = nn.ModuleList(layers(above, units) for units, above in pairwise(hidden))  # T_l, l from 1
        self.output = nn.Sequential(
            layers(hidden[0], hidden[0]), nn.Linear(hidden[0], math.prod(self.output_shape))
        )  # T_0

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """What describes the posterior of each layer."""
        seen = (images.flatten(1) + 1) / 2
        found = []
        for up, recognition in zip(self.up, self.recognition, strict=True):
            seen = up(seen)
            found.append(at_least_float(recognition(seen)))
        return found

    def infer(self, features: Sequence[Tensor], noise: Sequence[Tensor] | None) -> tuple[list[Group], Tensor]:
        groups = []
        for place, described in enumerate(reversed(features)):
            posterior = self.posterior(described)
            latents = posterior.mean if noise is None else posterior.draw(noise[place].unsqueeze(0)).latents[0]
            kl, log_posterior = posterior.kl_to_standard_normal(), posterior.log_density(latents.unsqueeze(0))[0]
            groups.append(Group(latents, Normal.standard(latents).log_density(latents), log_posterior, kl))
        return groups, self.image_of([group.latents for group in groups])

    def posterior(self, described: Tensor) -> Posterior:
        """Of one layer, of what describes it, n m."""
        mean, raw, *direction = described.chunk(DESCRIBED_BY[self.config.posterior], dim=1)
        if direction:
            return RankOne(mean, 0.5 * raw, direction[0])
        if self.config.posterior == "product":
            return DiagonalGaussian(*product(Normal(mean, 0.5 * raw), Normal.standard(mean)))
        return DiagonalGaussian(mean, 0.5 * raw)

    def image_of(self, groups: Sequence[Tensor]) -> Tensor:
        """Latents, the top layer's first, -> n o H W"""
        hidden = self.injections[-1](groups[0])
        for layer in reversed(range(len(self.transitions))):
            hidden = self.transitions[layer](hidden) + self.injections[layer](groups[len(self.transitions) - layer])
        return self.output(hidden).unflatten(1, self.output_shape)

    def generate(self, count: int, choose: Choose) -> Tensor:
        like = next(self.injections.parameters())
        zeros = [like.new_zeros(count, *shape) for shape in self.group_shapes]
        return self.image_of([choose(place, Normal.standard(group)) for place, group in enumerate(zeros)])

    def inference_parameters(self) -> list[nn.Parameter]:
        return [*self.up.parameters(), *self.recognition.parameters()]

    def family(self) -> str:
        numbers = "-".join(map(str, self.config.latents))
        return (
            f"{numbers} independent latents from the image up, {self.config.posterior} posterior, "
            f"{self.config.likelihood.kind} likelihood"
        )
