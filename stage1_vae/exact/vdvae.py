"""VD-VAE in exact arithmetic: places come before channels, `n h w c`, and latents are told in units of their priors.

Of each group the prior N(mu_p, s_p**2) has bins that are as likely as each other, so that what a bin takes on a stack
is the same for all latents of all groups; the posterior N(mu_q, s_q**2) lies among them as N((mu_q - mu_p) / s_p,
(s_q / s_p)**2) among the bins of N(0, 1). A latent is the median of its bin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common import exact
from stage1_vae.decoders.interleaved import Grid
from stage1_vae.exact.distributions import Pixels, check_finite, latents_of
from stage1_vae.exact.model import ChooseBins, ExactModel
from stage1_vae.exact.networks import Convolution
from stage1_vae.hierarchies.vdvae import VDVAE, Bottleneck, DecoderBlock

LATENT_BITS = 12  # there are thousands of latents, most of which know little: fewer bins than of a VAE's are enough
SMALLEST_SCALE = 1e-8  # of a posterior, in units of the prior


class ExactVDVAE(ExactModel):
    latent_bits = LATENT_BITS

    def __init__(self, vae: VDVAE) -> None:
        super().__init__(vae, vae.likelihood, vae.sizes)
        config, decoder = vae.config, vae.decoder
        self.pixel_shift, self.pixel_scale = config.pixel_shift, config.pixel_scale
        self.first = Convolution(vae.encoder.first)
        self.layers = [
            (ExactBottleneck(block), layer.number or 1, config.width_of(layer.resolution // (layer.number or 1)))
            for layer, block in zip(vae.encoder.layers, vae.encoder.blocks, strict=True)
        ]
        self.blocks = [ExactDecoderBlock(block) for block in decoder.blocks]
        self.starts = {
            side: start.detach().double().movedim(1, -1)
            for side, start in zip(decoder.learned, decoder.starts, strict=True)
        }
        self.gain, self.shift = (number.detach().double().flatten() for number in (decoder.gain, decoder.shift))
        self.last = Convolution(decoder.last)

    @torch.inference_mode()
    def posterior(self, values: Tensor, choose: ChooseBins) -> Tensor:
        activations = self.activations(self.in_eight_bits(values))
        found: list[Tensor] = []

        def latents_from(place: int, stream: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
            block = self.blocks[place]
            own_mean, own_log_scale = block.posterior(torch.cat([stream, activations[block.side]], dim=-1)).chunk(2, -1)
            difference = (own_mean - mean) * exact.exp(log_scale.neg())
            scale = exact.exp(own_log_scale - log_scale).clamp_(min=SMALLEST_SCALE)
            check_finite(difference)
            check_finite(scale)
            found.append(choose(difference.flatten(1), scale.flatten(1)))
            return self.latents_in(found[-1], mean, log_scale)

        self.stream(len(values), latents_from)
        return torch.cat(found, dim=1)

    @torch.inference_mode()
    def walk(self, bins: Tensor, choose: Callable[[Grid, Pixels], Tensor]) -> Tensor:
        of_groups = bins.split(self.sizes, dim=1)

        def latents_from(place: int, stream: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
            return self.latents_in(of_groups[place], mean, log_scale)

        stream = self.stream(len(bins), latents_from)
        outputs = self.last(stream * self.gain + self.shift)
        return choose(Grid(0, 0, 1), self.pixels_of(outputs)).view(*outputs.shape[:-1], self.image_shape[2])

    def activations(self, values: Tensor) -> dict[int, Tensor]:
        """n H W c of whole numbers from 0 to 255 -> by resolution what the encoder leaves, behind the GELU."""
        x = self.first((values.double() + self.pixel_shift) * self.pixel_scale)
        found = {x.shape[1]: x}
        for block, pooled, width in self.layers:
            x = x + block(x)
            if pooled > 1:
                x = F.pad(mean_of_squares(x, pooled), (0, width - x.shape[-1]))
            found[x.shape[1]] = x
        return {side: exact.gelu(activation) for side, activation in found.items()}

    def stream(self, count: int, latents_from: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """From the top down, the one of the images' resolution. latents_from: (group, its stream behind the GELU, mean
        and log of the scale of p(z_l | z_above)) -> its latents, all n h h ..."""
        streams = {side: start.expand(count, -1, -1, -1) for side, start in self.starts.items()}
        for place, block in enumerate(self.blocks):
            x = streams.get(block.side)
            if block.added is not None:
                times = block.side // block.added
                above = streams[block.added][..., : block.width]
                above = above.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
                x = above if x is None else x + above
            if x is None:
                x = torch.zeros(count, block.side, block.side, block.width, dtype=torch.float64, device=self.device)
            streams[block.side] = block(x, partial(latents_from, place))
        return streams[self.blocks[-1].side]

    def latents_in(self, bins: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """n d -> n h h z"""
        noise = latents_of(bins.flatten(), self.latent_bits).view(mean.shape)
        return noise.mul_(exact.exp(log_scale)).add_(mean)


class ExactBottleneck:
    """`n h w c` -> `n h w o`"""

    def __init__(self, block: Bottleneck) -> None:
        self.layers = [Convolution(layer) for layer in (block.narrow, block.first, block.second, block.wide)]

    def __call__(self, x: Tensor) -> Tensor:
        return self.behind_gelu(exact.gelu(x))

    def behind_gelu(self, x: Tensor) -> Tensor:
        first, *rest = self.layers
        x = first(x)
        for layer in rest:
            x = layer(exact.gelu(x))
        return x


class ExactDecoderBlock:
    def __init__(self, block: DecoderBlock) -> None:
        self.side, self.added, self.latents, self.width = block.side, block.added, block.latents, block.width
        self.own_posterior, self.prior = ExactBottleneck(block.posterior), ExactBottleneck(block.prior)
        self.project, self.residual = Convolution(block.project), ExactBottleneck(block.residual)

    def posterior(self, told: Tensor) -> Tensor:
        """Stream and activation behind the GELU, n h h 2w -> mean and log of the scale, n h h 2z."""
        return self.own_posterior.behind_gelu(told)

    def __call__(self, x: Tensor, latents_from: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        stream = exact.gelu(x)
        mean, log_scale, added = self.prior.behind_gelu(stream).split([self.latents, self.latents, self.width], dim=-1)
        latents = latents_from(stream, mean, log_scale)
        x = x + added + self.project(latents)
        return x + self.residual(x)


def mean_of_squares(x: Tensor, side: int) -> Tensor:
    """Of squares of side by side places, added up one after the other: n h w c -> n h/side w/side c."""
    parts = x.unfold(1, side, side).unfold(2, side, side).flatten(-2).unbind(-1)
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total.mul_(1 / side**2)
