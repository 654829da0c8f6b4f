"""The exact walk of `Infinity`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from common import exact
from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.exact.transformer import prefix, turned
from stage2_prior.exact.var import (
    LOG_OF_LARGEST_FACTOR,
    ExactLatents,
    modulated,
    modulation,
    over_grid,
    qkv_bias,
)
from stage2_prior.priors.bit_latents import BitLatents, places_on_last
from stage2_prior.priors.infinity import Infinity
from stage2_prior.priors.infinity_layers import EPSILON, Block
from stage2_prior.priors.llamagen import ROPE_BASE
from stage2_prior.priors.sentence import CrossAttention, Sentence, told_of


class ExactInfinity:
    """A `Stepper`, one scale per call, of float64 logits that are the same on every machine."""

    @torch.inference_mode()
    def __init__(self, prior: Infinity, batch: int, condition: Condition):
        prior.check(batch, condition)
        condition = condition.to(prior.output.weight.device)
        self.prior, self.scale, self.done = prior, 0, 0
        words, there = sentence(prior.sentence, batch, condition)
        words = (words / exact.square_root(exact.mean_square(words).add_(EPSILON))).mul_(
            prior.word_norm.weight.double()
        )
        hidden = None if there is None else ~there[:, None]  # b 1 t
        pool = ExactReading(prior.pool.attention, words, hidden)
        question = prior.pool.question.double()[0].expand(batch, -1, -1, -1)  # b heads 1 d
        vector = pool(question)[:, 0]  # b d
        hidden_words, told_words = Product.of(cast("torch.nn.Linear", prior.words[0])), prior.words[2]
        words = Product.of(cast("torch.nn.Linear", told_words))(exact.gelu_by_tanh(hidden_words(words)))
        activated = exact.silu(vector)
        shared = modulation(prior.shared, activated)
        self.last = modulation(prior.output_modulation, activated).unbind(2)
        self.first = (vector[:, None] + prior.start.double()).expand(-1, prior.sizes[0], -1)
        self.scale_vectors = prior.scale_vectors.weight.double()
        self.turns = place_turns(prior)
        self.latents: ExactBitLatents | ExactLatents
        if isinstance(prior.latents, BitLatents):
            self.latents = ExactBitLatents(prior.latents, prior.output.weight.device)
        else:
            self.latents = ExactLatents(prior.latents)
        self.latent, self.output = Product.of(prior.latent), Product.of(prior.output)
        places = sum(prior.sizes)
        self.blocks = [ExactBlock(block, shared, words, hidden, places) for block in cast("list[Block]", prior.blocks)]

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        x = self.first
        if previous is not None:
            before, seen = self.prior.scales[self.scale - 1], x
            for number, codes in zip(before, previous.chunk(len(before), dim=1), strict=True):
                seen = self.latents.after(codes, number)
            x = self.latent(seen)
        x = x + self.scale_vectors[self.scale]
        here = slice(self.done, self.done + x.shape[1])
        for block in self.blocks:
            x = block(x, *(part[here] for part in self.turns))
        self.scale, self.done = self.scale + 1, here.stop
        return self.prior.code_logits(self.output(modulated(x, *self.last)))


class ExactReading:
    """`CrossAttention` over the words of a sentence."""

    def __init__(self, module: CrossAttention, words: Tensor, hidden: Tensor | None):
        """words: b t c; hidden: b 1 t, True for a word that is not there; None: all are."""
        bias = torch.cat([torch.zeros_like(module.v_bias), module.v_bias])
        batch, length, self.heads = *words.shape[:2], module.heads
        kv = Product(module.kv.weight, bias)(words).unflatten(-1, (2, self.heads, -1))
        keys, values = kv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (b heads) t d
        self.attention = exact.Attention(batch * self.heads, length, keys.shape[-1], words.device)
        self.attention.add(keys, values)
        self.hidden = None if hidden is None else hidden.repeat_interleave(self.heads, dim=0)
        self.out, self.factor = Product.of(module.out), 1 / math.sqrt(keys.shape[-1])

    def __call__(self, queries: Tensor) -> Tensor:
        """queries: b heads m d; returns b m d."""
        queries = queries.flatten(0, 1) * self.factor
        hidden = None if self.hidden is None else self.hidden.expand(-1, queries.shape[1], -1)
        attended = self.attention(queries, hidden).unflatten(0, (-1, self.heads))
        return self.out(attended.transpose(1, 2).flatten(2))


class ExactBlock:
    """A block with what its samples ask for, and the keys and values of the scales so far."""

    def __init__(self, block: Block, shared: Tensor, words: Tensor, hidden: Tensor | None, places: int):
        attention, feed_forward, reading = block.attention, block.feed_forward, block.reading
        self.heads = attention.heads
        self.width = attention.out.in_features // self.heads
        self.modulation = (shared + block.modulation.offsets.double()).unbind(2)  # b 1 d
        self.qkv, self.out = Product(attention.qkv.weight, qkv_bias(attention)), Product.of(attention.out)
        assert attention.log_factor is not None
        self.factors = exact.exp(attention.log_factor.double().clamp(max=LOG_OF_LARGEST_FACTOR))[:, None, None]
        self.norm, self.q = (reading.norm.weight.double(), reading.norm.bias.double()), Product.of(reading.q)
        self.reading = ExactReading(reading.words, words, hidden)
        self.up, self.down = Product.of(feed_forward.up), Product.of(feed_forward.down)
        self.attention = exact.Attention(len(shared) * self.heads, places, self.width, shared.device)

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x: b m d, at all places of the next scale; cosine, sine: m d/2, of their turns."""
        gain1, gain2, scale1, scale2, shift1, shift2 = self.modulation
        qkv = self.qkv(modulated(x, scale1, shift1)).unflatten(-1, (3, self.heads, self.width))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # b heads m d
        queries, keys = exact.unit(queries).mul_(self.factors), exact.unit(keys)
        queries, keys = (turned(part, cosine, sine).flatten(0, 1) for part in (queries, keys))
        self.attention.add(keys, values.flatten(0, 1))
        attended = self.attention(queries).unflatten(0, (-1, self.heads))
        x = x + self.out(attended.transpose(1, 2).flatten(2)).mul_(gain1)
        asks = self.q(exact.layer_norm(x, EPSILON).mul_(self.norm[0]).add_(self.norm[1]))
        x = x + self.reading(asks.unflatten(-1, (self.heads, self.width)).transpose(1, 2))
        return x + self.down(exact.gelu_by_tanh(self.up(modulated(x, scale2, shift2)))).mul_(gain2)


def sentence(module: Sentence, batch: int, condition: Condition) -> tuple[Tensor, Tensor | None]:
    """Words, `b t c`, and which are there, `b t`, None for all: see `Sentence.forward`."""
    parts: list[Tensor] = []
    if module.classes is not None:
        classes, labels = module.classes.weight.double(), condition.labels
        words = classes[-1:].expand(batch, -1) if labels is None else classes[labels]
        parts.append(words.unflatten(1, (-1, module.width)))
    if module.tokens is not None:
        parts.append(prefix(module.tokens, Condition(text=condition.text)))
    if module.null is None:
        return torch.cat(parts, dim=1), None
    assert condition.embeddings is not None
    assert condition.embedding_mask is not None
    known, mask = told_of(condition.embeddings, condition.embedding_mask)
    parts.append(torch.where(known, condition.embeddings.double(), module.null.double()))
    words = torch.cat(parts, dim=1)
    return words, F.pad(mask, (words.shape[1] - mask.shape[1], 0), value=True)


def place_turns(prior: Infinity) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `Infinity.turns`, `n d_head/2`."""
    pairs = prior.config.width // prior.config.heads // 4
    frequencies = [exact.power(ROPE_BASE, -pair / pairs) for pair in range(pairs)]
    grids = prior.code_spec.grids
    at = [divmod(place, grids[-1].width) for place in places_on_last([grids[scale.start] for scale in prior.scales])]
    angles = [[row * f for f in frequencies] + [column * f for f in frequencies] for row, column in at]
    return exact.cosine_and_sine(angles, prior.output.weight.device)


class ExactBitLatents:
    """`BitLatents`, one grid after the other."""

    def __init__(self, latents: BitLatents, device: torch.device):
        self.latents, self.corner = latents, exact.power(latents.width, -0.5)
        self.total: Tensor | None = None  # the sum so far, b (h w) d
        last, shapes = latents.shapes[-1], set(latents.shapes)
        self.grow = {shape: Product(over_grid(bilinear, shape, last, device)) for shape in shapes}
        self.shrink = {shape: Product(over_grid(bilinear, last, shape, device)) for shape in shapes}

    def after(self, codes: Tensor, number: int) -> Tensor:
        """What grid `number + 1` sees, b m d; codes: b m', of grid `number`."""
        latents, channels = self.latents, self.latents.channels[number]
        vectors = latents.signs(codes, number).double() * self.corner
        grown = self.grow[latents.shapes[number]](vectors.mT).mT
        grown = F.pad(grown, (channels.start, latents.width - channels.stop))
        self.total = grown if self.total is None else self.total + grown
        return self.shrink[latents.shapes[number + 1]](self.total.mT).mT


def bilinear(old: int, new: int) -> list[list[Fraction]]:
    """Of `F.interpolate(mode="bilinear")`: a number between two others, and beyond the middle of the last the last."""
    matrix = [[Fraction(0)] * old for _ in range(new)]
    for weights, place in zip(matrix, range(new), strict=True):
        at = max(Fraction(0), (place + Fraction(1, 2)) * Fraction(old, new) - Fraction(1, 2))
        before = math.floor(at)
        weights[before] += 1 - (at - before)
        weights[min(before + 1, old - 1)] += at - before
    return matrix
