"""Infinity: next-scale prediction of bits (Han et al. 2024, "Infinity: Scaling Bitwise AutoRegressive Modeling for
High-Resolution Image Synthesis", arXiv:2412.04431).

VAR (var.py) with three differences: what it is asked for is a sentence, which every place reads; the places of a scale
are told apart by turns of queries and keys; and a code is told bit by bit.

    input      sentence,  sum of scale 1      sum of scales 1, 2      ...
               pooled     on scale 2's grid   on scale 3's grid
    logits of  bits of    bits of             bits of
               scale 1    scale 2             scale 3                 ...

All bits of a scale are drawn at once, also where its codes, of at most 16 bits, lie in several grids. What goes in, the
latents of the scales so far, is the matter of bit_latents.py (of `multiscale_bits` scale_latents.py).

A sentence is a row of vectors, its words: those of a text encoder as they are; of a tokenized caption a learned one for
each token; of a class learned ones too, several, so that places have something to choose from. So the network knows
sentences alone, whatever they are made of. Any sentence is learned words again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.shards import CodeDataset
from codes.spec import Codes, CodeSpec
from common.draws import uniform
from stage2_prior.condition import Condition
from stage2_prior.decoding.prepared import prepared
from stage2_prior.priors.base import NO_CODE, AutoregressivePrior, TrainingLoss
from stage2_prior.priors.bit_latents import BitLatents, places_on_last, scales_of
from stage2_prior.priors.bitwise import bits_of_vocabulary, logits_of_codes, nll_of_bits
from stage2_prior.priors.infinity_layers import EPSILON, Asked, Block, InfinityConfig, Reading
from stage2_prior.priors.llamagen import place_turns, turn
from stage2_prior.priors.scale_latents import ScaleLatents, corrected
from stage2_prior.priors.sentence import Pool, Sentence
from stage2_prior.priors.var import (
    Attention,
    FeedForward,
    Modulation,
    in_type,
    kept_paths,
    modulated,
    rising,
)
from stage2_prior.stepping import guided, step_dtype


class Infinity(AutoregressivePrior):
    """Codes of bits on two or more scales, coarse to fine, one grid or several of each. Raises UserError for others."""

    kind = "infinity"
    reads_text = True
    reads_given = False
    config_class = InfinityConfig
    config: InfinityConfig
    scale_of: Tensor  # n, of each place, counted from 0
    place_of: Tensor  # n, which place of the last scale each stands at

    def __init__(
        self,
        config: InfinityConfig,
        code_spec: CodeSpec,
        num_classes: int,
        *,
        latent_width: int | None = None,
        latent_gains: bool = False,
        **facts: Any,
    ):
        """latent_width, latent_gains: of the tokenizer's latents, as for `VAR`; None where the bits alone tell them.
        facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.network, width = config.network, config.width
        self.scales = scales_of(code_spec.grids)
        places = [code_spec.grids[scale.start] for scale in self.scales]
        self.sizes = [grid.size for grid in places]
        self.latent_width = latent_width
        of_bits = BitLatents(code_spec)
        self.latents: BitLatents | ScaleLatents = of_bits
        if latent_width is not None:
            self.latents = ScaleLatents(code_spec, latent_width, latent_gains)
        words = width if self.embeddings is None else self.embeddings.width
        self.sentence = Sentence(words, num_classes, config.class_words, self.text, self.embeddings)
        self.word_norm = nn.RMSNorm(words, EPSILON)
        self.pool = Pool(width, words)
        self.words = nn.Sequential(nn.Linear(words, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.latent = nn.Linear(latent_width or of_bits.width, width)
        self.start = nn.Parameter(torch.empty(1, 1, width))
        self.scale_vectors = nn.Embedding(len(self.scales), width)
        self.shared = Modulation(width, 6)
        self.drop_paths = rising(config.drop_path, config.layers)
        self.blocks = nn.ModuleList(Block(self.network) for _ in range(config.layers))
        self.output_modulation = Modulation(width, 2)
        self.bits = of_bits.channels[: len(self.scales[0])]  # of each grid of a scale
        self.output = nn.Linear(width, 2 * of_bits.width)
        scale_of = [number for number, size in enumerate(self.sizes) for _ in range(size)]
        self.register_buffer("scale_of", torch.tensor(scale_of), persistent=False)
        self.register_buffer("place_of", torch.tensor(places_on_last(places)), persistent=False)
        self.initialise()

    @property
    def steps(self) -> int:
        return len(self.scales)

    @property
    def guided_layers(self) -> int:
        return self.config.layers

    @property
    def tells_bits(self) -> bool:
        return True

    def arguments(self) -> dict[str, Any]:
        if self.latent_width is None:
            return super().arguments()
        gains = isinstance(self.latents, ScaleLatents) and self.latents.gains is not None
        return {**super().arguments(), "latent_width": self.latent_width, "latent_gains": gains}

    def fitted(self, name: str, weight: Tensor, fresh: Tensor, other: Self) -> Tensor | None:
        if name.startswith("latents."):  # they are those of the codes
            return weight if torch.equal(weight, fresh) else None
        return super().fitted(name, weight, fresh, other)

    @classmethod
    def for_codes(cls, config: Any, codes: CodeDataset, num_classes: int, **facts: Any) -> Self:
        latents = codes.latents()
        if latents is None:
            return super().for_codes(config, codes, num_classes, **facts)
        width, gains = latents["codebook"].shape[1], "gains" in latents
        prior = cls(config, codes.code_spec, num_classes, latent_width=width, latent_gains=gains, **facts)
        assert isinstance(prior.latents, ScaleLatents)
        prior.latents.fill(latents)
        return prior

    @torch.no_grad()
    def initialise(self) -> None:
        """As VAR: variance 1 / (3 d), less in what adds to the residual stream, little in the output, and next to none
        in the gains. Words begin at length 1.2, as published for the null sentence, which the norm sets aright."""
        std = math.sqrt(1 / self.config.width / 3)
        for parameter in (self.start, self.pool.question):
            nn.init.trunc_normal_(parameter, std=std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith("sentence."):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in self.sentence.parameters():
            nn.init.trunc_normal_(parameter, std=1.2 / math.sqrt(self.sentence.width))
        self.output.weight *= 0.02
        self.output_modulation.linear.weight *= 0.5
        for block in cast("list[Block]", self.blocks):
            for layer in (block.attention.out, block.reading.words.out, block.feed_forward.down):
                layer.weight /= math.sqrt(2 * self.config.layers)
            gains, others = block.modulation.offsets.split([2, 4], dim=2)
            gains *= self.config.initial_gain
            others *= 0.5

    # ---- conditions -------------------------------------------------------------------------------------------------

    def forget(self, condition: Condition, which: Tensor) -> Condition:
        """See `Prior`. A caption of a text encoder that is left out keeps its length, as in the published training."""
        forgotten = super().forget(condition, which)
        if condition.embeddings is None:
            return forgotten
        embeddings = condition.embeddings.masked_fill(which[:, None, None], 0)
        return replace(forgotten, embeddings=embeddings, embedding_mask=condition.embedding_mask)

    def asked(self, batch: int, condition: Condition) -> Asked:
        vectors, there = self.sentence(batch, condition)
        vectors = self.word_norm(vectors)
        mask = None if there is None else there[:, None, None]
        return Asked(self.pool(vectors, mask), self.words(vectors), mask)

    # ---- training ---------------------------------------------------------------------------------------------------

    def with_mistakes(self, codes: Codes, share: float) -> tuple[Codes, Codes]:
        """See `AutoregressivePrior`: of the bits of each image and scale so many are others, and the scales after them
        are told to mend it."""
        device = codes[0].device
        shares = share * uniform(len(codes[0]), len(self.scales), device=device)
        flips = list[Tensor]()
        for own, scale in zip(shares.unbind(1), self.scales, strict=True):
            for number in scale:
                bits = bits_of_vocabulary(self.code_spec.grids[number])
                flipped = uniform(*codes[number].shape, bits, device=device) < own[:, None, None, None]
                flips.append((flipped.long() << torch.arange(bits, device=device)).sum(dim=-1))
        return corrected(self.latents, codes, lambda number, wanted: wanted ^ flips[number])

    def kept_paths(self, x: Tensor) -> Tensor:
        """See `var.kept_paths`."""
        return kept_paths(x, self.drop_paths if self.training else [0.0] * len(self.blocks))

    def turns(self) -> Tensor:
        """Of every place, `n d_head/2`, see `place_turns`: a place of a coarse scale stands at one of the last. No
        buffer: a model in bfloat16 would round them."""
        table = place_turns(self.code_spec.grids[-1], 0, self.config.width // self.config.heads, self.start.device)
        return table[self.place_of]

    def seen(self, codes: Codes) -> Tensor:
        """What the places of all scales but the first see, `b n-m d`."""
        total, seen = None, []
        for scale in self.scales[1:]:
            for number in range(scale.start - len(scale), scale.start):
                total = self.latents.add(total, codes[number], number)
            assert total is not None
            seen.append(self.latents.seen_by(scale.start, total))
        return torch.cat(seen, dim=1)

    def bit_logits(self, codes: Codes, condition: Condition) -> Tensor:
        """`b n 2d`, of all places, scale after scale: of each bit, first of a place first, that it is 0 and that it is
        1."""
        batch = len(self.sequence(codes, condition))
        asked = self.asked(batch, condition)
        seen = self.latent(self.seen(codes).to(self.latent.weight.dtype))
        first = (asked.vector[:, None] + self.start).expand(-1, self.sizes[0], -1)
        x = torch.cat([first, seen], dim=1) + self.scale_vectors(self.scale_of)  # b n d
        mask = self.scale_of[:, None] >= self.scale_of  # n n
        shared, turns = self.shared(asked.vector), self.turns()
        for block, kept in zip(self.blocks, self.kept_paths(x), strict=True):
            x = block(x, shared, asked, turns, mask, kept)
        return self.output(modulated(x, *self.output_modulation(asked.vector).unbind(2)))

    def of_grids(self, logits: Tensor) -> list[Tensor]:
        """Of each grid of a scale, from its places' logits `b m 2d`: `b m 2bits`, the least of its bits first."""
        pairs = logits.unflatten(-1, (-1, 2))
        return [pairs[..., bits, :].flip(-2).flatten(-2) for bits in self.bits]

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        scales = self.bit_logits(codes, condition).split(self.sizes, dim=1)
        return torch.cat([self.code_logits(scale) for scale in scales], dim=1)

    def code_logits(self, logits: Tensor) -> Tensor:
        """Of the codes of a scale, grid after grid, from its places' `b m 2d`."""
        parts = [logits_of_codes(part) for part in self.of_grids(logits)]
        largest = max(part.shape[-1] for part in parts)
        return torch.cat([F.pad(part, (0, largest - part.shape[-1]), value=NO_CODE) for part in parts], dim=1)

    def nll(self, codes: Codes, condition: Condition) -> Tensor:
        """See `Prior`. The bits of a code do not depend on each other, given the scales before: no table is made."""
        return self.nll_of(codes, self.bit_logits(codes, condition))

    def nll_of(self, codes: Codes, logits: Tensor) -> Tensor:
        """`b n`, from logits of bits, `b n 2d`, which may have seen other codes."""
        pairs = [part for scale in logits.split(self.sizes, dim=1) for part in self.of_grids(scale)]
        parts = [nll_of_bits(part, grid.flatten(1)) for part, grid in zip(pairs, codes, strict=True)]
        return torch.cat(parts, dim=1)

    def forward(self, codes: Codes, condition: Condition, given: Codes | None = None) -> TrainingLoss:
        """See `Prior`. The loss weighs codes as `coarse_weight` says, nll does not."""
        nll = self.nll_of(codes, self.bit_logits(codes if given is None else given, condition))
        return TrainingLoss((nll * self.weights(nll)).mean(dim=1), nll.mean(dim=1).detach())

    def weights(self, nll: Tensor) -> Tensor:
        """Of codes in the loss, `n`, of mean 1."""
        grids = self.code_spec.grids
        weights = [(grids[-1].size / grid.size) ** self.config.coarse_weight for grid in grids]
        mean = sum(weight * grid.size for weight, grid in zip(weights, grids, strict=True)) / nll.shape[1]
        parts = [nll.new_full((grid.size,), weight / mean) for weight, grid in zip(weights, grids, strict=True)]
        return torch.cat(parts)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    @property
    def numbers_kept(self) -> int:
        return 2 * self.config.layers * sum(self.sizes) * self.config.width

    def stepper(self, batch: int, condition: Condition) -> InfinityStepper:
        return InfinityStepper(self, batch, condition)

    def stepper_guided_inside(
        self, batch: int, condition: Condition, guidance: Sequence[float], layer: int
    ) -> InfinityStepper:
        return InfinityStepper(self, batch, self.doubled_for_guidance(condition), guidance, layer)


class StepWeights(NamedTuple):
    """What sampling reads of the prior, in the type that it computes in: once for each state of the weights."""

    latent: nn.Linear
    output: nn.Linear
    blocks: list[tuple[Attention, Reading, FeedForward]]
    scale_vectors: tuple[Tensor, ...]  # d of each scale
    turns: tuple[Tensor, ...]  # m d_head/2 of each scale

    @classmethod
    def of(cls, prior: Infinity, dtype: torch.dtype) -> StepWeights:
        return cls(
            in_type(prior.latent, dtype),
            in_type(prior.output, dtype),
            [
                (in_type(block.attention, dtype), in_type(block.reading, dtype), in_type(block.feed_forward, dtype))
                for block in cast("list[Block]", prior.blocks)
            ],
            prior.scale_vectors.weight.to(dtype).unbind(),
            prior.turns().split(prior.sizes),
        )


class StepBlock(NamedTuple):
    """A block with what its samples ask for, which all scales share."""

    attention: Attention
    reading: Reading
    feed_forward: FeedForward
    modulation: tuple[Tensor, ...]  # six of b 1 d
    words: tuple[Tensor, Tensor, Tensor | None]  # keys and values, b heads t d, and which words there are
    keys: Tensor  # b heads n d, of all scales: room for those to come
    values: Tensor


class InfinityStepper:
    """One scale per call: keys and values of earlier scales wait in a cache that is allocated once, those of the words
    are made once. Computes in autocast's type where autocast is on when it is made, else in the weights' type.

    With guidance inside, the samples with their condition go together with those without it up to the layer that is
    guided; what this puts out becomes one, and the layers behind it are of the samples with their condition alone. (The
    original lets both go on, of which the second is never looked at.)"""

    @torch.inference_mode()
    def __init__(
        self,
        prior: Infinity,
        batch: int,
        condition: Condition,
        guidance: Sequence[float] = (),
        guided_layer: int = 0,
    ):
        """guidance: of each scale, where it is inside, for the output of layer `guided_layer`, counted from the last
        as 1; the condition is then of 2 batch samples, see `Prior.doubled_for_guidance`."""
        config = prior.config
        device, dtype = prior.output.weight.device, step_dtype(prior.output.weight)
        self.copies = 2 if guidance else 1  # of each sample that go in
        rows = self.copies * batch
        prior.check(rows, condition)
        self.prior, self.latents, self.scales = prior, prior.latents, prior.scales
        self.guidance, self.guided_layer = guidance, config.layers - guided_layer
        weights = prepared(prior, dtype, lambda: StepWeights.of(prior, dtype))
        self.latent, self.output = weights.latent, weights.output
        self.scale_vectors, self.turns = weights.scale_vectors, weights.turns
        asked = prior.asked(rows, condition.to(device))
        self.first = (asked.vector[:, None] + prior.start).expand(-1, prior.sizes[0], -1).to(dtype)
        self.output_modulation = prior.output_modulation(asked.vector[:batch]).to(dtype).unbind(2)
        shared = prior.shared(asked.vector)
        heads, head_width = config.heads, config.width // config.heads
        self.blocks = list[StepBlock]()
        for number, (block, layers) in enumerate(zip(cast("list[Block]", prior.blocks), weights.blocks, strict=True)):
            own = slice(batch if guidance and number > self.guided_layer else rows)
            keys, values = block.reading.words.keys_and_values(asked.words[own])
            mask = None if asked.mask is None else asked.mask[own]
            cache = torch.zeros(2, len(keys), heads, sum(prior.sizes), head_width, dtype=dtype, device=device)
            modulation = block.modulation(shared[own]).to(dtype).unbind(2)
            self.blocks.append(StepBlock(*layers, modulation, (keys.to(dtype), values.to(dtype), mask), *cache))
        self.total: Tensor | None = None  # the latents of the scales so far, b d h w
        self.scale = self.done = 0  # scales, and places in them

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.first.device.type, enabled=False):
            x = self.first if previous is None else self._embedded(previous)
            x = x + self.scale_vectors[self.scale]
            x = self._through(x, slice(self.done, self.done + x.shape[1]))
            self.scale, self.done = self.scale + 1, self.done + x.shape[1]
            return self.prior.code_logits(self.output(modulated(x, *self.output_modulation)))

    def _embedded(self, previous: Tensor) -> Tensor:
        """What the coming scale sees, b m d; previous: b m', the codes of the one before it, grid after grid."""
        before = self.scales[self.scale - 1]
        for number, codes in zip(before, previous.chunk(len(before), dim=1), strict=True):
            self.total = self.latents.add(self.total, codes, number)
        assert self.total is not None
        seen = self.latents.seen_by(before.stop, self.total)
        return self.latent(seen.to(self.first.dtype)).repeat(self.copies, 1, 1)

    def _through(self, x: Tensor, here: slice) -> Tensor:
        """Through all blocks; here: the places of x, b m d."""
        turns = self.turns[self.scale]
        for number, (attention, reading, feed_forward, modulation, words, keys, values) in enumerate(self.blocks):
            gain1, gain2, scale1, scale2, shift1, shift2 = modulation
            q, k, v = attention.project(modulated(x, scale1, shift1))
            keys[:, :, here], values[:, :, here] = turn(k, turns), v
            x = x + gain1 * attention.attend(turn(q, turns), keys[:, :, : here.stop], values[:, :, : here.stop])
            x = x + reading(x, *words)
            x = x + gain2 * feed_forward(modulated(x, scale2, shift2))
            if self.guidance and number == self.guided_layer:
                label, null = x.chunk(2)
                x = guided(label, null, self.guidance[self.scale])
        return x
