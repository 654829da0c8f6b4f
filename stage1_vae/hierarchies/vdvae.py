"""VD-VAE of Child 2020, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images"
(arXiv:2011.10650): a ladder of tens of groups of latents, each a map of its resolution, without normalisation.

    images ─ residual blocks, pooled from resolution to resolution ─▶ one activation of each resolution
    1x1 stream ─▶ groups of 1x1 ─▶ nearest-neighbour upsampling ─▶ groups of 4x4 ─▶ ... ─▶ groups of HxW ─▶ p(x|z)

At each group the prior's network reads the stream x and says p(z_l | z_above) and what is added to x whatever z_l is;
the posterior's reads x and the activation of the resolution. Then a projection of z_l and a residual block are added:

    x = x + h(x);  x = x + W z_l;  x = x + block(x)

Layers are written as the paper's code has them, each with the resolution N of the maps that it reads, comma between:

    NxM  M blocks         NdK  a block of the encoder, then pooling by K         N  one block
    NmK  a block of the decoder that first adds the stream of resolution K, repeated to N and cut to its first channels
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, check_fields
from common.recompute import recomputing
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.base import Choose, Group, HierarchicalVAE, Normal
from stage1_vae.likelihoods import LikelihoodConfig, LogisticMixtureConfig
from stage1_vae.likelihoods.base import at_least_float
from stage1_vae.posteriors.base import without_autocast

MOST_BLOCKS = 10_000  # that a config can ask for: published ones have up to 80

SMALLEST_OF_3X3 = 3  # resolution from which on convolutions see neighbours


class Layer(NamedTuple):
    resolution: int  # of what it reads
    number: int | None = None  # of the encoder: what it pools by; of the decoder: the resolution that it adds


@dataclass(frozen=True, kw_only=True)
class VDVAEConfig:
    """The published names are width, zdim (latents), enc_blocks, dec_blocks (layers of the two), custom_width_str
    (widths), bottleneck_multiple and no_bias_above; num_mixtures is likelihood.components. Defaults: those of
    CIFAR-10."""

    kind: Literal["vdvae"] = "vdvae"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    width: int = 384  # channels of the streams
    widths: str = ""  # those of other widths, as RESOLUTION:WIDTH,...
    latents: int = 16  # channels of each group's map
    encoder_layers: str = "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3"
    decoder_layers: str = "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21"
    bottleneck_multiple: float = 0.25  # of a width: channels inside blocks
    no_bias_above: int = 64  # streams of resolutions up to it start with learned numbers, others with 0
    pixel_shift: float = -120.63838  # the encoder reads (p + pixel_shift) * pixel_scale of 8-bit values p: minus their
    pixel_scale: float = 1 / 64.16736  # mean in the training data, over their standard deviation
    likelihood: LikelihoodConfig = field(default_factory=LogisticMixtureConfig)

    def __post_init__(self) -> None:
        encoder, decoder = self.layers
        widths = widths_of(self.widths)
        check_fields(
            self,
            [
                ("channels", self.channels >= 1, "at least 1"),
                ("width", self.width >= 1, "at least 1"),
                ("latents", self.latents >= 1, "at least 1"),
                ("bottleneck_multiple", 0 < self.bottleneck_multiple <= 1, "a share of the width above 0, at most 1"),
                ("no_bias_above", self.no_bias_above >= 1, "a resolution of at least 1"),
                ("pixel_scale", self.pixel_scale > 0, "above 0"),
            ],
        )
        check_encoder(self, encoder)
        check_decoder(self, decoder, {layer.resolution for layer in encoder} | {resolution_after(encoder[-1])})
        if unknown := sorted(set(widths) - self.resolutions):
            raise UserError(
                f"model.widths={self.widths} gives a width for resolution {unknown[0]}, expected resolutions of the "
                f"layers: {', '.join(map(str, sorted(self.resolutions)))}"
            )

    @property
    def layers(self) -> tuple[list[Layer], list[Layer]]:
        """Of encoder and decoder, block by block."""
        return layers_of("encoder_layers", self.encoder_layers), layers_of("decoder_layers", self.decoder_layers)

    @property
    def resolutions(self) -> set[int]:
        """Of all streams."""
        layers, _ = self.layers
        return {layer.resolution for layer in layers} | {resolution_after(layers[-1])}

    @property
    def image_side(self) -> int:
        return self.layers[0][0].resolution

    def width_of(self, resolution: int) -> int:
        return widths_of(self.widths).get(resolution, self.width)

    def middle_of(self, resolution: int) -> int:
        """Channels inside blocks."""
        return int(self.width_of(resolution) * self.bottleneck_multiple)


def layers_of(name: str, text: str) -> list[Layer]:
    """The layers that a text says, one by one. Raises UserError."""
    pooling = name == "encoder_layers"
    layers: list[Layer] = []
    for item in text.split(","):
        found = re.fullmatch(r"([1-9]\d*)(?:(x|d|m)([1-9]\d*))?", item.strip())
        if found is None or found[2] == ("m" if pooling else "d"):
            third = "NdK (a block, then pooling by K)" if pooling else "NmK (a block that adds resolution K)"
            raise UserError(
                f"model.{name}={text} has the item {item.strip()!r}, expected N (a block at resolution N), NxM (M "
                f"blocks) or {third}, comma between"
            )
        resolution, number = int(found[1]), None if found[3] is None else int(found[3])
        if len(layers) + (int(found[3]) if found[2] == "x" else 1) > MOST_BLOCKS:
            raise UserError(f"model.{name}={text[:80]} has more than {MOST_BLOCKS:,} blocks, expected fewer")
        layers += [Layer(resolution)] * (number or 1) if found[2] in (None, "x") else [Layer(resolution, number)]
    return layers


def widths_of(text: str) -> dict[int, int]:
    """Channels by resolution. Raises UserError."""
    if not text:
        return {}
    found = [re.fullmatch(r"([1-9]\d*):([1-9]\d*)", item.strip()) for item in text.split(",")]
    if any(item is None for item in found):
        raise UserError(f"model.widths={text}, expected RESOLUTION:WIDTH with a comma between, such as 8:64,4:128")
    return {int(item[1]): int(item[2]) for item in found if item is not None}


def resolution_after(layer: Layer) -> int:
    """Of what a layer of the encoder puts out."""
    return layer.resolution // (layer.number or 1)


def check_encoder(config: VDVAEConfig, layers: Sequence[Layer]) -> None:
    """Raises UserError unless each layer reads what the one before it puts out, and widths do not shrink."""
    for before, after in pairwise(layers):
        if resolution_after(before) != after.resolution:
            raise UserError(
                f"model.encoder_layers={config.encoder_layers} has a block at resolution {after.resolution} behind one "
                f"that leaves {resolution_after(before)}, expected {resolution_after(before)}: NdK says that what "
                "follows is of resolution N/K"
            )
    for layer in layers:
        if layer.resolution % (layer.number or 1):
            raise UserError(
                f"model.encoder_layers={config.encoder_layers} pools resolution {layer.resolution} by {layer.number}, "
                "expected a number by which it can be divided"
            )
    sides = sorted(config.resolutions, reverse=True)
    for large, small in pairwise(sides):
        if config.width_of(small) < config.width_of(large):
            raise UserError(
                f"model.widths={config.widths} and model.width={config.width} give {config.width_of(small)} channels "
                f"at resolution {small} and {config.width_of(large)} at {large}, expected no fewer at smaller "
                "resolutions: channels are added on the way down and left out on the way up"
            )
    if any(config.middle_of(side) < 1 for side in sides):
        raise UserError(
            f"model.bottleneck_multiple={config.bottleneck_multiple} of the smallest width leaves no channel inside "
            "blocks, expected at least 1: give a larger one, or a larger model.width"
        )


def check_decoder(config: VDVAEConfig, layers: Sequence[Layer], activations: set[int]) -> None:
    """Raises UserError unless the encoder leaves an activation of each resolution, streams are there before they are
    added, and the last layer is of the images' resolution."""
    there = {layer.resolution for layer in layers if layer.resolution <= config.no_bias_above}
    for layer in layers:
        if layer.resolution not in activations:
            raise UserError(
                f"model.decoder_layers={config.decoder_layers} has a block at resolution {layer.resolution}, of which "
                f"model.encoder_layers={config.encoder_layers} leaves no activation, expected one of "
                f"{', '.join(map(str, sorted(activations)))}"
            )
        if layer.number is not None and (layer.number not in there or layer.resolution % layer.number):
            raise UserError(
                f"model.decoder_layers={config.decoder_layers} adds resolution {layer.number} to "
                f"{layer.resolution}, expected one that is there before and by which {layer.resolution} can be divided"
            )
        there.add(layer.resolution)
    if layers[-1].resolution != config.image_side:
        raise UserError(
            f"model.decoder_layers={config.decoder_layers} ends at resolution {layers[-1].resolution}, expected "
            f"{config.image_side}, with which model.encoder_layers={config.encoder_layers} begins"
        )


class Bottleneck(nn.Module):
    """`n c h w` -> `n o h w`: four convolutions, an exact GELU before each."""

    def __init__(self, width: int, middle: int, outputs: int, resolution: int) -> None:
        super().__init__()
        side = 3 if resolution >= SMALLEST_OF_3X3 else 1
        self.narrow = convolution(width, middle, 1)
        self.first = convolution(middle, middle, side)
        self.second = convolution(middle, middle, side)
        self.wide = convolution(middle, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.behind_narrow(self.narrow(F.gelu(x))))

    def behind_narrow(self, narrowed: Tensor) -> Tensor:
        """What the last convolution reads."""
        return F.gelu(self.second(F.gelu(self.first(F.gelu(narrowed)))))


class Convolution(nn.Conv2d):
    """Biases begin at 0, weights as torch has them."""

    bias: nn.Parameter

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)


def convolution(width: int, outputs: int, side: int) -> Convolution:
    return Convolution(width, outputs, side, padding=side // 2)


class Encoder(nn.Module):
    """`n c H W` -> the last activation of each resolution, n w h h by h."""

    def __init__(self, config: VDVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.layers, _ = config.layers
        self.first = convolution(config.channels, config.width_of(config.image_side), 3)
        self.blocks: Sequence[Bottleneck] = nn.ModuleList(  # type: ignore[assignment]
            Bottleneck(config.width_of(side), config.middle_of(side), config.width_of(side), side)
            for side, _ in self.layers
        )
        for block in self.blocks:
            block.wide.weight.data /= math.sqrt(len(self.layers))

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        x = at_least_float(self.first(images))  # the stream is float32 under autocast too
        activations = {x.shape[-1]: x}
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x = x + block(x)
            if layer.number is not None:
                x = F.avg_pool2d(x, layer.number)
                missing = self.config.width_of(x.shape[-1]) - x.shape[1]
                x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
            activations[x.shape[-1]] = x
        return activations


class DecoderBlock(nn.Module):
    """One group of latents, and what it adds to the stream of its resolution."""

    stays_whole = True  # on each process (training/sharding.py): it computes by several methods

    def __init__(self, config: VDVAEConfig, layer: Layer) -> None:
        super().__init__()
        side = layer.resolution
        self.side, self.added = layer
        self.latents = config.latents
        self.width, middle = config.width_of(side), config.middle_of(side)
        self.posterior = Bottleneck(2 * self.width, middle, 2 * self.latents, side)
        self.prior = Bottleneck(self.width, middle, 2 * self.latents + self.width, side)
        self.project = convolution(self.latents, self.width, 1)
        self.residual = Bottleneck(self.width, middle, self.width, side)
        nn.init.zeros_(self.prior.wide.weight)

    def of_activation(self, active: Tensor) -> Tensor:
        """What the posterior's first convolution makes of the encoder's activation alone, n m h w: it is a sum of that
        and of what it makes of the stream. active: behind the GELU."""
        return F.conv2d(active, self.posterior.narrow.weight[:, self.width :])

    def posterior_of(self, active: Tensor, of_activation: Tensor) -> Normal:
        """q(z_l | x, z_above). active: the stream behind the GELU."""
        of_stream = F.conv2d(active, self.posterior.narrow.weight[:, : self.width], self.posterior.narrow.bias)
        hidden = self.posterior.behind_narrow(of_stream + of_activation)
        mean, log_scale = self.posterior.wide(hidden).chunk(2, dim=1)
        return Normal(at_least_float(mean), at_least_float(log_scale))

    def forward(self, x: Tensor, latents_of: Callable[[Tensor, Normal], Tensor]) -> Tensor:
        """The stream, n w h h, with what this group adds. latents_of: (the stream behind the GELU, which the networks
        of prior and posterior both read, p(z_l | z_above)) -> the latents, n z h h."""
        active = F.gelu(x)
        hidden = self.prior.behind_narrow(self.prior.narrow(active))
        numbers, last = 2 * self.latents, self.prior.wide
        mean, log_scale = F.conv2d(hidden, last.weight[:numbers], last.bias[:numbers]).chunk(2, dim=1)
        latents = latents_of(active, Normal(at_least_float(mean), at_least_float(log_scale)))
        # what the prior's network adds and the projection of the latents, as one convolution of both
        weight = torch.cat([last.weight[numbers:], self.project.weight], dim=1)
        told = torch.cat([hidden, latents.to(hidden.dtype)], dim=1)
        x = x + F.conv2d(told, weight, last.bias[numbers:] + self.project.bias)
        return x + self.residual(x)


class Decoder(nn.Module):
    """From the top down: the streams and what becomes of them."""

    def __init__(self, config: VDVAEConfig, outputs: int) -> None:
        super().__init__()
        self.config = config
        _, layers = config.layers
        self.blocks: Sequence[DecoderBlock] = nn.ModuleList(  # type: ignore[assignment]
            DecoderBlock(config, layer) for layer in layers
        )
        for block in self.blocks:
            block.project.weight.data /= math.sqrt(len(layers))
            block.residual.wide.weight.data /= math.sqrt(len(layers))
        self.learned = [side for side in sorted({layer.resolution for layer in layers}) if side <= config.no_bias_above]
        self.starts = nn.ParameterList(torch.zeros(1, config.width_of(side), side, side) for side in self.learned)
        width = config.width_of(config.image_side)
        self.gain, self.shift = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))
        self.last = convolution(width, outputs, 1)

    def forward(self, count: int, latents_of: Callable[[int, Tensor, Normal], Tensor]) -> Tensor:
        """The stream of the images' resolution, count w H W. latents_of: (group, the stream behind the GELU, p(z_l |
        z_above)) -> its latents."""
        streams = {side: start.expand(count, -1, -1, -1) for side, start in zip(self.learned, self.starts, strict=True)}
        for place, block in enumerate(self.blocks):
            x = streams.get(block.side)
            if block.added is not None:
                above = streams[block.added][:, : block.width]
                above = F.interpolate(above, scale_factor=block.side // block.added, mode="nearest")
                x = above if x is None else x + above
            if x is None:
                x = self.gain.new_zeros(count, block.width, block.side, block.side)
            x = x.contiguous(memory_format=torch.channels_last)
            streams[block.side] = block(x, partial(latents_of, place))
        return streams[self.config.image_side]

    def outputs(self, x: Tensor) -> Tensor:
        """What the likelihood is told, count o H W: a convolution of gain * x + shift, whose weights take up the two.
        In float32 under autocast too: bfloat16 does not tell two levels of a pixel apart."""
        with without_autocast(x):
            bias = self.last.bias + (self.last.weight * self.shift).sum(dim=(1, 2, 3))
            return F.conv2d(x, self.last.weight * self.gain, bias)


class VDVAE(HierarchicalVAE):
    kind = "vdvae"
    config_class = VDVAEConfig
    config: VDVAEConfig

    def __init__(self, config: VDVAEConfig, image_size: tuple[int, int], binarised: Binarised | None = None) -> None:
        """image_size: (H, W) of all images, a square. Raises UserError."""
        super().__init__(config, image_size, binarised)
        if image_size != (config.image_side, config.image_side):
            raise UserError(
                f"images of {image_size[0]}x{image_size[1]} pixels with model.encoder_layers={config.encoder_layers}, "
                f"expected {config.image_side}x{config.image_side}: its first layer is of the images' resolution"
            )
        self.group_shapes = tuple((config.latents, layer.resolution, layer.resolution) for layer in config.layers[1])
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, self.likelihood.outputs)

    def network_input(self, images: Tensor) -> Tensor:
        """b c H W in [-1, 1] -> (p + pixel_shift) * pixel_scale of 8-bit values p."""
        config = self.config
        offset = (127.5 + config.pixel_shift) * config.pixel_scale
        return (images * (127.5 * config.pixel_scale) + offset).contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Of each group what its posterior's network makes of the image: a quarter of the channels of the activation
        itself, and the whole of what draws of the image's latents have in common."""
        activations = self.encoder(self.network_input(images))
        active = {side: F.gelu(activations[side]) for side in {block.side for block in self.decoder.blocks}}
        return [block.of_activation(active[block.side]) for block in self.decoder.blocks]

    def infer(self, features: Sequence[Tensor], noise: Sequence[Tensor] | None) -> tuple[list[Group], Tensor]:
        groups: list[Group] = []

        def latents_of(place: int, active: Tensor, prior: Normal) -> Tensor:
            given = features[place].contiguous(memory_format=torch.channels_last)
            posterior = self.decoder.blocks[place].posterior_of(active, given)
            latents = posterior.mean if noise is None else posterior.draw(noise[place])
            group = Group.of(latents, posterior, prior)
            if not recomputing():
                groups.append(group)
            return latents

        x = self.decoder(len(features[0]), latents_of)
        return groups, self.decoder.outputs(x)

    def generate(self, count: int, choose: Choose) -> Tensor:
        return self.decoder.outputs(self.decoder(count, lambda place, _, prior: choose(place, prior)))

    def inference_parameters(self) -> list[nn.Parameter]:
        of_posteriors = [weight for block in self.decoder.blocks for weight in block.posterior.parameters()]
        return [*self.encoder.parameters(), *of_posteriors]
