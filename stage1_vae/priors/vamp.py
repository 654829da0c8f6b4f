"""VampPrior of Tomczak and Welling 2018, "VAE with a VampPrior" (arXiv:1705.07120): a mixture of the posteriors of
images that are learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import check_fields
from stage1_vae.posteriors.base import LatentShape, Posterior
from stage1_vae.priors.base import LatentPrior

NOISE_OF_COPIES = 0.01  # of white: tells components apart that start from one image


@dataclass(frozen=True, kw_only=True)
class VampPriorConfig:
    """p(z) = 1/K sum_k q(z|u_k), of K pseudo-inputs u_k, which are trained with the model."""

    kind: Literal["vamp"] = "vamp"
    components: int = 500  # K
    start: Literal["training_images", "random"] = "training_images"  # of the pseudo-inputs; random: uniform noise

    def __post_init__(self) -> None:
        check_fields(self, (("components", self.components >= 1, "at least 1"),))


class VampPrior(LatentPrior):
    """`bind` gives it the model's images and posterior. KL is estimated from draws."""

    config: VampPriorConfig
    pseudo_inputs: nn.Parameter  # K c H W, taken for the nearest images in [-1, 1]

    def __init__(self, config: VampPriorConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.posterior: Callable[[Tensor], Posterior] | None = None

    def bind(self, image_shape: tuple[int, int, int], posterior: Callable[[Tensor], Posterior]) -> None:
        self.posterior = posterior  # no module: its parameters are the model's, not the prior's too
        self.pseudo_inputs = nn.Parameter(torch.rand(self.config.components, *image_shape) * 2 - 1)

    @property
    def start_images(self) -> int:
        return self.config.components if self.config.start == "training_images" else 0

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        """Sets the pseudo-inputs to these, b c H W, unless they start from noise; missing pixels begin as grey. Where
        there are fewer images than components, some stand for several."""
        if self.config.start == "random":
            return
        chosen = images[torch.arange(self.config.components, device=images.device) % len(images)]
        chosen[len(images) :] += NOISE_OF_COPIES * 2 * torch.randn_like(chosen[len(images) :])
        self.pseudo_inputs.copy_(chosen.nan_to_num(0.0).clamp(-1, 1))

    def components(self, which: Tensor | None = None) -> Posterior:
        """q(z|u_k) of all components, or of some, by their numbers."""
        if self.posterior is None:
            raise RuntimeError("a VampPrior is a part of a VAE, which binds it to its posterior")
        images = self.pseudo_inputs.clamp(-1, 1)
        return self.posterior(images if which is None else images[which])

    def log_density(self, latents: Tensor) -> Tensor:
        leading = latents.shape[:2]
        against = latents.flatten(0, 1)[:, None].expand(-1, self.config.components, *self.shape)  # (k b) K *shape
        densities = self.components().log_density(against).sum(dim=-1)  # (k b) K
        mixture = densities.logsumexp(dim=1, keepdim=True) - math.log(self.config.components)
        return mixture.unflatten(0, leading)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.pseudo_inputs.device
        which = torch.randint(self.config.components, (count,), device=device, generator=generator)
        component = self.components(which)
        return component.draw(component.noise(1, generator)).latents[0]
