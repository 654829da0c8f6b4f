"""VQ-VAE of van den Oord et al. 2017, "Neural Discrete Representation Learning" (arXiv:1711.00937), section 4.1."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.layout import laid_for_convolutions
from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.networks.decoder import SequentialDecoder
from stage1_vq.quantizers import NearestQuantizerConfig, QuantizerConfig, build_quantizer
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """The defaults are the paper's networks for CIFAR-10 and ImageNet."""

    kind: Literal["vqvae"] = "vqvae"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    width: int = 256  # channels of the hidden layers
    residual_width: int = 256  # channels inside a residual block
    residual_blocks: int = 2  # in the encoder, and as many in the decoder
    downsamplings: int = 2  # 4x4 convolutions of stride 2: a code stands for 2**downsamplings pixels along each side
    data_variance: float = 1.0  # the reconstruction loss is the squared error divided by this (1: as it is)
    quantizer: QuantizerConfig = field(default_factory=NearestQuantizerConfig)

    def __post_init__(self) -> None:
        for name in ("channels", "width", "residual_width", "downsamplings"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}, expected at least 1")
        if self.residual_blocks < 0:
            raise UserError(f"model.residual_blocks={self.residual_blocks}, expected 0 or more")
        if self.data_variance <= 0:
            raise UserError(
                f"model.data_variance={self.data_variance}, expected above 0: the variance of pixels in [-1, 1]"
            )

    @property
    def stride(self) -> int:
        return 2**self.downsamplings


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, width: int, residual_width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, residual_width, 3, padding=1)
        self.narrow = nn.Conv2d(residual_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # In place where no backward pass asks for what was there: a convolution does not for its output.
        return self.narrow(F.relu(self.wide(F.relu(x)), inplace=True)).add_(x)


class VQVAE(QuantizedAutoencoder):
    """Encoder and decoder, with `downsamplings` n:

        images -> n x (4x4 convolution, stride 2) -> residual blocks -> 1x1 convolution -> z -> quantizer -> z_q
        z_q -> 3x3 convolution -> residual blocks -> n x (4x4 transposed convolution, stride 2) -> images

    The paper does not say how the hidden layers meet the code vectors: a 1x1 convolution before the quantizer and a 3x3
    convolution after it are what its authors' published example does (Sonnet, `vqvae_example`).
    """

    kind = "vqvae"
    config_class = VQVAEConfig
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        width = config.width

        def residual_blocks() -> list[nn.Module]:
            return [ResidualBlock(width, config.residual_width) for _ in range(config.residual_blocks)]

        down: list[nn.Module] = []
        up: list[nn.Module] = []
        scales = [config.channels] + config.downsamplings * [width]  # channels of each resolution, fine to coarse
        for fine, coarse in pairwise(scales):
            down += [nn.Conv2d(fine, coarse, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
            up = [nn.ReLU(inplace=True), nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1), *up]
        down.pop()  # the block that follows begins with a ReLU of its own
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = nn.Sequential(
            *down, *residual_blocks(), nn.ReLU(inplace=True), nn.Conv2d(width, self.quantizer.dim, 1)
        )
        self.decoder = SequentialDecoder(
            nn.Conv2d(self.quantizer.dim_out, width, 3, padding=1), *residual_blocks(), *up
        )

    def laid_out(self, maps: Tensor, images: Tensor | None = None) -> Tensor:
        return laid_for_convolutions(images, maps)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"reconstruction_loss": squared_error(decoded, images) / self.config.data_variance}
