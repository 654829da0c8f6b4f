"""Decoders: p(x|z) of images given latents, a network and a likelihood together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stage1_vae.likelihoods import Likelihood
from stage1_vae.networks import DecoderConfig, build_decoder_network
from stage1_vae.networks.pixelcnn import PixelCNNDecoderConfig, PixelCNNNetwork
from stage1_vae.posteriors.base import LatentShape


class Decoder(nn.Module):
    """p(x|z)."""

    discrete: bool  # whether it is a probability of images whose pixels have finitely many values, not a density

    def log_likelihood(self, latents: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) in nats: latents k b *shape, images b c H W in [-1, 1] -> k b."""
        raise NotImplementedError

    def mean(self, latents: Tensor) -> Tensor:
        """n *shape -> n c H W in [-1, 1]: the mean of p(x|z), or, where that has no closed form, one draw."""
        raise NotImplementedError

    def mode(self, latents: Tensor) -> Tensor:
        """Likewise: the most likely image, or, where it is not known, each pixel's most likely value in turn."""
        raise NotImplementedError

    def sample(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Likewise: a draw of p(x|z)."""
        raise NotImplementedError


class FactorisedDecoder(Decoder):
    """Pixels are independent given z: a network says their likelihood."""

    def __init__(self, network: nn.Module, likelihood: Likelihood) -> None:
        """network: n *shape -> n o H W, o = likelihood.outputs."""
        super().__init__()
        self.network, self.likelihood = network, likelihood
        self.discrete = likelihood.discrete

    def outputs(self, latents: Tensor) -> Tensor:
        """n *shape -> n o H W, float32."""
        return self.network(latents).float()

    def log_likelihood(self, latents: Tensor, images: Tensor) -> Tensor:
        outputs = self.outputs(latents.flatten(0, 1))
        return self.likelihood.log_prob(outputs.unflatten(0, latents.shape[:2]), images)

    def mean(self, latents: Tensor) -> Tensor:
        return self.likelihood.mean(self.outputs(latents))

    def mode(self, latents: Tensor) -> Tensor:
        return self.likelihood.mode(self.outputs(latents))

    def sample(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.likelihood.sample(self.outputs(latents), generator)


class PixelCNNDecoder(Decoder):
    """Each pixel given the latents and the pixels before it, whose likelihood a PixelCNN says. Channels of one pixel
    are as the likelihood has them: independent, or, of a mixture of logistics, each given those before it."""

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


def build_decoder(
    config: DecoderConfig, likelihood: Likelihood, shape: LatentShape, image_size: tuple[int, int]
) -> Decoder:
    """shape: of latents; image_size: (H, W)."""
    if isinstance(config, PixelCNNDecoderConfig):
        return PixelCNNDecoder(config, likelihood, shape, image_size)
    return FactorisedDecoder(build_decoder_network(config, shape, (likelihood.outputs, *image_size)), likelihood)
