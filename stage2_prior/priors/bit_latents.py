"""What a next-scale prior sees of scales of bits: the latents of Infinity's tokenizer (Han et al. 2024,
arXiv:2412.04431, section 3.2), which the codes alone tell."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.priors.bitwise import bits_of, bits_of_vocabulary


class BitLatents:
    """With sum 0 = 0, and from scale 1 to the last but one of S:

        sum s = sum s-1 + (bilinear up-sampling, to the last scale's size, of +-1/sqrt(d), by the bits of scale s)

    Scale s + 1 sees sum s, bilinearly on its own grid. All of it in float32; nothing learns. A scale has one grid or
    several, whose bits are those of the next channels, first bit most significant.
    """

    def __init__(self, code_spec: CodeSpec) -> None:
        """Raises UserError for codes that are no bits on scales."""
        grids = code_spec.grids
        self.shapes = [(grid.height, grid.width) for grid in grids]
        scales = scales_of(grids)
        ends = list(accumulate(bits_of_vocabulary(grids[number]) for number in scales[0]))
        self.channels = [slice(first, end) for first, end in pairwise([0, *ends])] * len(scales)  # of each grid
        self.width = ends[-1]  # d
        self.corner = self.width**-0.5

    def signs(self, codes: Tensor, number: int) -> Tensor:
        """1 or -1 in each channel of grid `number`, of its codes, b n: b n bits."""
        channels = self.channels[number]
        return 2 * bits_of(codes, channels.stop - channels.start).flip(-1) - 1

    def vectors(self, codes: Tensor, number: int) -> Tensor:
        """What the codes, b n, of grid `number` add there: b n bits, float32."""
        return self.signs(codes, number).float() * self.corner

    def add(self, total: Tensor | None, codes: Tensor, number: int) -> Tensor:
        """The sum, b d h w, after grid `number`, counted from 0. total: the one before it, None at the first; codes:
        b h w or in one row."""
        (height, width), channels = self.shapes[number], self.channels[number]
        with torch.autocast(codes.device.type, enabled=False):
            vectors = rearrange(self.vectors(codes.flatten(1), number), "b (h w) d -> b d h w", h=height, w=width)
            grown = resized(vectors, self.shapes[-1])
            padding = (0, 0, 0, 0, channels.start, self.width - channels.stop)
            grown = F.pad(grown, padding) if any(padding) else grown
            return grown if total is None else total + grown

    def seen_by(self, number: int, total: Tensor) -> Tensor:
        """The sum before grid `number`, on its grid: b n d."""
        return rearrange(resized(total, self.shapes[number]), "b d h w -> b (h w) d")

    def missing(self, number: int, rest: Tensor) -> Tensor:
        """Of latents b d h w what grid `number` has to describe, b n bits: an average, as the tokenizer takes it, in
        its own channels."""
        averages = F.interpolate(rest[:, self.channels[number]], size=self.shapes[number], mode="area")
        return rearrange(averages, "b d h w -> b (h w) d")

    def wanted(self, codes: Tensor, missing: Tensor, number: int) -> Tensor:
        """The codes, b n, by the signs of their numbers and of what is missing beside them, b n bits."""
        signs = self.vectors(codes, number) + missing > 0
        places = torch.arange(signs.shape[-1] - 1, -1, -1, device=codes.device)
        return (signs.long() << places).sum(dim=-1)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x, b d h w, bilinearly at another size."""
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear")


def scales_of(grids: Sequence[Grid]) -> list[range]:
    """The numbers of the grids of each scale. Raises UserError for codes that are no bits on scales."""
    sides = [(grid.height, grid.width) for grid in grids]
    starts = [number for number, own in enumerate(sides) if number == 0 or sides[number - 1] != own]
    found = [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(grids)], strict=True)]
    kinds = {tuple(grids[number].vocabulary for number in scale) for scale in found}
    bits = all(grid.vocabulary & (grid.vocabulary - 1) == 0 and grid.vocabulary > 1 for grid in grids)
    grow = all(x <= y for before, after in pairwise(sides) for x, y in zip(before, after, strict=True))
    if len(found) < 2 or len(kinds) > 1 or not bits or not grow:
        described = " + ".join(f"{grid.height}x{grid.width} codes of {grid.vocabulary}" for grid in grids)
        raise UserError(
            f"got {described}, expected two or more scales of rising sides with as many bits at each place: an "
            "infinity prior predicts bits scale after scale; take an autoencoder with quantizer.kind=multiscale_bsq, "
            "or a transformer prior"
        )
    return found


def places_on_last(scales: Sequence[Grid]) -> list[int]:
    """At which place of the last scale each place of all scales stands, as published: its row and column are grown as
    the sides are, and rounded to the nearest, of two to the even one."""
    last = scales[-1]
    found = []
    for grid in scales:
        rows = [round(Fraction(row * last.height, grid.height)) for row in range(grid.height)]
        columns = [round(Fraction(column * last.width, grid.width)) for column in range(grid.width)]
        found += [row * last.width + column for row in rows for column in columns]
    return found
