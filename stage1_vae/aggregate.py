"""The posterior of all images together, q(z) = 1/n sum_j q(z|x_j), and what the KL term of the ELBO is made of:

    mean KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z))         Hoffman and Johnson 2016, "ELBO surgery"
    KL(q(z) || p(z)) = TC + sum_d KL(q(z_d) || p(z_d))           Chen et al. 2018 (arXiv:1802.04942, equation 2)
    TC = KL(q(z) || prod_d q(z_d)), the total correlation        where p(z) is of independent numbers

q(z) is the exact mixture over the n images that are judged, not an estimate from minibatches, and each expectation is a
mean over one draw of each image.

Bias: these are figures of n images, exact but for the draws. As estimates for all images there are, I(x; z) is too
low, and no more than log n; KL(q(z) || p(z)) is too high by as much. The more n, the less. For TC and the KL of
dimensions no sign is known; a mixture of too few images is too rugged, which makes both too large where z is of many
numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_vae.evaluation import ImageFigures, Mean, mean_of
from stage1_vae.posteriors.base import LatentShape, Posterior
from stage1_vae.priors.base import LatentPrior

PAIRS = 2**31  # densities of single numbers, of draws times images times numbers, to which the draws are limited
AT_ONCE = 2**22  # of them


class AggregateFigures(NamedTuple):
    """In nats. Errors of draws and of images are one here, as there is one draw of each image."""

    mutual_information: Mean  # I(x; z)
    aggregate_kl: Mean  # KL(q(z) || p(z))
    total_correlation: Mean | None  # None where the marginals of q(z|x) are not known
    dimension_kl: tuple[float, ...] | None  # KL(q(z_d) || p(z_d)); None where the marginals of p(z) are not either
    draws: int  # of the images' first draws, how many were looked at
    images: int  # n


class Aggregate:
    """Densities under q(z) of one draw of each image, posterior after posterior."""

    def __init__(self, figures: ImageFigures, prior: LatentPrior, shape: LatentShape) -> None:
        """figures: of all n images that are judged; the posteriors of exactly these are to be added."""
        self.images = len(figures.log_p)
        numbers = math.prod(shape)
        count = max(1, min(self.images, PAIRS // (self.images * numbers)))
        self.chosen = torch.arange(count) * self.images // count
        self.latents = figures.first_latents[0][self.chosen]  # m *shape
        self.log_prior = figures.first_log_prior[self.chosen]
        self.log_posterior = figures.first_log_posterior[self.chosen]
        self.prior = prior
        self.numbers = numbers
        self.log_q = torch.full((count,), -math.inf, dtype=torch.float64)
        self.log_marginals: Tensor | None = torch.full((count, numbers), -math.inf, dtype=torch.float64)
        self.added, self.device = 0, self.latents.device

    @torch.inference_mode()
    def add(self, posterior: Posterior) -> None:
        """Posteriors of some images, each once."""
        mean = posterior.mean
        images, device = len(mean), mean.device
        self.device = device
        chunk = max(1, AT_ONCE // (images * self.numbers))
        for start in range(0, len(self.latents), chunk):
            part = slice(start, start + chunk)
            latents = self.latents[part].to(device).unsqueeze(1).expand(-1, *mean.shape)  # k b *shape
            density = posterior.log_density(latents).sum(-1).logsumexp(dim=1)  # k
            self.log_q[part] = torch.logaddexp(self.log_q[part], density.double().cpu())
            marginals = posterior.log_marginals(latents)
            if marginals is None or self.log_marginals is None:
                self.log_marginals = None
                continue
            summed = marginals.logsumexp(dim=1).double().cpu()  # k d
            self.log_marginals[part] = torch.logaddexp(self.log_marginals[part], summed)
        self.added += images

    @torch.inference_mode()
    def figures(self) -> AggregateFigures:
        assert self.added == self.images, "q(z) is the mixture of all images that are judged"
        log_q = self.log_q - math.log(self.images)
        correlation = of_dimensions = None
        if self.log_marginals is not None:
            log_marginals = self.log_marginals - math.log(self.images)  # m d
            correlation = mean_of(log_q - log_marginals.sum(-1))
            if (of_prior := self.prior.log_marginals(self.latents.unsqueeze(1).to(self.device))) is not None:
                of_dimensions = tuple((log_marginals - of_prior[:, 0].double().cpu()).mean(0).tolist())
        return AggregateFigures(
            mutual_information=mean_of(self.log_posterior - log_q),
            aggregate_kl=mean_of(log_q - self.log_prior),
            total_correlation=correlation,
            dimension_kl=of_dimensions,
            draws=len(self.latents),
            images=self.images,
        )
