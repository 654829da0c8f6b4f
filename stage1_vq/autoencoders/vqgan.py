"""VQ-GAN of Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis" (arXiv:2012.09841).

Its perceptual and adversarial losses are not of the model: stage1_vq/losses gives them to any autoencoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from common.errors import UserError
from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.losses.pixel_errors import check_error_weights, pixel_errors
from stage1_vq.networks.backbone import TimmBackbone
from stage1_vq.networks.resnet import ResnetDecoder, ResnetEncoder
from stage1_vq.quantizers import NearestQuantizerConfig, QuantizerConfig, build_quantizer


def default_quantizer() -> NearestQuantizerConfig:
    """The paper's codebook; the k-means start and the revival of dead codes are not of the paper."""
    return NearestQuantizerConfig(codebook_size=1024, dim=256, codebook_update="gradient")


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """The defaults are the paper's networks for ImageNet at 256x256 pixels: 16x16 codes."""

    kind: Literal["vqgan"] = "vqgan"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    width: int = 128  # channels at the resolution of the images
    multipliers: tuple[float, ...] = (
        1,
        1,
        2,
        2,
        4,
    )  # of the width, by level; each after the first halves the sides
    residual_blocks: int = 2  # at each level of the encoder; one more at each of the decoder
    attention_levels: tuple[int, ...] = (4,)  # levels with attention, 0 the finest; between the two halves it always is
    norm_groups: int = 32  # of the group norms
    spatial_norm: bool = False  # MoVQ: all norms of the decoder are modulated by the code vectors
    z_channels: int = 256  # between the networks and the convolutions around the quantizer
    quant_conv_kernel: int = 1  # of those convolutions: 1, or 3 as in VAR
    backbone: str | None = None  # a timm network in place of the encoder's, such as convnext_tiny
    backbone_pretrained: str | None = None  # its weights to begin with: "download", or a file; null: fresh ones
    l1_weight: float = 1.0  # of the absolute error, in the reconstruction loss
    l2_weight: float = 0.0  # of the squared error
    quantizer: QuantizerConfig = field(default_factory=default_quantizer)

    def __post_init__(self) -> None:
        whole = (int(number) if number == int(number) else number for number in self.multipliers)
        object.__setattr__(self, "multipliers", tuple(whole))
        levels = len(self.multipliers)
        for name, valid, expected in (
            ("channels", self.channels >= 1, "at least 1"),
            ("width", self.width >= 1, "at least 1"),
            ("multipliers", levels >= 1 and min(self.multipliers, default=0) >= 1, "one or more numbers from 1 up"),
            ("residual_blocks", self.residual_blocks >= 1, "at least 1"),
            (
                "attention_levels",
                all(0 <= level < levels for level in self.attention_levels),
                f"levels from 0 to {levels - 1}, as there are {levels} multipliers",
            ),
            ("norm_groups", self.norm_groups >= 1, "at least 1"),
            ("z_channels", self.z_channels >= 1, "at least 1"),
            ("quant_conv_kernel", self.quant_conv_kernel >= 1 and self.quant_conv_kernel % 2, "an odd number"),
        ):
            if not valid:
                raise UserError(f"model.{name}={getattr(self, name)}, expected {expected}")
        if self.backbone_pretrained is not None and self.backbone is None:
            raise UserError(
                f"model.backbone_pretrained={self.backbone_pretrained} without model.backbone: name the timm network "
                "that these weights are of"
            )
        check_error_weights(self, "the paper has l1_weight=1")
        if any(abs(self.width * number - round(self.width * number)) > 1e-6 for number in self.multipliers):
            raise UserError(
                f"model.multipliers={self.multipliers} of model.width={self.width} give broken numbers of channels: "
                "expected whole ones"
            )
        for width in self.level_widths():
            if width % self.norm_groups:
                raise UserError(
                    f"model.norm_groups={self.norm_groups} does not divide {width} channels (model.width times a "
                    "multiplier): give a number that divides model.width"
                )

    @property
    def stride(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    def level_widths(self) -> list[int]:
        """Channels after the first convolution, and at each level, fine to coarse."""
        return [self.width, *(round(self.width * multiplier) for multiplier in self.multipliers)]


class Encoder(nn.Module):
    """images -> body -> quant_conv -> z."""

    def __init__(self, body: nn.Module, z_channels: int, dim: int, kernel: int) -> None:
        super().__init__()
        self.body = body
        self.quant_conv = nn.Conv2d(z_channels, dim, kernel, padding=kernel // 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.body(images))


class Decoder(nn.Module):
    """z_q -> post_quant_conv -> body -> images. Spatial norms of the body see z_q itself."""

    def __init__(self, body: ResnetDecoder, z_channels: int, dim: int, kernel: int) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(dim, z_channels, kernel, padding=kernel // 2)
        self.body = body

    def forward(self, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(z_q))

    def trunk(self, z_q: Tensor) -> Tensor:
        return self.body.trunk(self.post_quant_conv(z_q), z_q)

    def last(self, features: Tensor) -> Tensor:
        return self.body.conv_out(features)


class VQGAN(QuantizedAutoencoder):
    """images -> residual network -> z -> quantizer -> z_q -> residual network -> images."""

    kind = "vqgan"
    config_class = VQGANConfig
    config: VQGANConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: VQGANConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.quantizer = build_quantizer(config.quantizer)
        kernel, dim, dim_out = config.quant_conv_kernel, self.quantizer.dim, self.quantizer.dim_out
        self.encoder = Encoder(encoder_body(config), config.z_channels, dim, kernel)
        self.decoder = Decoder(decoder_body(config, dim_out), config.z_channels, dim_out, kernel)

    def initialise(self, batches: Sequence[Tensor]) -> None:
        # Here, not in the constructor: a model that is loaded, or a run that continues, has its weights elsewhere.
        pretrained, body = self.config.backbone_pretrained, self.encoder.body
        if pretrained is not None and isinstance(body, TimmBackbone) and not self.encoder_started:
            body.load_pretrained(pretrained)
        super().initialise(batches)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        return pixel_errors(self.config, decoded, images)

    def last_layer(self) -> nn.Parameter:
        return self.decoder.body.conv_out.get_parameter("weight")


def encoder_body(config: VQGANConfig) -> nn.Module:
    """Images, b c H W, to b z_channels h w."""
    if config.backbone is not None:
        return TimmBackbone(
            config.backbone, channels=config.channels, stride=config.stride, width_out=config.z_channels
        )
    return ResnetEncoder(
        channels=config.channels,
        z_channels=config.z_channels,
        width=config.width,
        multipliers=config.multipliers,
        residual_blocks=config.residual_blocks,
        attention_levels=config.attention_levels,
        norm_groups=config.norm_groups,
    )


def decoder_body(config: VQGANConfig, latent_channels: int) -> ResnetDecoder:
    """b z_channels h w, and z_q for spatial norms, to images, b c H W. latent_channels: width of z_q."""
    return ResnetDecoder(
        channels=config.channels,
        z_channels=config.z_channels,
        width=config.width,
        multipliers=config.multipliers,
        residual_blocks=config.residual_blocks,
        attention_levels=config.attention_levels,
        norm_groups=config.norm_groups,
        latent_channels=latent_channels if config.spatial_norm else None,
    )
