"""The exact walk of `VAR`."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from common import exact
from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.priors.scale_latents import ScaleLatents
from stage2_prior.priors.var import VAR, Attention, Block, Modulation, Offsets, product_scale

EPSILON = 1e-6  # of every layer norm
LOG_OF_LARGEST_FACTOR = 4.605170185988092  # the natural logarithm of Attention.largest_factor, 100
CUBIC = Fraction(-3, 4)  # a of the cubic kernel


class ExactVAR:
    """A `Stepper`, one scale per call, of float64 logits that are the same on every machine."""

    @torch.inference_mode()
    def __init__(self, prior: VAR, batch: int, condition: Condition):
        prior.check(batch, condition)
        device = prior.output.weight.device
        classes, labels = prior.classes.weight.double(), condition.to(device).labels
        vectors = classes[-1:].expand(batch, -1) if labels is None else classes[labels]  # b d
        scales = prior.scales.weight.double()[prior.scale_of]
        self.positions = (prior.places.double() + scales).split(prior.sizes, dim=1)  # 1 m d of each scale
        self.first = vectors[:, None] + prior.start.double() + self.positions[0]
        self.latents = ExactLatents(prior.latents)
        self.word = Product.of(prior.word)
        activated = exact.silu(vectors)
        shared = modulation(prior.shared, activated) if isinstance(prior.shared, Modulation) else activated
        self.blocks = [ExactBlock(block, shared, sum(prior.sizes)) for block in cast("list[Block]", prior.blocks)]
        self.last = modulation(prior.output_modulation, activated).unbind(2)
        self.output = Product.of(prior.output)
        self.scale = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        x = self.first
        if previous is not None:
            x = self.word(self.latents.after(previous, self.scale - 1)).add_(self.positions[self.scale])
        for block in self.blocks:
            x = block(x)
        self.scale += 1
        return self.output(modulated(x, *self.last))


class ExactBlock:
    """A block with the modulation of its samples, and the keys and values of the scales so far."""

    def __init__(self, block: Block, condition: Tensor, places: int):
        """condition: the modulation that all blocks share, b 1 6 d, or else what each makes its own of, b d."""
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        self.width = attention.out.in_features // self.heads
        if isinstance(block.modulation, Offsets):
            self.modulation = (condition + block.modulation.offsets.double()).unbind(2)
        else:
            self.modulation = modulation(block.modulation, condition).unbind(2)
        self.qkv, self.out = Product(attention.qkv.weight, qkv_bias(attention)), Product.of(attention.out)
        self.factors: Tensor | None = None  # None: scores are no cosines
        if attention.log_factor is not None:
            factors = attention.log_factor.double().clamp(max=LOG_OF_LARGEST_FACTOR)
            self.factors = exact.exp(factors)[:, None, None]
        self.up, self.down = Product.of(feed_forward.up), Product.of(feed_forward.down)
        self.attention = exact.Attention(len(condition) * self.heads, places, self.width, condition.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x: b m d, at all places of the next scale, which see each other and all before them."""
        gain1, gain2, scale1, scale2, shift1, shift2 = self.modulation  # b 1 d
        qkv = self.qkv(modulated(x, scale1, shift1)).unflatten(-1, (3, self.heads, self.width))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # b heads m d
        if self.factors is None:
            queries = queries * product_scale(self.width)
        else:
            queries, keys = exact.unit(queries).mul_(self.factors), exact.unit(keys)
        self.attention.add(keys.flatten(0, 1), values.flatten(0, 1))
        attended = self.attention(queries.flatten(0, 1)).unflatten(0, (-1, self.heads))
        x = x + self.out(attended.transpose(1, 2).flatten(2)).mul_(gain1)
        return x + self.down(exact.gelu_by_tanh(self.up(modulated(x, scale2, shift2)))).mul_(gain2)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See `var.modulated`."""
    return exact.layer_norm(x, EPSILON).mul_(scale + 1).add_(shift)


def modulation(module: Modulation, activated: Tensor) -> Tensor:
    """What `module` makes of class vectors behind their SiLU, b d: `b 1 parts d`."""
    return Product.of(module.linear)(activated).unflatten(1, (1, module.parts, -1))


def qkv_bias(attention: Attention) -> Tensor:
    return torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])


class ExactLatents:
    """`ScaleLatents`, one scale after the other."""

    def __init__(self, latents: ScaleLatents):
        device, finest = latents.codebook.device, latents.shapes[-1]
        self.shape = finest
        self.codebook = latents.codebook.double()
        self.gains = None if latents.gains is None else latents.gains.double()
        self.total: Tensor | None = None  # the sum so far, b (h w) d
        self.grow = [Product(over_grid(cubic, shape, finest, device)) for shape in latents.shapes[:-1]]
        self.average = [Product(over_grid(area, finest, shape, device)) for shape in latents.shapes[1:]]
        # As products with the nine neighbours of a place, whose numbers stand in one row.
        weights = latents.phi_weight.permute(0, 1, 3, 4, 2).flatten(2)
        self.phi = [Product(weight, bias) for weight, bias in zip(weights, latents.phi_bias, strict=True)]

    def after(self, codes: Tensor, number: int) -> Tensor:
        """What scale `number + 1` sees, b m d; codes: b m', of scale `number`."""
        vectors = self.codebook[codes]
        if self.gains is not None:
            vectors = vectors * self.gains[number]
        grown = self.grow[number](vectors.mT).mT  # b (h w) d
        grown = self.phi[number](neighbours(grown.unflatten(1, self.shape)).flatten(1, 2))
        self.total = grown if self.total is None else self.total + grown
        return self.average[number](self.total.mT).mT


def neighbours(x: Tensor) -> Tensor:
    """b h w d -> b h w 9d, of the 3 x 3 places around each, row after row, zeros beyond the edge."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.cat([x[:, row : row + height, at : at + width] for row in range(3) for at in range(3)], dim=-1)


def over_grid(
    along: Callable[[int, int], list[list[Fraction]]], old: tuple[int, int], new: tuple[int, int], device: torch.device
) -> Tensor:
    """The matrix that makes numbers of one grid, in a row, those of another: `new places x old places`. along: the
    weights along an axis, new x old."""
    rows, columns = (
        torch.tensor([[float(weight) for weight in weights] for weights in along(*sizes)], dtype=torch.float64)
        for sizes in zip(old, new, strict=True)
    )
    return (rows[:, None, :, None] * columns[:, None]).flatten(2).flatten(0, 1).to(device)


def cubic(old: int, new: int) -> list[list[Fraction]]:
    """Of `F.interpolate(mode="bicubic")`: a number between four others, those beyond an edge being the one at it."""
    matrix = [[Fraction(0)] * old for _ in range(new)]
    for weights, place in zip(matrix, range(new), strict=True):
        at = (place + Fraction(1, 2)) * Fraction(old, new) - Fraction(1, 2)
        for neighbour in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[min(max(neighbour, 0), old - 1)] += kernel(abs(at - neighbour))
    return matrix


def kernel(x: Fraction) -> Fraction:
    """The cubic convolution kernel (Keys 1981) at a distance of at most 2."""
    if x <= 1:
        return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    return ((x - 5) * x + 8) * x * CUBIC - 4 * CUBIC


def area(old: int, new: int) -> list[list[Fraction]]:
    """Of `F.interpolate(mode="area")`: the mean of all places that a new one touches."""
    matrix = []
    for place in range(new):
        start, stop = place * old // new, -(-(place + 1) * old // new)
        matrix.append([Fraction(int(start <= other < stop), stop - start) for other in range(old)])
    return matrix
