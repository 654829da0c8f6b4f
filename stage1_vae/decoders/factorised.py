"""The decoder of the VAE: a network says the likelihood of each pixel, and these are independent given z."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.model_io import in_type_of
from stage1_vae.decoders.base import Decoder
from stage1_vae.likelihoods import Likelihood


class FactorisedDecoder(Decoder):
    """Pixels are independent given z: a network says their likelihood."""

    def __init__(self, network: nn.Module, likelihood: Likelihood) -> None:
        """network: n *shape -> n o H W, o = likelihood.outputs."""
        super().__init__()
        self.network, self.likelihood = network, likelihood
        self.discrete = likelihood.discrete

    def outputs(self, latents: Tensor) -> Tensor:
        """n *shape -> n o H W, of the type that the network computes in, which likelihoods take to float32."""
        result: Tensor = self.network(in_type_of(self.network, latents))
        return result

    def log_likelihood(self, latents: Tensor, images: Tensor, seen: Tensor | None = None) -> Tensor:
        """seen: b 1 H W bool, the pixels that count; None: all."""
        outputs = self.outputs(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        if seen is None:
            return self.likelihood.log_prob(outputs, images)
        return self.likelihood.log_prob(outputs, images, seen)

    def mean(self, latents: Tensor) -> Tensor:
        return self.likelihood.mean(self.outputs(latents))

    def mode(self, latents: Tensor) -> Tensor:
        return self.likelihood.mode(self.outputs(latents))

    def sample(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.likelihood.sample(self.outputs(latents), generator)
