"""A mixture of Gaussians over latents, fitted after the VAE, as Ghosh et al. 2020 do, "From Variational to
Deterministic Autoencoders" (arXiv:1903.12436)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from codes.latents import LatentSpec
from common.errors import UserError, check_fields
from common.expectation_maximisation import Covariance, Mixture, fit_mixture
from stage2_prior.latents.base import LatentPriorModel


@dataclass(frozen=True, kw_only=True)
class GaussianMixtureConfig:
    """p(z) = sum_k weight_k N(mean_k, covariance_k): expectation maximisation on the training images' latents before
    the first step, and gradient steps after it, which see other draws of the latents each time."""

    kind: Literal["gaussian_mixture"] = "gaussian_mixture"
    components: int = 10  # K
    covariance: Covariance = "full"  # of each component: a matrix of its own, or variances alone
    iterations: int = 100  # of expectation maximisation; 0: gradient steps alone
    smallest_scale: float = 0.01  # of a component, for a number whose scale over all images is 1

    def __post_init__(self) -> None:
        check_fields(
            self,
            (
                ("components", self.components >= 1, "at least 1"),
                ("iterations", self.iterations >= 0, "0 or more"),
                ("smallest_scale", self.smallest_scale > 0, "above 0"),
            ),
        )


class GaussianMixture(LatentPriorModel):
    kind = "gaussian_mixture"
    config_class = GaussianMixtureConfig
    config: GaussianMixtureConfig

    def __init__(self, config: GaussianMixtureConfig, latent_spec: LatentSpec, *facts: Any) -> None:
        super().__init__(config, latent_spec, *facts)
        components, size = config.components, latent_spec.size
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, size))
        self.log_scales = nn.Parameter(torch.zeros(components, size))
        if config.covariance == "full":
            self.lower = nn.Parameter(torch.zeros(components, size, size))  # what is below the diagonal counts

    def mixture(self) -> Mixture:
        """Of vectors z."""
        scales = self.log_scales.exp().clamp(min=self.config.smallest_scale)
        factors = self.lower.tril(-1) + torch.diag_embed(scales) if self.config.covariance == "full" else scales
        return Mixture(self.logits.log_softmax(0), self.means, factors)

    def log_density_of_standard(self, z: Tensor) -> Tensor:
        return self.mixture().log_densities(z).logsumexp(1)

    @torch.no_grad()
    def sample_standard(self, count: int, generator: torch.Generator | None) -> Tensor:
        weights, means, factors = self.mixture()
        which = torch.multinomial(weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, means.shape[1], device=means.device, generator=generator)
        own = factors[which]
        return means[which] + (own * noise if own.ndim == 2 else (own @ noise[..., None]).squeeze(2))

    @torch.no_grad()
    def start_from_standard(self, z: Tensor) -> None:
        if len(z) < self.config.components:
            raise UserError(
                f"model.components={self.config.components} for {len(z)} training images, expected at most as many; "
                "give fewer components"
            )
        if not self.config.iterations:
            self.means.copy_(fit_mixture(z, self.config.components, "diagonal", 0, 1.0)[0].means)
            return
        config = self.config
        mixture, _ = fit_mixture(z, config.components, config.covariance, config.iterations, config.smallest_scale)
        self.logits.copy_(mixture.log_weights)
        self.means.copy_(mixture.means)
        if config.covariance == "full":
            self.lower.copy_(mixture.factors.tril(-1))
            self.log_scales.copy_(mixture.factors.diagonal(dim1=1, dim2=2).log())
        else:
            self.log_scales.copy_(mixture.factors.log())
