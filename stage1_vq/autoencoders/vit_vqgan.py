"""ViT-VQGAN of Yu et al. 2021, "Vector-quantized Image Modeling with Improved VQGAN" (arXiv:2110.04627)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.losses.reconstruction import logit_laplace_bits, logit_laplace_nll, map_pixels, unmap_pixels
from stage1_vq.networks.vit import ViTDecoder, ViTEncoder
from stage1_vq.quantizers import NearestQuantizerConfig, QuantizerConfig, build_quantizer


def published_quantizer() -> NearestQuantizerConfig:
    """Section 3.2: a 32-d look-up with vectors of length one; the codebook learns by gradient."""
    return NearestQuantizerConfig(
        codebook_size=8192,
        dim=768,
        lookup_dim=32,
        l2_normalise=True,
        codebook_update="gradient",
        kmeans_iterations=0,
        revive_after=0,
    )


@dataclass(frozen=True, kw_only=True)
class ViTVQGANConfig:
    """The paper's sizes (its table 1), for encoder and decoder each; the defaults are its base model.

    | size  | width | blocks | heads |
    |-------|------:|-------:|------:|
    | small |   512 |      8 |     8 |
    | base  |   768 |     12 |    12 |
    | large |  1280 |     32 |    16 |
    """

    kind: Literal["vit_vqgan"] = "vit_vqgan"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    patch: int = 8  # pixels, along each side, that a code stands for
    width: int = 768  # of the tokens; MLPs are four times as wide inside
    blocks: int = 12  # of attention and MLP in the encoder, and as many in the decoder
    heads: int = 12  # of attention
    positions: Literal["learned", "sincos"] = "learned"  # learned vectors, or fixed sines and cosines of row and column
    logit_laplace_weight: float = 0.1  # of the negative log likelihood of pixels; 0: the decoder predicts no scale
    l2_weight: float = 1.0  # of the squared error of pixels in [-1, 1]
    quantizer: QuantizerConfig = field(default_factory=published_quantizer)

    def __post_init__(self) -> None:
        for name in ("channels", "patch", "width", "blocks", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise UserError(f"model.width={self.width}, expected a multiple of model.heads={self.heads}")
        if self.positions not in ("learned", "sincos"):
            raise UserError(f"model.positions={self.positions}, expected learned or sincos")
        if self.positions == "sincos" and self.width % 4:
            raise UserError(f"model.width={self.width}, expected a multiple of 4 for model.positions=sincos")
        for name in ("logit_laplace_weight", "l2_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}={getattr(self, name)}, expected 0 or more")
        if not self.logit_laplace_weight + self.l2_weight:
            raise UserError(
                "model.logit_laplace_weight=0 and model.l2_weight=0, expected one of them above 0: "
                "nothing else tells the decoder what the images are"
            )

    @property
    def stride(self) -> int:
        return self.patch


class ViTVQGAN(QuantizedAutoencoder):
    """Encoder and decoder are vision transformers, one token a patch:

        images -> patches -> blocks -> tanh MLP -> z -> quantizer -> z_q -> blocks -> tanh MLP -> patches -> images

    With the logit-Laplace loss the decoder gives two numbers per pixel and channel: first the mean of the Laplace
    density in logits, whose sigmoid is the pixel, mapped to [0.1, 0.9] as in DALL-E, and then the ln of its scale. The
    other losses see the pixel. Without it the decoder gives the pixel in [-1, 1] itself.

    The paper adds a perceptual and an adversarial loss, of weight 0.1 each, in training: `perceptual` and
    `adversarial` of the recipe.
    """

    kind = "vit_vqgan"
    config_class = ViTVQGANConfig
    config: ViTVQGANConfig

    def __init__(self, config: ViTVQGANConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = ViTEncoder(
            channels=config.channels,
            patch=config.patch,
            grid=grid,
            width=config.width,
            blocks=config.blocks,
            heads=config.heads,
            positions=config.positions,
            width_out=self.quantizer.dim,
        )
        self.decoder = ViTDecoder(
            width_in=self.quantizer.dim_out,
            channels=2 * config.channels if config.logit_laplace_weight else config.channels,
            patch=config.patch,
            grid=grid,
            width=config.width,
            blocks=config.blocks,
            heads=config.heads,
            positions=config.positions,
        )

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Per pixel and channel: `logit_laplace_loss`, in nats, and `l2_loss`."""
        config, losses = self.config, {}
        if config.logit_laplace_weight:
            mean, log_scale = decoded.chunk(2, dim=1)
            nll = logit_laplace_nll(mean, log_scale, map_pixels(images)).mean()
            losses["logit_laplace_loss"] = config.logit_laplace_weight * nll
        if config.l2_weight:
            losses["l2_loss"] = config.l2_weight * F.mse_loss(self.images_of(decoded), images)
        return losses

    def decoder_bits(self, images: Tensor, codes: Codes) -> Tensor | None:
        if not self.config.logit_laplace_weight:
            return None
        mean, log_scale = self.decoded(codes).chunk(2, dim=1)
        return logit_laplace_bits(mean, log_scale, images).sum(dim=(1, 2, 3))

    def images_of(self, decoded: Tensor) -> Tensor:
        if not self.config.logit_laplace_weight:
            return decoded
        mean, _ = decoded.chunk(2, dim=1)
        return unmap_pixels(mean.sigmoid())
