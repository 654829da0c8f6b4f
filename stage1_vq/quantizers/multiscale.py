"""Multi-scale residual quantizer of VAR (Tian et al. 2024, arXiv:2404.02905, section 3.2 and algorithms 1 and 2).

A map of latents becomes grids of codes from 1x1 up to its own size, all of one codebook: each grid describes what the
coarser ones left, and a prior can draw a whole grid at once given the ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.codebook import Codebook, CodebookInit, CodebookSettings, CodebookUpdate, codebook_rules
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.gradients import StraightThrough
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class MultiscaleQuantizerConfig:
    """VAR's own settings are these defaults with codebook_update=gradient, kmeans_iterations=0 and revive_after=0.

    By gradient the code vectors lag behind the latents early in training, phi learns to stretch them, and a code that
    is revived, of full length, is then far off: there better leave revive_after at 0.
    """

    kind: Literal["multiscale"] = "multiscale"
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # sides of the grids, coarse to fine: the last is h = w
    codebook_size: int = 4096  # k, of the one codebook of all scales
    dim: int = 32  # d, width of z and z_q
    commitment_weight: float = 0.25  # beta: pulls the latents to the sum of the scales
    codebook_update: CodebookUpdate = "ema"  # how code vectors follow what they stand for
    decay: float = 0.99  # of the moving averages (ema only)
    phis: int = 4  # 3x3 convolutions after up-sampling, each shared by neighbouring scales
    phi_share: float = 0.5  # of the convolution in what phi adds; the rest is the up-sampled map itself
    kmeans_iterations: int = 10  # on the first batch's latents, to start the codebook from; 0 starts from noise
    revive_after: int = 100  # steps without use, after which a latent takes the place of a code; 0 never
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns
    init: CodebookInit = "unit"  # code vectors at first, without k-means: length 1 or so, +-1/codebook_size, normal

    def __post_init__(self) -> None:
        rising = min(self.scales, default=0) >= 1 and list(self.scales) == sorted(set(self.scales))
        count = len(self.scales)
        fitting = [phis for phis in range(1, count + 1) if len(set(phi_of_each_scale(count, phis))) == phis]
        rules = [
            *codebook_rules(self),
            ("scales", rising, "one or more rising sides from 1 on, such as 1, 2, 4, 8"),
            ("dim", self.dim >= 1, "at least 1"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more; the paper has 0.25"),
            ("phis", self.phis in fitting, f"one of {fitting}, of which {count} scales leave none unused"),
            ("phi_share", 0 < self.phi_share <= 1, "above 0 and at most 1; the paper has 0.5"),
        ]
        check_fields(self, rules)


class MultiscaleQuantizer(Quantizer):
    """With f the latents, and from scale 1 to S of them:

        rest = f - sum
        codes_s = nearest(area-average of rest on the grid of scale s)
        sum = sum + phi_s(bicubic up-sampling of the code vectors)

    z_q is the last sum, with the gradient passed straight to z; phi, and the codebook by gradient, learn from the
    losses. All of it in float32.
    """

    config_class = MultiscaleQuantizerConfig

    def __init__(self, config: MultiscaleQuantizerConfig) -> None:
        super().__init__(config.dim)
        self.config = config
        self.layer = Codebook(
            CodebookSettings(
                size=config.codebook_size,
                width=config.dim,
                update=config.codebook_update,
                decay=config.decay,
                init=config.init,
                kmeans_iterations=config.kmeans_iterations,
                revive_after=config.revive_after,
                warn_usage_below=config.warn_usage_below,
            )
        )
        self.phis = nn.ModuleList(identity_convolution(config.dim) for _ in range(config.phis))
        self.phi_of_scale = phi_of_each_scale(len(config.scales), config.phis)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of each scale's grid: those of the config for square latents of its last size, in
        proportion for any others; the last one is `height` x `width`."""
        return scale_sizes(self.config.scales, height, width)

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """One per scale, `scale0` first."""
        sizes = self.sizes(height, width)
        return tuple(Grid(f"scale{number}", h, w, self.config.codebook_size) for number, (h, w) in enumerate(sizes))

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses, squared errors per element of the sum after each scale, averaged over the scales:
        `commitment_loss`, times its weight, and `codebook_loss`; statistics: `quantization_error`, that of the last."""
        self.check_latents(z)
        with float32_island(z.device.type):
            latents = z.float()
            target, total = latents.detach(), torch.zeros_like(latents)
            found: list[Tensor] = []
            errors: dict[str, list[Tensor]] = {"commitment_loss": [], "codebook_loss": []}
            for number, size in enumerate(self.sizes(*z.shape[2:])):
                rest = self.shrink(target - total.detach(), number, size)
                found.append(self.layer.nearest(rest, self.layer.codebook.detach(), note=self.training))
                total = total + self.grow(found[-1], number, target.shape[2:])
                errors["codebook_loss"].append(squared_error(total, target))
                if self.config.commitment_weight:
                    error = squared_error(latents, total.detach())
                    errors["commitment_loss"].append(self.config.commitment_weight * error)
            if self.training:
                self.layer.join_calls(len(found), len(z))
            losses = {name: torch.stack(values).mean() for name, values in errors.items() if values}
            statistics = {"quantization_error": errors["codebook_loss"][-1].detach()}
            z_q = StraightThrough.apply(latents, total.detach()).to(z.dtype)
            return Quantized(z_q, tuple(found), losses, statistics)

    def codes(self, z: Tensor) -> Codes:
        return self.codes_after(z, ())

    @torch.no_grad()
    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """Each scale describes what the ones before it, as they were chosen, leave of z."""
        self.check_latents(z)
        with float32_island(z.device.type):
            return self.walk(z.float(), chosen)[1]

    def walk(self, z: Tensor, chosen: Codes = ()) -> tuple[list[Tensor], Codes]:
        """What each scale has to describe, and its codes: the loop of `forward` without its losses. chosen: as for
        `codes_after`."""
        total = torch.zeros_like(z)
        rests: list[Tensor] = []
        found: list[Tensor] = []
        for number, size in enumerate(self.sizes(*z.shape[2:])):
            rests.append(self.shrink(z - total, number, size))
            found.append(chosen[number] if number < len(chosen) else self.layer.codes(rests[-1]))
            total = total + self.grow(found[-1], number, z.shape[2:])
        return rests, tuple(found)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        return self.latents_of_prefix(codes, codes[-1].shape[1], codes[-1].shape[2])

    def latents_of_prefix(self, codes: Sequence[Tensor], height: int, width: int) -> Tensor:
        """The sum, b d `height` `width`, of the first scales alone: as many as there are codes, b h w each."""
        with float32_island(codes[0].device.type):
            b = len(codes[0])
            total = torch.zeros(b, self.dim, height, width, device=codes[0].device)
            for number, grid in enumerate(codes):
                total = total + self.grow(grid, number, total.shape[2:])
            return total

    def next_scale_input(self, latents: Tensor, number: int) -> Tensor:
        """What a next-scale prior sees when it draws scale `number`, 1 to S - 1: the sum of the scales before it,
        b d h w as `latents_of_prefix` gives it, averaged on that scale's grid: b d h_s w_s."""
        return self.shrink(latents, number, self.sizes(*latents.shape[2:])[number])

    def next_scale_inputs(self, codes: Codes) -> tuple[Tensor, ...]:
        """`next_scale_input` of all scales but the first, given all codes: what a prior is trained on."""
        height, width = codes[-1].shape[1:]
        with float32_island(codes[0].device.type):
            total = torch.zeros(len(codes[0]), self.dim, height, width, device=codes[0].device)
            inputs: list[Tensor] = []
            for number, grid in enumerate(codes[:-1]):
                total = total + self.grow(grid, number, total.shape[2:])
                inputs.append(self.next_scale_input(total, number + 1))
        return tuple(inputs)

    def shrink(self, x: Tensor, number: int, size: tuple[int, int]) -> Tensor:
        """x, b d h w, averaged on the grid of scale `number`, whose size is `size`."""
        last = number == len(self.config.scales) - 1
        return x if last else F.interpolate(x, size=size, mode="area")

    def grow(self, codes: Tensor, number: int, size: Sequence[int]) -> Tensor:
        """What the codes of scale `number`, b h w, add to a map of `size`: b d *size."""
        x = rearrange(F.embedding(codes, self.layer.codebook), "b h w d -> b d h w")
        if number < len(self.config.scales) - 1:
            x = F.interpolate(x, size=tuple(size), mode="bicubic")
        phi, share = self.phis[self.phi_of_scale[number]], self.config.phi_share
        return (1 - share) * x + share * phi(x)

    @torch.no_grad()
    def scale_latents(self) -> dict[str, Tensor] | None:
        """`codebook`, k d, and of each scale but the last, whose codes no later scale sees, the convolution behind the
        up-sampling, phi and its share in one: `phi_weight`, s-1 d d 3 3, and `phi_bias`, s-1 d."""
        if len(self.config.scales) == 1:
            return None
        share, identity = self.config.phi_share, identity_convolution(self.dim).weight.to(self.layer.codebook.device)
        phis = [cast(nn.Conv2d, self.phis[number]) for number in self.phi_of_scale[:-1]]
        return {
            "codebook": self.layer.codebook.detach(),
            "phi_weight": torch.stack([(1 - share) * identity + share * phi.weight for phi in phis]),
            "phi_bias": torch.stack([share * cast(Tensor, phi.bias) for phi in phis]),
        }

    # ---- the codebook, once per step --------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means over the latents, and then over what each scale has to describe under the codebook which that
        gives."""
        if not self.config.kmeans_iterations:
            return
        with float32_island(batches[0].device.type):
            latents = [z.float() for z in batches]
            self.layer.initialise(latents)
            of_scales = [self.walk(z)[0] for z in latents]
            rows = [[rearrange(rest, "b d h w -> b d (h w) 1") for rest in rests] for rests in of_scales]
            self.layer.initialise([torch.cat(rests, 2) for rests in rows])

    def update(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """Moves the codebook (ema) by what all scales saw, revives dead codes; health: of `Codebook.update`."""
        return self.layer.update(steps_per_epoch)

    def discard(self) -> None:
        self.layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        return self.layer.warnings(metrics, steps_per_epoch, self.path)


def scale_sizes(scales: Sequence[int], height: int, width: int) -> list[tuple[int, int]]:
    """Of each scale, a side for square latents of the last one's size, height and width of its grid: in proportion for
    any others; the last one is `height` x `width`."""

    def side(scale: int, of: int) -> int:
        return max(1, int(scale * of / scales[-1] + 0.5))

    return [(side(scale, height), side(scale, width)) for scale in scales]


def identity_convolution(channels: int) -> ProductConv2d:
    """3x3. Beginning as the identity, phi leaves the sums what k-means on the rests takes them for."""
    convolution = ProductConv2d(channels, channels, 3)
    nn.init.dirac_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def phi_of_each_scale(scales: int, phis: int) -> list[int]:
    """Which phi each scale takes: the one whose tick is nearest to the scale's place between 0 and 1.

    The ticks are those of the published code. Ties, such as scales 2 and 7 of 10, are decided by rounding, so this
    stays in float64 NumPy: weights trained with that code fit no other list.
    """
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(edge, 1 - edge, phis)
    places: Any = [number / max(scales - 1, 1) for number in range(scales)]
    return [int(np.argmin(np.abs(ticks - place))) for place in places]
