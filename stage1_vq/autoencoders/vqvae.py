"""VQ-VAE of van den Oord et al. 2017, "Neural Discrete Representation Learning" (arXiv:1711.00937), section 4.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vq.autoencoders.base import Autoencoder, Stage1Output
from stage1_vq.codes import Codes, CodeSpec
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from training.errors import UserError


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
    quantizer: NearestQuantizerConfig = field(default_factory=NearestQuantizerConfig)

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
        return x + self.narrow(F.relu(self.wide(F.relu(x))))


class VQVAE(Autoencoder):
    """Encoder and decoder, with `downsamplings` n:

        images -> n x (4x4 convolution, stride 2) -> residual blocks -> 1x1 convolution -> z -> quantizer -> z_q
        z_q -> 3x3 convolution -> residual blocks -> n x (4x4 transposed convolution, stride 2) -> images

    The paper does not say how the hidden layers meet the code vectors: a 1x1 convolution before the quantizer and a 3x3
    convolution after it are what its authors' published example does (Sonnet, `vqvae_example`).
    """

    kind = "vqvae"

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        width, dim = config.width, config.quantizer.dim

        def residual_blocks() -> list[nn.Module]:
            return [ResidualBlock(width, config.residual_width) for _ in range(config.residual_blocks)]

        down: list[nn.Module] = []
        up: list[nn.Module] = []
        scales = [config.channels] + config.downsamplings * [width]  # channels of each resolution, fine to coarse
        for fine, coarse in pairwise(scales):
            down += [nn.Conv2d(fine, coarse, 4, stride=2, padding=1), nn.ReLU()]
            up = [nn.ReLU(), nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1), *up]
        down.pop()  # the block that follows begins with a ReLU of its own
        self.encoder = nn.Sequential(*down, *residual_blocks(), nn.ReLU(), nn.Conv2d(width, dim, 1))
        self.quantizer = NearestQuantizer(config.quantizer)
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1), *residual_blocks(), *up)

    def arguments(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "image_size": list(self.image_size)}

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config = arguments["config"]
        quantizer = NearestQuantizerConfig(**config["quantizer"])
        height, width = arguments["image_size"]
        return cls(VQVAEConfig(**{**config, "quantizer": quantizer}), (height, width))

    def code_spec(self, height: int | None = None, width: int | None = None) -> CodeSpec:
        height = self.image_size[0] if height is None else height
        width = self.image_size[1] if width is None else width
        self.check_image_size(height, width)
        grids = self.quantizer.grids(height // self.stride, width // self.stride)
        return CodeSpec(grids, height, width, self.channels)

    def latents(self, images: Tensor) -> Tensor:
        """z, b d h w."""
        self.check_images(images)
        return self.encoder(images)

    def encode(self, images: Tensor) -> Codes:
        return self.quantizer.codes(self.latents(images))

    def decode(self, codes: Codes) -> Tensor:
        h, w = codes[0].shape[1:]
        self.code_spec(h * self.stride, w * self.stride).check(codes)
        return self.decoder(self.quantizer.codes_to_latents(codes)).clamp(-1, 1)

    def forward(self, images: Tensor) -> Stage1Output:
        """Losses: `reconstruction_loss`, and the quantizer's."""
        z_q, codes, losses, statistics = self.quantizer(self.latents(images))
        reconstruction = self.decoder(z_q)
        error = F.mse_loss(reconstruction.float(), images.float())
        losses = {"reconstruction_loss": error / self.config.data_variance, **losses}
        return Stage1Output(reconstruction, codes, losses, statistics)

    def initialise(self, batches: Sequence[Tensor]) -> None:
        self.quantizer.initialise([self.latents(images) for images in batches])

    def update(self, steps_per_epoch: int) -> dict[str, Tensor]:
        return self.quantizer.update(steps_per_epoch)

    def discard(self) -> None:
        self.quantizer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        return self.quantizer.warnings(metrics, steps_per_epoch)
