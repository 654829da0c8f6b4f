"""Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505): each number of a narrow latent is rounded to one
of a few levels, and the codebook is the grid of all combinations. It has no codebook to learn and none to collapse.

With, by choice, the levels spread evenly from -1 to 1, and noise in their place now and then (Parker et al. 2024,
arXiv:2411.19842, section 3.2), and a rotation before the rounding, so that no number has the large ones for itself (the
incoherence of Chee et al. 2023, arXiv:2307.13304). And, as Bachmann et al. 2025 (FlexTok, arXiv:2502.13967) have it,
images that training does not round, and codes that it draws anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes
from common.draws import uniform
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.float32 import ProductConv2d, turned
from stage1_vq.quantizers.gradients import StraightThrough

WIDENING = 1e-3  # of the range of tanh, so that the outermost levels are reached by finite latents
MOST_CODES = 2**24


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """The paper advises 5 or more levels each: 8-6-5 for 240 codes, 8-5-5-5 for 1,000, 7-5-5-5-5 for 4,375, 8-8-8-6-5
    for 15,360."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)  # of each number of the latent; their product is the vocabulary
    dim: int = 4  # width of z and z_q; other than the number of levels: with a 1x1 convolution before and one after
    preserve_symmetry: bool = False  # levels evenly from -1 to 1, also where their number is even
    bound: Literal["tanh", "clamp"] = "tanh"  # how numbers come to lie between the outermost levels (clamp: symmetric)
    noise_dropout: float = 0.0  # share of numbers to which training adds -0.5 to 0.5 (preserve_symmetry only)
    unrounded: float = 0.0  # share of images whose numbers training bounds, but does not round
    corruption: float = 0.0  # most of an image's codes that training draws anew: each image's share is from 0 to it
    orthogonal_rotation: bool = False  # numbers are turned by a fixed random rotation before, and back after
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        rules = [
            ("levels", len(self.levels) > 0 and min(self.levels) >= 2, "numbers of at least 2, such as [8, 5, 5, 5]"),
            ("levels", math.prod(self.levels) <= MOST_CODES, f"a product of at most {MOST_CODES}: use fewer or lower"),
            ("dim", self.dim >= 1, "at least 1"),
            ("bound", self.bound in ("tanh", "clamp"), "tanh or clamp"),
            ("bound", self.bound == "tanh" or self.preserve_symmetry, "tanh where preserve_symmetry=false"),
            ("noise_dropout", 0 <= self.noise_dropout <= 1, "a share from 0 to 1; 0.5 is common"),
            (
                "noise_dropout",
                not self.noise_dropout or self.preserve_symmetry,
                "0 where preserve_symmetry=false: the noise is of the size of levels from -1 to 1",
            ),
            ("unrounded", 0 <= self.unrounded <= 1, "a share from 0 to 1; 0.1 is common"),
            ("corruption", 0 <= self.corruption <= 1, "a share from 0 to 1"),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
        ]
        check_fields(self, rules)


class FSQuantizer(CountingQuantizer):
    """z -> [1x1 convolution to len(levels)] -> [rotation] -> bounded by tanh -> rounded -> [noise] -> [rotation back]
    -> [1x1 convolution to dim] -> z_q.

    A level's place among the L of its number is its digit, 0 to L - 1; the digits, first one fastest, are the code.
    The rounding passes gradients straight through. All in float32, also under autocast; z_q has the type of z.
    """

    config_class = FSQConfig
    remedies = ("fewer or lower {path}.levels",)

    levels: Tensor  # levels 1 1
    places: Tensor  # levels 1 1, int64: what a digit is worth in the code
    half_range: Tensor  # levels 1 1: tanh times this
    shift: Tensor  # levels 1 1: puts the latent 0 on a level where the number of levels is even
    centre: Tensor  # levels 1 1: the digit, or the point between two, that stands for 0
    rotation: Tensor  # levels levels, with orthogonal_rotation: row i is where number i goes
    step: Tensor  # levels 1 1: between neighbouring levels, in z_q

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config.dim, math.prod(config.levels), config.warn_usage_below)
        self.config = config
        count = len(config.levels)
        projected = config.dim != count
        self.project_in = ProductConv2d(config.dim, count) if projected else nn.Identity()
        self.project_out = ProductConv2d(count, config.dim) if projected else nn.Identity()

        if config.orthogonal_rotation:
            self.register_buffer("rotation", nn.init.orthogonal_(torch.empty(count, count)))

        half_ranges, shifts, centres, steps = [], [], [], []
        for levels in config.levels:
            if config.preserve_symmetry:
                half_ranges.append((levels - 1) / 2)
                shifts.append(0.0)
                centres.append((levels - 1) / 2)
                steps.append(2 / (levels - 1))
            else:
                # An even number of levels has one more below 0 than above; tanh is moved by half a level with them.
                half_ranges.append((levels - 1) * (1 + WIDENING) / 2)
                shifts.append(math.atanh(0.5 / half_ranges[-1]) if levels % 2 == 0 else 0.0)
                centres.append(float(levels // 2))
                steps.append(1 / (levels // 2))
        constants = {"half_range": half_ranges, "shift": shifts, "centre": centres, "step": steps}
        constants["levels"] = list(config.levels)
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        places = [math.prod(config.levels[:number]) for number in range(count)]
        self.register_buffer("places", torch.tensor(places).view(-1, 1, 1), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. With noise_dropout, unrounded or corruption training mode draws (common/draws.py): a code that is
        drawn anew is in `codes` and in z_q, and z has no gradient there. No losses; statistics:
        `quantization_error`, the squared error per number of the narrow latent, on the scale of its levels in z_q."""
        with float32_island(z.device.type):
            bounded = self.bounded(z)
            digits = self.digits(bounded)
            codes = self.codes_of(digits)
            if self.training:
                self.usage.note(codes)
            values = self.values(StraightThrough.apply(bounded, digits))
            if self.training and self.config.unrounded:
                left = uniform(len(z), 1, 1, 1, device=z.device) < self.config.unrounded
                values = torch.where(left, self.values(bounded), values)
            if self.training and self.config.corruption:
                share = self.config.corruption * uniform(len(z), 1, 1, 1, device=z.device)
                drawn = self.digits_of((uniform(*codes.shape, device=z.device) * self.usage.codebook_size).long())
                corrupt = uniform(len(z), 1, *codes.shape[1:], device=z.device) < share
                values = torch.where(corrupt, self.values(drawn), values)
                codes = self.codes_of(torch.where(corrupt, drawn, digits))
            if self.training and self.config.noise_dropout:
                noisy = uniform(*values.shape, device=z.device) < self.config.noise_dropout
                noise = uniform(*values.shape, device=z.device) - 0.5
                values = torch.where(noisy, (values + noise).clamp(-1, 1), values)
            z_q = self.project_out(self.turned_back(values)).to(z.dtype)
            error = F.mse_loss(self.values(bounded.detach()), self.values(digits))
            return Quantized(z_q, (codes,), {}, {"quantization_error": error})

    def codes(self, z: Tensor) -> Codes:
        with float32_island(z.device.type):
            return (self.codes_of(self.digits(self.bounded(z))),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        with float32_island(only.device.type):
            return self.project_out(self.turned_back(self.values(self.digits_of(only))))

    def bounded(self, z: Tensor) -> Tensor:
        """b levels h w: where on the line of digits each number lies."""
        self.check_latents(z)
        numbers = self.project_in(z.float())
        if self.config.orthogonal_rotation:
            numbers = turned(numbers, self.rotation)
        if self.config.bound == "clamp":
            return numbers.clamp(-1, 1) * self.half_range + self.centre
        narrow = torch.tanh(numbers + self.shift) * self.half_range
        if self.config.preserve_symmetry:
            return narrow + self.centre
        return narrow + self.centre - 0.5 * (self.levels % 2 == 0)

    def digits(self, bounded: Tensor) -> Tensor:
        """b levels h w, whole numbers as floats: 0 to the number's levels - 1."""
        return bounded.detach().nan_to_num().round()

    def digits_of(self, codes: Tensor) -> Tensor:
        """b h w, int64 -> b levels h w, whole numbers as floats."""
        return (rearrange(codes, "b h w -> b 1 h w") // self.places % self.levels).float()

    def values(self, digits: Tensor) -> Tensor:
        """The numbers of z_q, before the last projection."""
        return (digits - self.centre) * self.step

    def turned_back(self, values: Tensor) -> Tensor:
        return turned(values, self.rotation.t()) if self.config.orthogonal_rotation else values

    def codes_of(self, digits: Tensor) -> Tensor:
        """b h w, int64."""
        return (digits.long() * self.places).sum(1)
