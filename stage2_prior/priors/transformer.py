"""Decoder-only transformer over codes in raster order, as in VQ-GAN (Esser et al. 2021, arXiv:2012.09841).

The blocks are those of today's language models: RMSNorm before each sublayer (Zhang & Sennrich 2019, arXiv:1910.07467),
SwiGLU (Shazeer 2020, arXiv:2002.05202) and rotary positions (Su et al. 2021, arXiv:2104.09864) of rows and columns.

    input      class   code 0   code 1   ...   code n-2
    logits of  code 0  code 1   code 2   ...   code n-1

A caption, and given codes of other grids (a segmentation map, depth, a lower resolution), stand between the class and
the codes: see `Prefix`. Attention is causal over all of them: it needs no mask, and a caption can be learned too.

Codes of several grids (levels, depths, scales) follow each other in one sequence, coarse to fine. Each grid has its own
embedding and output, and a place of a coarse grid stands at the middle of what it covers of the finest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.cross_entropy import nll_of
from stage2_prior.decoding.engine import Decoder
from stage2_prior.decoding.prepared import prepared
from stage2_prior.priors.base import NO_CODE, AutoregressivePrior, TrainingLoss
from stage2_prior.priors.bitwise import BitEmbedding, BitOutput, bits_of_vocabulary, nll_of_bits
from stage2_prior.priors.prefix import Prefix
from stage2_prior.priors.transformer_layers import Block, RMSNorm, StackWeights, TransformerConfig, place_angles
from stage2_prior.stepping import step_dtype


class Transformer(AutoregressivePrior):
    """Codes of any number of grids, after a class, a caption and given codes."""

    kind = "transformer"
    reads_text = True
    takes_windows = True
    config_class = TransformerConfig
    config: TransformerConfig

    def __init__(self, config: TransformerConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        grids = code_spec.grids
        self.vocabularies = [grid.vocabulary for grid in grids]
        self.sizes = [grid.size for grid in grids]
        self.classes = nn.Embedding(num_classes + 1, config.width)  # the last one is the null label
        self.prefix = Prefix(config.width, self.text, self.embeddings, self.given)
        self.embedding: nn.Embedding | BitEmbedding = nn.Embedding(sum(self.vocabularies), config.width)  # by grids
        # Of the grid that the next code belongs to; added to the token before it.
        self.next_grid = nn.Embedding(len(grids), config.width) if len(grids) > 1 else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output: nn.Linear | BitOutput = nn.Linear(config.width, sum(self.vocabularies), bias=False)
        if config.bitwise:
            bits = bits_of_vocabulary(self.only_grid())
            self.embedding, self.output = BitEmbedding(bits, config.width), BitOutput(config.width, bits)
        if config.text_loss_weight:
            if self.text is None:
                raise UserError(
                    f"text_loss_weight={config.text_loss_weight}, expected 0 for a prior that reads no captions; leave "
                    "it out, or give captions"
                )
            self.text_output = nn.Linear(config.width, self.text.vocabulary, bias=False)
        self.initialise()
        if config.tied:
            assert isinstance(self.output, nn.Linear)
            assert isinstance(self.embedding, nn.Embedding)
            self.output.weight = self.embedding.weight

    @property
    def tells_bits(self) -> bool:
        return self.config.bitwise

    def initialise(self) -> None:
        """As GPT-2: normal of 0.02, and less for what adds to the residual stream, so that its variance does not
        grow with the depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if adds else 0.02)

    def angles(self) -> Tensor:
        """See `place_angles`; a caption has no place in the image and is not turned, like the class. No buffer: a model
        in bfloat16 would round its angles."""
        grids = (*self.given, *self.code_spec.grids)
        angles = place_angles(grids, self.config.head_width, self.classes.weight.device)
        return F.pad(angles, (0, 0, self.prefix.text_length + self.prefix.embeddings_length, 0))

    def per_code(self, per_grid: Sequence[int]) -> Tensor:
        """A number of each grid for each of its codes: `n`."""
        device = self.classes.weight.device
        return torch.tensor(per_grid, device=device).repeat_interleave(torch.tensor(self.sizes, device=device))

    def first_numbers(self) -> list[int]:
        """Where the embeddings of each grid begin."""
        return [sum(self.vocabularies[:number]) for number in range(len(self.vocabularies))]

    def class_token(self, batch: int, condition: Condition) -> Tensor:
        """`b d`, the start of the sequence."""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)

    def start(self, batch: int, condition: Condition) -> Tensor:
        """What is known before the first code: the class and the prefix, `b 1+p d`."""
        token = self.class_token(batch, condition)[:, None]
        return torch.cat([token, self.prefix(condition)], dim=1) if self.prefix.length else token

    def states(self, codes: Codes, condition: Condition) -> Tensor:
        """`b p+n d`: the last n tell the codes, the p before them the prefix."""
        tokens = self.sequence(codes, condition)
        start = self.start(len(tokens), condition)
        if self.next_grid is not None:
            tokens = tokens + self.per_code(self.first_numbers())
        x = torch.cat([start, self.embedding(tokens[:, :-1])], dim=1)
        if self.next_grid is not None:
            x = x + F.pad(self.next_grid(self.per_code(range(len(self.sizes)))), (0, 0, self.prefix.length, 0))
        x, angles = self.dropout(x), self.angles()
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        return self.code_logits(self.states(codes, condition)[:, self.prefix.length :])

    def code_logits(self, states: Tensor) -> Tensor:
        """`b n d` -> `b n k`."""
        if self.next_grid is None:
            return self.output(states)
        outputs = zip(states.split(self.sizes, 1), self.output.weight.split(self.vocabularies), strict=True)
        logits = [F.linear(part, weight) for part, weight in outputs]
        largest = max(self.vocabularies)
        return torch.cat([F.pad(part, (0, largest - part.shape[-1]), value=NO_CODE) for part in logits], dim=1)

    def nll(self, codes: Codes, condition: Condition) -> Tensor:
        states = self.states(codes, condition)[:, self.prefix.length :]
        return self.code_nll(states, self.sequence(codes, condition))

    def code_nll(self, states: Tensor, sequence: Tensor) -> Tensor:
        """`b n d` and the codes that they tell -> `b n`. Of bits without the logits of all codes."""
        if isinstance(self.output, BitOutput):
            return nll_of_bits(self.output.pairs(states), sequence)
        return nll_of(self.code_logits(states), sequence)

    def forward(self, codes: Codes, condition: Condition, given: Codes | None = None) -> TrainingLoss:
        if not self.config.text_loss_weight and not self.config.bitwise:
            return super().forward(codes, condition, given)
        states = self.states(codes if given is None else given, condition)
        nll = self.code_nll(states[:, self.prefix.length :], self.sequence(codes, condition)).mean(dim=1)
        weight = self.config.text_loss_weight
        if not weight:
            return TrainingLoss(nll, nll.detach())
        return TrainingLoss((1 - weight) * nll + weight * self.text_nll(states, condition), nll.detach())

    def text_nll(self, states: Tensor, condition: Condition) -> Tensor:
        """Nats per token of each caption, `b`; 0 where there is none."""
        assert condition.text is not None
        told = condition.text >= 0  # b t
        nll = nll_of(self.text_output(states[:, : told.shape[1]]), condition.text.clamp(min=0))
        return (nll * told).sum(dim=1) / told.sum(dim=1).clamp(min=1)

    @property
    def numbers_kept(self) -> int:
        shared = self.config.shared_heads * self.config.head_width
        return 2 * self.config.layers * (self.prefix.length + sum(self.sizes)) * shared

    def stepper(self, batch: int, condition: Condition) -> TransformerStepper:
        return TransformerStepper(self, batch, condition)


class StepWeights(NamedTuple):
    """What sampling reads of a transformer, made once for each of its states."""

    stack: StackWeights
    embedding: Tensor  # k d, of all grids
    next_grid: Tensor | None
    grid_of: Tensor  # n, the grid that the code at each place belongs to
    first_number: Tensor  # n, where the embeddings of the grid begin that the code before each place belongs to

    @classmethod
    def of(cls, prior: Transformer, dtype: torch.dtype) -> StepWeights:
        outputs = prior.output.weight.split(prior.vocabularies)
        stack = StackWeights(prior.config, prior.blocks, prior.norm.gain, outputs, prior.angles(), dtype)
        device = prior.classes.weight.device
        grids = range(len(prior.sizes))
        grid_of = torch.cat([torch.full((prior.sizes[grid],), grid, device=device) for grid in grids])
        firsts = zip(prior.sizes, prior.first_numbers(), strict=True)
        first_number = torch.cat([torch.full((size,), first, device=device) for size, first in firsts])
        return cls(
            stack,
            prior.embedding.weight.detach().to(dtype),
            None if prior.next_grid is None else prior.next_grid.weight.detach().to(dtype),
            grid_of,
            F.pad(first_number, (1, -1)),
        )


class TransformerStepper:
    """One place, or a window of places, of the transformer per call. Computes in autocast's type where autocast is on
    when it is made, else in the weights' type."""

    @torch.inference_mode()
    def __init__(self, prior: Transformer, batch: int, condition: Condition):
        prior.check(batch, condition)
        device, dtype = prior.classes.weight.device, step_dtype(prior.classes.weight)
        weights = prepared(prior, dtype, lambda: StepWeights.of(prior, dtype), rows=batch)
        self.stack, self.embedding, self.next_grid, self.grid_of, self.first_number = weights
        self.outputs = weights.stack.outputs
        self.grid_at = [grid for grid, size in enumerate(prior.sizes) for _ in range(size)]
        self.first_numbers = prior.first_numbers()
        start = prior.start(batch, condition.to(device)).to(dtype)  # b 1+p d
        self.start = start[:, -1]  # b d, the token before the first code
        self.before = prior.prefix.length
        self.position = 0
        self.decoder = Decoder(self.stack.weights, batch, self.before + len(self.grid_at), dtype, device)
        if self.before:
            self.decoder.read(start[:, :-1])

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):
            grid = self.grid_at[self.position]
            x = self.start if previous is None else self._embedded(previous[:, 0])
            if self.next_grid is not None:
                x = x + self.next_grid[grid]
            states = self.decoder.step(x, self.before + self.position)
            self.position += 1
            return self.outputs[grid].joined(states).float()[:, None]

    def _embedded(self, previous: Tensor) -> Tensor:
        if first := self.first_numbers[self.grid_at[self.position - 1]]:
            previous = previous + first
        return F.embedding(previous, self.embedding)

    @torch.inference_mode()
    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):
            places = first[:, None] + torch.arange(previous.shape[1], device=first.device)
            within = places.clamp(max=len(self.grid_of) - 1)
            x = F.embedding(previous.clamp(min=0) + self.first_number[within], self.embedding)
            x = torch.where((places == 0)[..., None], self.start[:, None], x)
            if self.next_grid is not None:
                x = x + self.next_grid[self.grid_of[within]]
            states = self.decoder.window(x, self.before + first).flatten(0, 1)
            logits = [output.joined(states).float().unflatten(0, places.shape) for output in self.outputs]
            largest = max(part.shape[-1] for part in logits)
            chosen = logits[0]
            for grid, part in enumerate(logits):
                filled = F.pad(part, (0, largest - part.shape[-1]), value=NO_CODE)
                chosen = filled if grid == 0 else torch.where((self.grid_of[within] == grid)[..., None], filled, chosen)
            return chosen
