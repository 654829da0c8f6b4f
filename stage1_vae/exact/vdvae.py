"""VD-VAE in exact arithmetic: places come before channels, `n h w c`, and latents are told in units of their priors.

Of each group the prior N(mu_p, s_p**2) has bins that are as likely as each other, so that what a bin takes on a stack
is the same for all latents of all groups; the posterior N(mu_q, s_q**2) lies among them as N((mu_q - mu_p) / s_p,
(s_q / s_p)**2) among the bins of N(0, 1). A latent is the median of its bin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import exact
from stage1_vae.decoders.interleaved import Grid
from stage1_vae.exact.distributions import check_finite, latents_of
from stage1_vae.exact.model import ChooseBins, ChoosePixels, ExactModel, Posterior
from stage1_vae.exact.networks import Convolution
from stage1_vae.hierarchies.vdvae import VDVAE, Bottleneck, DecoderBlock

LATENT_BITS = 12  # there are thousands of latents, most of which know little: fewer bins than of a VAE's are enough
SMALLEST_SCALE = 1e-8  # of a posterior, in units of the prior


class Told(NamedTuple):
    """What a group is told by those above it, n h h ...: its stream behind the GELU, and p(z_l | z_above)."""

    stream: Tensor
    mean: Tensor
    log_scale: Tensor


class Descent(NamedTuple):
    """What the decoder makes of all groups of latents."""

    stream: Tensor  # of the images' resolution, n H W w
    told: list[Told]  # of each group


class ExactVDVAE(ExactModel[Descent]):
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
    def infer(self, values: Tensor, choose: ChooseBins) -> tuple[Tensor, Descent]:
        activations, found = self.activations(values), list[Tensor]()

        def latents_from(place: int, told: Told) -> Tensor:
            found.append(choose(self.posterior(place, told, activations)))
            return self.latents_in(found[-1], told)

        descent = self.stream(len(values), latents_from)
        return torch.cat(found, dim=1), descent

    @torch.inference_mode()
    def descend(self, bins: Tensor) -> Descent:
        of_groups = bins.split(self.sizes, dim=1)
        return self.stream(len(bins), lambda place, told: self.latents_in(of_groups[place], told))

    @torch.inference_mode()
    def pixels(self, state: Descent, choose: ChoosePixels) -> Tensor:
        outputs = self.last(state.stream * self.gain + self.shift)
        return choose(Grid(0, 0, 1), self.distributions(outputs)).view(*outputs.shape[:-1], self.image_shape[2])

    @torch.inference_mode()
    def posteriors(self, values: Tensor, state: Descent) -> list[Posterior]:
        activations = self.activations(values)
        return [self.posterior(place, told, activations) for place, told in enumerate(state.told)]

    def posterior(self, place: int, told: Told, activations: dict[int, Tensor]) -> Posterior:
        block = self.blocks[place]
        read = torch.cat([told.stream, activations[block.side]], dim=-1)
        mean, log_scale = block.posterior.behind_gelu(read).chunk(2, dim=-1)
        difference = (mean - told.mean) * exact.exp(told.log_scale.neg())
        ratio = exact.exp(log_scale - told.log_scale).clamp_(min=SMALLEST_SCALE)
        check_finite(difference)
        check_finite(ratio)
        return Posterior(difference.flatten(1), ratio.flatten(1))

    def activations(self, values: Tensor) -> dict[int, Tensor]:
        """n H W c from 0 to 2**bits - 1 -> by resolution what the encoder leaves, behind the GELU."""
        x = self.first((self.in_eight_bits(values).double() + self.pixel_shift) * self.pixel_scale)
        found = {x.shape[1]: x}
        for block, pooled, width in self.layers:
            x = x + block(x)
            if pooled > 1:
                x = F.pad(mean_of_squares(x, pooled), (0, width - x.shape[-1]))
            found[x.shape[1]] = x
        return {side: exact.gelu(activation) for side, activation in found.items()}

    def stream(self, count: int, latents_from: Callable[[int, Told], Tensor]) -> Descent:
        """From the top down. latents_from: group -> its latents, n h h z."""
        all_told: list[Told] = []
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
            told, added = block.tell(x)
            all_told.append(told)
            streams[block.side] = block.after(x + added, latents_from(place, told))
        return Descent(streams[self.blocks[-1].side], all_told)

    def latents_in(self, bins: Tensor, told: Told) -> Tensor:
        """n d -> n h h z"""
        noise = latents_of(bins, self.latent_bits).view(told.mean.shape)
        return noise.mul_(exact.exp(told.log_scale)).add_(told.mean)


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
        self.posterior, self.prior = ExactBottleneck(block.posterior), ExactBottleneck(block.prior)
        self.project, self.residual = Convolution(block.project), ExactBottleneck(block.residual)

    def tell(self, x: Tensor) -> tuple[Told, Tensor]:
        """Of a stream, n h h w: p(z_l | z_above), and what is added to it whatever z_l is."""
        stream = exact.gelu(x)
        mean, log_scale, added = self.prior.behind_gelu(stream).split([self.latents, self.latents, self.width], dim=-1)
        return Told(stream, mean, log_scale), added

    def after(self, x: Tensor, latents: Tensor) -> Tensor:
        x = x + self.project(latents)
        return x + self.residual(x)


def mean_of_squares(x: Tensor, side: int) -> Tensor:
    """Of squares of side by side places, added up one after the other: n h w c -> n h/side w/side c."""
    parts = x.unfold(1, side, side).unfold(2, side, side).flatten(-2).unbind(-1)
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total.mul_(1 / side**2)
