"""What quantizers by scales share: a map of latents as a sum of maps that codes of ever finer grids stand for (VAR,
Tian et al. 2024, arXiv:2404.02905, section 3.2 and algorithms 1 and 2).

Each grid describes what the coarser ones left, and a prior can draw a whole grid at once given the ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantizer
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.parts import draw_kept


class ScaleFields(Protocol):
    """The fields by which configs speak of scales: see MultiscaleQuantizerConfig."""

    @property
    def scales(self) -> tuple[int, ...]: ...
    @property
    def phis(self) -> int: ...
    @property
    def phi_share(self) -> float: ...
    @property
    def quantizer_dropout(self) -> float: ...
    @property
    def fewest_scales(self) -> int: ...


def scale_rules(config: ScaleFields, fitting: Sequence[int]) -> list[tuple[str, bool, str]]:
    """For `common.errors.check_fields`; fitting: numbers of phis of which none is left unused."""
    rising = min(config.scales, default=0) >= 1 and list(config.scales) == sorted(config.scales)
    count = len(config.scales)
    return [
        ("scales", rising, "one or more rising sides from 1 on, such as 1, 2, 4, 8, or 1, 1, 2, 3, 3"),
        ("phis", config.phis in fitting, f"one of {list(fitting)}, of which {count} scales leave none unused"),
        ("phi_share", 0 < config.phi_share <= 1, "above 0 and at most 1; the paper has 0.5"),
        ("quantizer_dropout", 0 <= config.quantizer_dropout <= 1, "a share from 0 to 1; ImageFolder has 0.1"),
        ("fewest_scales", 1 <= config.fewest_scales <= max(count, 1), f"from 1 to {count}, the number of scales"),
    ]


class ScaleQuantizer(Quantizer):
    """With f the latents, and from scale 1 to S of them:

        rest = f - sum
        codes_s = `nearest` of the area-average of rest on the grid of scale s
        sum = sum + phi_s(up-sampling of `vectors` of the codes)

    z_q is the last sum, or with quantizer dropout that after some scale. Each such quantizer says what `nearest` and
    `vectors` are, and its losses.
    """

    upsampling: Literal["bicubic", "bilinear"] = "bicubic"
    config: Any
    phi_of_scale: list[int]  # which phi each scale takes

    phis: nn.ModuleList  # `phi_convolutions`

    def __init__(self, config: Any, dim: int, inner: int, phi_of_scale: list[int]) -> None:
        """inner: width of the vectors that are summed."""
        super().__init__(dim)
        self.config, self.inner, self.phi_of_scale = config, inner, phi_of_scale

    # ---- what each says ---------------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        raise NotImplementedError

    def nearest(self, rest: Tensor, number: int) -> Tensor:
        """Codes, b h w, of what scale `number` has to describe, b inner h w; they count for nothing."""
        raise NotImplementedError

    def vectors(self, codes: Tensor, number: int) -> Tensor:
        """b h w to b inner h w."""
        raise NotImplementedError

    def narrow(self, z: Tensor) -> Tensor:
        """What the scales describe of z, b dim h w, float32: b inner h w."""
        return z

    def widened(self, total: Tensor) -> Tensor:
        """z_q of a sum of scales: the way back."""
        return total

    def scale_parts(self) -> dict[str, Tensor] | None:
        """As `scale_latents`, with the phi of the last scale, and `gains`, s inner, where a scale adds other than the
        code vectors: these, number by number, times them."""
        return None

    # ---- grids ------------------------------------------------------------------------------------------------------

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of each scale's grid: those of the config for square latents of its last size, in
        proportion for any others; the last one is `height` x `width`."""
        return scale_sizes(self.config.scales, height, width)

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """One per scale, `scale0` first."""
        sizes = self.sizes(height, width)
        return tuple(Grid(f"scale{number}", h, w, self.vocabulary) for number, (h, w) in enumerate(sizes))

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    def draw_kept(self, b: int, device: torch.device) -> Tensor | None:
        """Codes, codebooks and losses know nothing of it: every scale learns from every image. As a draw is
        independent of its image, losses of kept scales alone would have the same mean, and more noise."""
        config = self.config
        if not (self.training and config.quantizer_dropout):
            return None
        return draw_kept(b, len(config.scales), config.quantizer_dropout, device, fewest=config.fewest_scales)

    def seen_by_decoder(self, sums: Sequence[Tensor], kept: Tensor | None) -> Tensor:
        """Of the sums after each scale, b d h w, the last, or the one after as many scales as are kept, b."""
        if kept is None:
            return sums[-1]
        return torch.stack(tuple(sums), 1)[torch.arange(len(kept), device=kept.device), kept - 1]

    def codes(self, z: Tensor) -> Codes:
        return self.codes_after(z, ())

    @torch.no_grad()
    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """Each scale describes what the ones before it, as they were chosen, leave of z."""
        self.check_latents(z)
        with float32_island(z.device.type):
            return self.walk(self.narrow(z.float()), chosen)[1]

    def walk(self, z: Tensor, chosen: Codes = ()) -> tuple[list[Tensor], Codes]:
        """What each scale has to describe of narrow latents, and its codes: the loop of `forward` without its losses.
        chosen: as for `codes_after`."""
        total = torch.zeros_like(z)
        rests: list[Tensor] = []
        found: list[Tensor] = []
        for number, size in enumerate(self.sizes(*z.shape[2:])):
            rests.append(self.shrink(z - total, number, size))
            found.append(chosen[number] if number < len(chosen) else self.nearest(rests[-1], number))
            total = total + self.grow(found[-1], number, z.shape[2:])
        return rests, tuple(found)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        return self.latents_of_first(codes, codes[-1].shape[1], codes[-1].shape[2])

    def latents_of_first(self, codes: Codes, height: int, width: int) -> Tensor:
        total = self.latents_of_prefix(codes, height, width)
        with float32_island(total.device.type):
            return self.widened(total)

    def latents_of_prefix(self, codes: Sequence[Tensor], height: int, width: int) -> Tensor:
        """The sum, b inner `height` `width`, of the first scales alone: as many as there are codes, b h w each."""
        with float32_island(codes[0].device.type):
            b = len(codes[0])
            total = torch.zeros(b, self.inner, height, width, device=codes[0].device)
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
            total = torch.zeros(len(codes[0]), self.inner, height, width, device=codes[0].device)
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
        return self.grown(self.vectors(codes, number), number, size)

    def grown(self, x: Tensor, number: int, size: Sequence[int]) -> Tensor:
        """What vectors of scale `number`, b d h w, add to a map of `size`: b d *size."""
        if number < len(self.config.scales) - 1:
            x = F.interpolate(x, size=tuple(size), mode=self.upsampling)
        phi, share = self.phis[self.phi_of_scale[number]], self.config.phi_share
        return (1 - share) * x + share * phi(x)

    # ---- for next-scale priors --------------------------------------------------------------------------------------

    @torch.no_grad()
    def folded_phis(self) -> dict[str, Tensor]:
        """Of each scale the convolution behind the up-sampling, phi and its share in one: `phi_weight`, s d d 3 3, and
        `phi_bias`, s d."""
        phis = [cast(nn.Conv2d, self.phis[number]) for number in self.phi_of_scale]
        share, identity = self.config.phi_share, identity_convolution(self.inner).weight.to(phis[0].weight.device)
        return {
            "phi_weight": torch.stack([(1 - share) * identity + share * phi.weight for phi in phis]),
            "phi_bias": torch.stack([share * cast(Tensor, phi.bias) for phi in phis]),
        }

    @torch.no_grad()
    def scale_latents(self) -> dict[str, Tensor] | None:
        """`codebook`, k d, and of each scale but the last, whose codes no later scale sees, the convolution behind the
        up-sampling, phi and its share in one: `phi_weight`, s-1 d d 3 3, and `phi_bias`, s-1 d. Where a scale adds
        other than the code vectors also `gains`, s d: what it adds of each of their numbers."""
        parts = self.scale_parts()
        return None if parts is None or len(self.config.scales) == 1 else without_last_phi(parts)


def scale_sizes(scales: Sequence[int], height: int, width: int) -> list[tuple[int, int]]:
    """Of each scale, a side for square latents of the last one's size, height and width of its grid: in proportion for
    any others; the last one is `height` x `width`."""

    def side(scale: int, of: int) -> int:
        return max(1, int(scale * of / scales[-1] + 0.5))

    return [(side(scale, height), side(scale, width)) for scale in scales]


def without_last_phi(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """`scale_parts` as a prior takes them: no scale sees the codes of the last."""
    return {name: tensor[:-1] if name.startswith("phi") else tensor for name, tensor in parts.items()}


def identity_convolution(channels: int) -> ProductConv2d:
    """3x3. Beginning as the identity, phi leaves the sums what k-means on the rests takes them for."""
    convolution = ProductConv2d(channels, channels, 3)
    nn.init.dirac_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def phi_convolutions(channels: int, phis: int) -> nn.ModuleList:
    return nn.ModuleList(identity_convolution(channels) for _ in range(phis))


def phi_of_each_scale(scales: int, phis: int) -> list[int]:
    """Which phi each scale takes: the one whose tick is nearest to the scale's place between 0 and 1.

    The ticks are those of the published code. Ties, such as scales 2 and 7 of 10, are decided by rounding, so this
    stays in float64 NumPy: weights trained with that code fit no other list.
    """
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(edge, 1 - edge, phis)
    places: Any = [number / max(scales - 1, 1) for number in range(scales)]
    return [int(np.argmin(np.abs(ticks - place))) for place in places]


def fitting_phis(scales: int) -> list[int]:
    """Numbers of phis of which `phi_of_each_scale` leaves none unused."""
    return [phis for phis in range(1, scales + 1) if len(set(phi_of_each_scale(scales, phis))) == phis]
