"""dVAE of DALL-E: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation" (arXiv:2102.12092), appendix A."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from common.layout import laid_for_convolutions
from common.model_io import in_type_of
from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.losses.reconstruction import logit_laplace_bits, logit_laplace_nll, map_pixels, unmap_pixels
from stage1_vq.networks.dalle import DalleDecoder, DalleEncoder
from stage1_vq.quantizers import GumbelQuantizerConfig, QuantizerConfig, build_quantizer


def published_quantizer() -> GumbelQuantizerConfig:
    return GumbelQuantizerConfig(codebook_size=8192, dim=2048, embedding_dim=128)


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """The defaults are the published networks: 256x256 pixels -> 32x32 codes of 8,192."""

    kind: Literal["dvae"] = "dvae"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    width: int = 256  # of the groups at full resolution; it doubles where the resolution halves
    groups: int = 4  # of residual blocks: a code stands for 2**(groups - 1) pixels along each side
    blocks: int = 2  # residual blocks in each group
    quantizer: QuantizerConfig = field(default_factory=published_quantizer)

    def __post_init__(self) -> None:
        for name in ("channels", "groups", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}, expected at least 1")
        if self.width < 4 or self.width % 4:
            raise UserError(f"model.width={self.width}, expected a multiple of 4: blocks are a quarter as wide inside")

    @property
    def stride(self) -> int:
        return 2 ** (self.groups - 1)

    @property
    def encoder_width(self) -> int:
        """Width of the encoder's last group: a quantizer of this `dim` needs no convolution in between."""
        return self.width * 2 ** (self.groups - 1)


class DVAE(QuantizedAutoencoder):
    """Images -> pixels in [0.1, 0.9] -> encoder -> z -> quantizer -> z_q -> decoder -> mean and ln scale of each
    pixel's logit-Laplace density.

    The published model has the Gumbel-softmax quantizer: its logits are the encoder's last 1x1 convolution, its
    embedding the decoder's first. Its KL divergence from the uniform prior, which completes the ELBO, is the
    quantizer's loss. The paper's z_q is a relaxed sample of the codes in training; the codes of `encode` are the most
    likely ones.
    """

    kind = "dvae"
    config_class = DVAEConfig
    config: DVAEConfig

    def __init__(self, config: DVAEConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = DalleEncoder(
            channels=config.channels,
            width=config.width,
            groups=config.groups,
            blocks=config.blocks,
            width_out=self.quantizer.dim,
        )
        self.decoder = DalleDecoder(
            width_in=self.quantizer.dim_out,
            channels=2 * config.channels,
            width=config.width,
            groups=config.groups,
            blocks=config.blocks,
        )

    def laid_out(self, maps: Tensor, images: Tensor | None = None) -> Tensor:
        return laid_for_convolutions(images, maps)

    def latents(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.encoder(self.laid_out(in_type_of(self.encoder, map_pixels(images)), images))

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """`reconstruction_loss`: negative log likelihood in nats per pixel and channel."""
        mean, log_scale = decoded.chunk(2, dim=1)
        return {"reconstruction_loss": logit_laplace_nll(mean, log_scale, map_pixels(images)).mean()}

    def decoder_bits(self, images: Tensor, codes: Codes) -> Tensor:
        mean, log_scale = self.decoded(codes).chunk(2, dim=1)
        return logit_laplace_bits(mean, log_scale, images).sum(dim=(1, 2, 3))

    def images_of(self, decoded: Tensor) -> Tensor:
        mean, _ = decoded.chunk(2, dim=1)
        return unmap_pixels(mean.sigmoid())
