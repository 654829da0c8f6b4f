"""A PixelCNN as the decoder: strong enough to do without z, with which posteriors collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from stage1_vae.decoders.base import Decoder
from stage1_vae.likelihoods import Likelihood
from stage1_vae.networks import build_decoder_network
from stage1_vae.networks.pixelcnn import PixelCNNDecoderConfig, PixelCNNNetwork
from stage1_vae.posteriors.base import LatentShape


class PixelCNNDecoder(Decoder):
    """Each pixel given the latents and the pixels before it, whose likelihood a PixelCNN says. Channels of one pixel
    are as the likelihood has them: independent, or, of a mixture of logistics, each given those before it."""

    mean_is_drawn = True

    def __init__(
        self, config: PixelCNNDecoderConfig, likelihood: Likelihood, shape: LatentShape, image_size: tuple[int, int]
    ) -> None:
        """shape: of latents; image_size: (H, W)."""
        super().__init__()
        self.likelihood = likelihood
        self.discrete = likelihood.discrete
        self.network = build_decoder_network(config.network, shape, (config.features, *image_size))
        self.pixels = PixelCNNNetwork(config, likelihood.channels, likelihood.outputs)

    def outputs(self, latents: Tensor, images: Tensor) -> Tensor:
        """n *shape and n c H W -> n o H W, float32, of all pixels in one pass."""
        return self.pixels(images, self.network(latents)).float()

    def log_likelihood(self, latents: Tensor, images: Tensor) -> Tensor:
        repeated = images.expand(len(latents), *images.shape).flatten(0, 1)
        outputs = self.outputs(latents.flatten(0, 1), repeated)
        return self.likelihood.log_prob(outputs.unflatten(0, latents.shape[:2]), images)

    def mean(self, latents: Tensor) -> Tensor:
        """One draw: the mean has no closed form."""
        return self.sample(latents)

    def mode(self, latents: Tensor) -> Tensor:
        """The most likely value of each pixel given those before it."""
        return self.pixels.generate(self.network(latents), self.likelihood.mode)

    def sample(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.pixels.generate(self.network(latents), lambda outputs: self.likelihood.sample(outputs, generator))
