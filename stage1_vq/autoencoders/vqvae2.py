"""VQ-VAE-2 of Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2" (arXiv:1906.00446).

The paper shows how its levels are wired (algorithm 1, figure 2) but not each layer: these are the layers of the most
used open implementation, vq-vae-2-pytorch, so that its weights fit (stage1_vq/imports/vqvae2.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec, Grid
from common.compatibility import never_compiled
from common.errors import UserError
from common.layout import laid_for_convolutions
from common.model_io import in_type_of
from common.starting import stands_still
from stage1_vq.autoencoders.base import Autoencoder, Stage1Output
from stage1_vq.autoencoders.vqvae import ResidualBlock
from stage1_vq.networks.decoder import SequentialDecoder
from stage1_vq.quantizers import NearestQuantizerConfig, Quantizer, QuantizerConfig, build_quantizer
from stage1_vq.quantizers.parts import figures_of, health_over, named
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class VQVAE2Config:
    """The defaults are the paper's networks for 256x256 images; for 1024x1024 it has levels=3 and bottom_stride=8."""

    kind: Literal["vqvae2"] = "vqvae2"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    levels: int = 2  # grids of codes, each of half the sides of the next finer one
    bottom_stride: int = 4  # pixels, along each side, that a code of the finest grid stands for: a power of 2
    width: int = 128  # channels of the hidden layers
    residual_width: int = 64  # channels inside a residual block
    residual_blocks: int = 2  # in each encoder and each decoder
    data_variance: float = 1.0  # the reconstruction loss is the squared error divided by this (1: as it is)
    quantizer: QuantizerConfig = field(default_factory=NearestQuantizerConfig)  # of each level, one of its own

    def __post_init__(self) -> None:
        stride = self.bottom_stride
        for name, valid, expected in (
            ("channels", self.channels >= 1, "at least 1"),
            ("levels", self.levels >= 2, "at least 2; an autoencoder of one level is kind vqvae"),
            ("bottom_stride", stride >= 2 and stride & (stride - 1) == 0, "a power of 2, from 2 on"),
            ("width", self.width >= 2 and self.width % 2 == 0, "an even number: layers next to the pixels have half"),
            ("residual_width", self.residual_width >= 1, "at least 1"),
            ("residual_blocks", self.residual_blocks >= 0, "0 or more"),
            ("data_variance", self.data_variance > 0, "above 0: the variance of pixels in [-1, 1]"),
        ):
            if not valid:
                raise UserError(f"model.{name}={getattr(self, name)}, expected {expected}")

    @property
    def stride(self) -> int:
        """Of the coarsest grid."""
        return self.bottom_stride * 2 ** (self.levels - 1)


class VQVAE2(Autoencoder):
    """Of two levels, 0 the top (coarse) and 1 the bottom (fine); "to z" is a 1x1 convolution:

        images -> encoder 1 -> h_1 -> encoder 0 -> h_0
        h_0 -> to z -> quantizer 0 -> z_q0
        [conditioner(z_q0), h_1] -> to z -> quantizer 1 -> z_q1
        [up(z_q0), z_q1] -> decoder -> images

    The conditioner is a decoder of stride 2, "up" one 4x4 transposed convolution. Of more levels: the code vectors of
    all levels down to one are joined on its grid, [up(those above), z_q], and condition the next level.
    """

    kind = "vqvae2"
    config_class = VQVAE2Config
    config: VQVAE2Config

    def __init__(self, config: VQVAE2Config, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        levels, width = range(config.levels), config.width
        quantizers = [build_quantizer(config.quantizer) for _ in levels]
        d, d_out = quantizers[0].dim, quantizers[0].dim_out
        joined = [d_out if level == 0 else 2 * d_out for level in levels]  # channels of z_q with those above

        def encoder(level: int) -> nn.Sequential:
            bottom = level == config.levels - 1
            return down(config, config.channels if bottom else width, config.bottom_stride if bottom else 2)

        # All lists are coarse to fine; what stands between two levels is listed at the upper one.
        self.encoders = nn.ModuleList(encoder(level) for level in levels)
        self.to_latents = nn.ModuleList(nn.Conv2d(width + (d if level else 0), d, 1) for level in levels)
        self.quantizers = nn.ModuleList(quantizers)
        self.conditioners = nn.ModuleList(up(config, joined[level], d, 2) for level in levels[:-1])
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose2d(joined[level], d_out, 4, stride=2, padding=1) for level in levels[:-1]
        )
        self.decoder = up(config, joined[-1], config.channels, config.bottom_stride)

    # ---- codes ------------------------------------------------------------------------------------------------------

    def quantizer_of_levels(self) -> list[Quantizer]:
        """Coarse to fine."""
        quantizers: Any = list(self.quantizers)
        return quantizers

    def aligned_width(self) -> int:
        return self.quantizer_of_levels()[0].dim_out

    def code_spec(self, height: int | None = None, width: int | None = None) -> CodeSpec:
        """Grids `level0` (the top), `level1` ..., or `level0_NAME` ... where the quantizer has several grids."""
        height = self.image_size[0] if height is None else height
        width = self.image_size[1] if width is None else width
        self.check_image_size(height, width)
        grids: list[Grid] = []
        for level, quantizer in enumerate(self.quantizer_of_levels()):
            stride = self.stride // 2**level
            own = quantizer.grids(height // stride, width // stride)
            names = [f"level{level}"] if len(own) == 1 else [f"level{level}_{grid.name}" for grid in own]
            grids += [replace(grid, name=name) for grid, name in zip(own, names, strict=True)]
        return CodeSpec(tuple(grids), height, width, self.channels)

    def encode(self, images: Tensor) -> Codes:
        return self.completing(images)(())

    def completing(self, images: Tensor) -> Callable[[Codes], Codes]:
        """A level's latents go by the code vectors above it, so that they are encoded after those that were chosen."""
        return partial(self.codes_of, self.features(images))

    def codes_of(self, features: Sequence[Tensor], chosen: Codes = ()) -> Codes:
        """The codes of all levels, of which the first grids are `chosen`."""
        above, per_level = None, len(self.code_spec().grids) // self.config.levels
        found: list[Tensor] = []
        for level, quantizer in enumerate(self.quantizer_of_levels()):
            own = chosen[len(found) : len(found) + per_level]
            codes = quantizer.codes_after(self.latents(level, features, above), own)
            above = self.join(
                level, above, laid_for_convolutions(None, in_type_of(self.decoder, quantizer.codes_to_latents(codes)))
            )
            found += codes
        return tuple(found)

    def decode(self, codes: Codes) -> Tensor:
        self.check_codes(codes, self.config.bottom_stride)
        above, per_level = None, len(codes) // self.config.levels
        for level, quantizer in enumerate(self.quantizer_of_levels()):
            own = codes[level * per_level : (level + 1) * per_level]
            above = self.join(
                level, above, laid_for_convolutions(None, in_type_of(self.decoder, quantizer.codes_to_latents(own)))
            )
        return self.decoder(above).float().clamp(-1, 1)

    # ---- between the levels -----------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> list[Tensor]:
        """What each encoder makes of the images: b width h w, coarse to fine."""
        self.check_images(images)
        x, found = laid_for_convolutions(images, in_type_of(self.decoder, images)), []
        for encoder in reversed(self.encoders):
            x = encoder(x)
            found.append(x)
        return found[::-1]

    def latents(self, level: int, features: Sequence[Tensor], above: Tensor | None) -> Tensor:
        """z of a level, b d h w, given the joined code vectors of the levels above."""
        x = features[level]
        if above is not None:
            x = torch.cat([self.conditioners[level - 1](above), x], 1)
        return self.to_latents[level](x)

    def join(self, level: int, above: Tensor | None, z_q: Tensor) -> Tensor:
        """The code vectors of all levels down to this one, on its grid."""
        return z_q if above is None else torch.cat([self.upsamplers[level - 1](above), z_q], 1)

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Stage1Output:
        """Losses: `reconstruction_loss`, and those of each level's quantizer as `level0_commitment_loss` ..."""
        features, above = self.features(images), None
        codes: list[Tensor] = []
        coarsest: Tensor | None = None
        losses: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for level, quantizer in enumerate(self.quantizer_of_levels()):
            quantized = quantizer(self.latents(level, features, above))
            above = self.join(level, above, laid_for_convolutions(images, quantized.z_q))
            codes += quantized.codes
            coarsest = quantized.z_q if coarsest is None else coarsest
            losses |= named(f"level{level}", quantized.losses)
            statistics |= named(f"level{level}", quantized.statistics)
        assert above is not None  # there is a level
        decoded, reconstruction_losses = self.finish(self.decoder.trunk(above), images)
        return Stage1Output(decoded, tuple(codes), {**reconstruction_losses, **losses}, statistics, coarsest)

    @never_compiled  # as QuantizedAutoencoder.finish
    def finish(self, features: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The images, and their loss, of all but the decoder's last layer."""
        decoded = self.decoder.last(features).float()
        return decoded, {"reconstruction_loss": squared_error(decoded, images.float()) / self.config.data_variance}

    def last_layer(self) -> nn.Parameter:
        weight: Any = self.decoder[-1].weight
        return weight

    def initialise(self, batches: Sequence[Tensor]) -> None:
        """Level by level: the latents of one follow from the codebooks above it."""
        if self.started:
            return
        features = [self.features(images) for images in batches]
        above: list[Tensor | None] = [None for _ in batches]
        for level, quantizer in enumerate(self.quantizer_of_levels()):
            latents = [self.latents(level, *pair) for pair in zip(features, above, strict=True)]
            quantizer.initialise(latents)
            z_q = [quantizer.codes_to_latents(quantizer.codes(z)) for z in latents]
            above = [self.join(level, *pair) for pair in zip(above, z_q, strict=True)]

    def begin_step(self, step: int) -> None:
        for quantizer in self.quantizer_of_levels():
            quantizer.begin_step(step)

    def update(self) -> None:
        for _, quantizer in self.moving():
            quantizer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`parts.health_over` the levels, as `level0_perplexity` ..."""
        healths = {f"level{level}": quantizer.health(steps_per_epoch) for level, quantizer in self.moving()}
        return health_over(healths) if healths else {}

    def moving(self) -> list[tuple[int, Quantizer]]:
        """The quantizers that are not frozen, each with its level."""
        levels = enumerate(self.quantizer_of_levels())
        return [(level, quantizer) for level, quantizer in levels if not stands_still(quantizer)]

    def discard(self) -> None:
        for quantizer in self.quantizer_of_levels():
            quantizer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        found: list[str] = []
        for level, quantizer in enumerate(self.quantizer_of_levels()):
            lines = quantizer.warnings(figures_of(f"level{level}", metrics), steps_per_epoch)
            found += [f"level{level}: {line}" for line in lines]
        return found


def residual_blocks(config: VQVAE2Config) -> list[nn.Module]:
    return [ResidualBlock(config.width, config.residual_width) for _ in range(config.residual_blocks)]


def down(config: VQVAE2Config, channels: int, stride: int) -> nn.Sequential:
    """An encoder: 4x4 convolutions of stride 2, the first to half the width; a 3x3 convolution, residual blocks."""
    halvings = stride.bit_length() - 1
    layers: list[nn.Module] = []
    widths = [channels, config.width // 2, *(halvings - 1) * [config.width]]
    for coming, going in pairwise(widths):
        layers += [nn.Conv2d(coming, going, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(widths[-1], config.width, 3, padding=1), *residual_blocks(config), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def up(config: VQVAE2Config, coming: int, channels: int, stride: int) -> SequentialDecoder:
    """A decoder: a 3x3 convolution, residual blocks; 4x4 transposed convolutions of stride 2, of several the last from
    half the width."""
    doublings = stride.bit_length() - 1
    layers = [nn.Conv2d(coming, config.width, 3, padding=1), *residual_blocks(config)]
    widths = [*(doublings - 1) * [config.width], config.width // 2] if doublings > 1 else [config.width]
    for wide, narrow in pairwise([*widths, channels]):
        layers += [nn.ReLU(inplace=True), nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)]
    return SequentialDecoder(*layers)
