"""Small VAEs of every kind that lossless files can be made with."""

from __future__ import annotations

import torch

from stage1_vae.decoders import InterleavedConfig
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.likelihoods import BernoulliConfig, LogisticMixtureConfig
from stage1_vae.networks import ConvolutionalConfig, DenseConfig
from stage1_vae.posteriors import DiagonalGaussianConfig
from stage1_vae.vae import VAE, VAEConfig

SIZE = (8, 6)
MIXTURE = LogisticMixtureConfig(components=3)
DENSE = DenseConfig(hidden=(9, 7))
CONVOLUTIONAL = ConvolutionalConfig(widths=(4, 5))
MAP = ConvolutionalConfig(widths=(4, 5), map=True)
SOFTPLUS = DiagonalGaussianConfig(scale="softplus", smallest_scale=0.01)
CONFIGS = {
    "dense_bernoulli": VAEConfig(latents=3, encoder=DENSE, decoder=DENSE, likelihood=BernoulliConfig()),
    "dense_skip": VAEConfig(
        latents=3,
        encoder=DenseConfig(hidden=(9,), activation="softplus"),
        posterior=SOFTPLUS,
        decoder=DenseConfig(hidden=(9, 8), activation="tanh", skip=True),
        likelihood=MIXTURE,
    ),
    "linear_colour": VAEConfig(
        channels=3,
        latents=2,
        encoder=DenseConfig(hidden=()),
        decoder=DenseConfig(hidden=(), activation="elu"),
        likelihood=MIXTURE,
    ),
    "convolutional": VAEConfig(latents=3, encoder=CONVOLUTIONAL, decoder=CONVOLUTIONAL, likelihood=MIXTURE),
    "map_colour": VAEConfig(channels=3, latents=2, encoder=MAP, posterior=SOFTPLUS, decoder=MAP, likelihood=MIXTURE),
    "map_skip": VAEConfig(
        latents=1,
        encoder=ConvolutionalConfig(widths=(3, 4, 4), activation="elu", map=True),
        decoder=ConvolutionalConfig(widths=(3, 4, 4), activation="relu", map=True, skip=True),
        likelihood=BernoulliConfig(),
    ),
    "interleaved": VAEConfig(
        latents=3,
        encoder=CONVOLUTIONAL,
        decoder=InterleavedConfig(levels=1, width=4, residual_blocks=1, trunk_widths=(5,), trunk_blocks=1),
        likelihood=MIXTURE,
    ),
    "interleaved_map_colour": VAEConfig(
        channels=3,
        latents=2,
        encoder=ConvolutionalConfig(widths=(3, 4, 4, 4), map=True),
        decoder=InterleavedConfig(
            levels=2, width=4, residual_blocks=2, trunk_widths=(4, 5), activation="elu", map=True
        ),
        likelihood=MIXTURE,
    ),
    "interleaved_bernoulli": VAEConfig(
        latents=3, encoder=DENSE, decoder=InterleavedConfig(levels=1, width=3), likelihood=BernoulliConfig()
    ),
    "convolutional_skip_colour_bernoulli": VAEConfig(
        channels=3,
        latents=2,
        encoder=CONVOLUTIONAL,
        decoder=ConvolutionalConfig(widths=(4, 5), residual_blocks=2, skip=True),
        likelihood=BernoulliConfig(),
    ),
}
VDVAES = {
    "vdvae": VDVAEConfig(
        channels=1,
        width=3,
        widths="4:4,1:6",
        latents=2,
        encoder_layers="8x1,8d2,4x1,4d4,1x1",
        decoder_layers="1x2,4m1,4x1,8m4",
        bottleneck_multiple=0.5,
        likelihood=MIXTURE,
    ),
    "vdvae_colour": VDVAEConfig(
        width=4,
        latents=1,
        encoder_layers="8d2,4d2,2x1",
        decoder_layers="2x1,4m2,8m4",
        bottleneck_multiple=0.5,
        no_bias_above=2,
        likelihood=MIXTURE,
    ),
    "vdvae_bernoulli": VDVAEConfig(
        channels=1,
        width=4,
        latents=2,
        encoder_layers="8d8,1x1",
        decoder_layers="1x1,8m1",
        pixel_shift=-30.0,
        likelihood=BernoulliConfig(),
    ),
}
NAMES = [*CONFIGS, *VDVAES]


def tiny_vae(name: str, size: tuple[int, int] = SIZE) -> VAE | VDVAE:
    """With weights that make its distributions differ between images and pixels."""
    torch.manual_seed(0)
    vae: VAE | VDVAE
    if name in VDVAES:
        vae = VDVAE(VDVAES[name], (8, 8))
    else:
        vae = VAE(CONFIGS[name], (8, 8) if name in ("map_skip", "interleaved_map_colour") else size)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return vae.eval()


def random_values(vae: VAE | VDVAE, count: int) -> torch.Tensor:
    """int64 n H W c: half noise, half smooth."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, *vae.image_size, vae.config.channels)
    if vae.config.likelihood.kind == "bernoulli":
        return torch.randint(0, 2, shape, generator=generator)
    noise = torch.randint(0, 256, shape, generator=generator)
    return torch.where(torch.arange(count)[:, None, None, None] % 2 == 0, noise, (noise // 8 + 100))
