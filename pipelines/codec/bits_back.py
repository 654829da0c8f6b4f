"""Images of a VAE on one stack of bits, by bits-back coding (Townsend et al. 2019, arXiv:1901.04866).

A group of images takes its latents *from* the stack, as if what lies there had been written with q(z|x), then puts its
pixels on it, with p(x|z), and the latents, with p(z). A reader takes latents and pixels, and puts back what the latents
were read from, so that the groups below are as they were: the last one is read first. Nothing lies under the first
image, which takes the most likely latents, without getting bits back for them.

The latents of a hierarchy are read from the top down, each group given those above it, and put back from the bottom up.
They lie on the stack in the bins of their priors, which are as likely as each other whatever the groups above say:
Townsend et al. 2020, "HiLLoC" (arXiv:1912.09953).

A whole number of L bits is L choices of one of two, the highest bit first, each by the shares of the numbers that are
left: so L values of a distribution are computed, and not 2**L.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

from pipelines.codec.entropy_coding import BY_ROW, TOTAL, DamagedPayloadError
from pipelines.codec.lossless_archive import LARGEST_GROUP, WORD_BYTES, Chain, Group
from stage1_vae.exact import (
    ONE_BITS,
    ChooseBins,
    ChoosePixels,
    ExactModel,
    Grid,
    Pixels,
    Posterior,
    Shares,
    bins_of,
    posterior_shares,
)

TOTAL_BITS = TOTAL.bit_length() - 1
BOTTOM = np.array([0, 1], np.uint32)  # of a stack: the least that holds numbers so that taking and putting are inverse
GROUP_NUMBERS = 1 << 20  # or fewer, so that their pixels and channels are no more than these
IN_BINS = {bits: constriction.stream.model.Uniform(1 << bits) for bits in range(1, TOTAL_BITS)}


class Stack:
    """An ANS coder whose models are choices of one of two."""

    def __init__(self, words: np.ndarray = BOTTOM) -> None:
        """words: uint32, as `words` gave them; the last is not 0."""
        self.coder = constriction.stream.stack.AnsCoder(words)

    def copy(self) -> Stack:
        return Stack(self.words)

    @property
    def words(self) -> np.ndarray:
        return self.coder.get_compressed()

    @property
    def bits(self) -> int:
        return self.coder.num_valid_bits()

    @property
    def is_exhausted(self) -> bool:
        """Whether more was taken than lay there, so that what was taken cannot be put back."""
        return self.coder.num_words() < len(BOTTOM)

    def put(self, numbers: Tensor, shares: Shares, bits: int) -> None:
        """int64 n, of so many bits, to be taken again from the first to the last."""
        low, below, above = torch.zeros_like(numbers), torch.zeros_like(numbers), all_below(numbers, bits)
        steps = []
        for level in reversed(range(bits)):
            middle = low + (1 << level)
            between = shares(middle) + middle
            weights = weights_of(below, between, above)
            upper = numbers >= middle
            low, below, above = narrowed(upper, low, middle, below, between, above)
            steps.append((as_symbols(upper), weights))
        for symbols, weights in reversed(steps):
            self.coder.encode_reverse(symbols, BY_ROW, weights)

    def take(self, count: int, shares: Shares, bits: int, device: torch.device) -> Tensor:
        low = torch.zeros(count, dtype=torch.int64, device=device)
        below, above = torch.zeros_like(low), all_below(low, bits)
        for level in reversed(range(bits)):
            middle = low + (1 << level)
            between = shares(middle) + middle
            chosen = self.coder.decode(BY_ROW, weights_of(below, between, above))
            upper = torch.from_numpy(chosen).to(device) == 1
            low, below, above = narrowed(upper, low, middle, below, between, above)
        return low

    def put_uniformly(self, bins: Tensor, bits: int) -> None:
        self.coder.encode_reverse(as_symbols(bins), IN_BINS[bits])

    def take_uniformly(self, count: int, bits: int, device: torch.device) -> Tensor:
        return torch.from_numpy(self.coder.decode(IN_BINS[bits], count).astype(np.int64)).to(device)


def all_below(like: Tensor, bits: int) -> Tensor:
    """The share of all numbers of so many bits, each of which has one unit more than its distribution says."""
    return torch.full_like(like, (1 << ONE_BITS) + (1 << bits))


def narrowed(
    upper: Tensor, low: Tensor, middle: Tensor, below: Tensor, between: Tensor, above: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The least number that is left, and the shares below it and below the end, where the upper half was chosen or
    not."""
    return torch.where(upper, middle, low), torch.where(upper, between, below), torch.where(upper, above, between)


def weights_of(below: Tensor, between: Tensor, above: Tensor) -> np.ndarray:
    """n 2, of the lower and the upper half, for the coder: frequencies, at least 1 and with the sum TOTAL, less 1."""
    lower = ((between - below) << TOTAL_BITS) // (above - below)
    lower = lower.clamp_(1, TOTAL - 1)
    return torch.stack([lower - 1, TOTAL - 1 - lower], dim=1).float().cpu().numpy()


def as_symbols(numbers: Tensor) -> np.ndarray:
    return numbers.cpu().numpy().astype(np.int32)


# ---- images ---------------------------------------------------------------------------------------------------------


def group_size(model: ExactModel[Any]) -> int:
    height, width, channels = model.image_shape
    return max(1, min(LARGEST_GROUP, GROUP_NUMBERS // (height * width * channels)))


class NothingLeftError(Exception):
    """A stack does not reach for the latents of a group of images."""


def encode_chain(model: ExactModel[Any], images: np.ndarray) -> Chain:
    """Whole numbers from 0 to 2**bits - 1, uint8 n H W c, n at least 1. Groups grow as far as the stack reaches for
    their latents. Raises UserError where the model is damaged."""
    stack, groups, first_bits = Stack(), list[Group](), 0
    done, size = 0, 1
    while done < len(images):
        values, below = on_device(model, images[done : done + size]), stack.copy()
        try:
            bins, state = model.infer(values, taken_below(below, model))
            paid = True
        except NothingLeftError:
            if size > 1:
                size //= 2
                continue
            spent = Stack()
            bins, state = model.infer(values, most_likely(spent, model))
            paid, first_bits, below = False, first_bits + spent.bits - Stack().bits, stack
        each = (stack.bits - below.bits) / len(values)  # bits that an image took
        stack = below
        put_images(model, stack, values, bins, state)
        groups.append(Group(len(values), paid))
        done += len(values)
        size = min(2 * size, group_size(model))
        if each:
            size = max(1, min(size, int(stack.bits / each)))
    return Chain(tuple(groups), first_bits, stack.words.astype("<u4").tobytes().rstrip(b"\0"))


def shares_of(posterior: Posterior, model: ExactModel[Any]) -> Shares:
    return posterior_shares(posterior.mean.flatten(), posterior.scale.flatten(), model.latent_bits)


def taken_below(stack: Stack, model: ExactModel[Any]) -> ChooseBins:
    """Latents as a stack has them. Raises NothingLeftError."""

    def taken(posterior: Posterior) -> Tensor:
        shape = posterior.mean.shape
        bins = stack.take(shape.numel(), shares_of(posterior, model), model.latent_bits, model.device)
        if stack.is_exhausted:
            raise NothingLeftError
        return bins.view(shape)

    return taken


def most_likely(stack: Stack, model: ExactModel[Any]) -> ChooseBins:
    """The bins of the means of posteriors, which are put on a stack."""

    def chosen(posterior: Posterior) -> Tensor:
        bins = bins_of(posterior.mean, model.latent_bits)
        stack.put(bins.flatten(), shares_of(posterior, model), model.latent_bits)
        return bins

    return chosen


def put_images(model: ExactModel[Any], stack: Stack, values: Tensor, bins: Tensor, state: Any) -> None:
    """Pixels and latents: int64 n H W c and n d."""
    coded: list[tuple[Tensor, Shares]] = []

    def given(grid: Grid, pixels: Pixels) -> Tensor:
        own = values[:, grid.row :: grid.step, grid.column :: grid.step]
        for channel in own.movedim(-1, 0).flatten(1):
            coded.append((channel, pixels.shares()))
            pixels.tell(channel)
        return own

    model.pixels(state, given)
    for numbers, shares in reversed(coded):
        stack.put(numbers, shares, model.bits)
    stack.put_uniformly(bins.flatten(), model.latent_bits)


def taken_from(stack: Stack, model: ExactModel[Any]) -> ChoosePixels:
    """Pixels as a stack has them."""

    def taken(grid: Grid, pixels: Pixels) -> Tensor:
        channels = []
        for _ in range(model.image_shape[2]):
            channels.append(stack.take(pixels.count, pixels.shares(), model.bits, model.device))
            pixels.tell(channels[-1])
        return torch.stack(channels, dim=-1)

    return taken


def decode_chain(model: ExactModel[Any], chain: Chain) -> Iterator[np.ndarray]:
    """Inverse of `encode_chain`: the images of each group, from the last to the first. Words that are no images give
    arbitrary ones, and after them DamagedPayloadError or none: the caller compares checksums."""
    padded = chain.stack + bytes(-len(chain.stack) % WORD_BYTES)
    stack = Stack(np.frombuffer(padded, "<u4").astype(np.uint32))
    for group in reversed(chain.groups):
        bins = stack.take_uniformly(group.images * model.latents, model.latent_bits, model.device)
        bins = bins.view(group.images, model.latents)
        state = model.descend(bins)
        values = model.pixels(state, taken_from(stack, model))
        if group.paid:
            of_groups = list(zip(bins.split(model.sizes, dim=1), model.posteriors(values, state), strict=True))
            for own, posterior in reversed(of_groups):
                stack.put(own.flatten(), shares_of(posterior, model), model.latent_bits)
        yield values.to(torch.uint8).cpu().numpy()
    if not np.array_equal(stack.words, BOTTOM):
        raise DamagedPayloadError("something is left under the first image")


def on_device(model: ExactModel[Any], images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).to(model.device).long()
