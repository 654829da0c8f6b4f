"""VAR: next-scale prediction (Tian et al. 2024, "Visual Autoregressive Modeling", arXiv:2404.02905).

A transformer that draws whole grids of codes, coarse to fine: one step for each scale, in which all codes of that scale
are drawn at once.

    input      class      sum of scale 1      sum of scales 1, 2      ...
                          on scale 2's grid   on scale 3's grid
    logits of  scale 1    scale 2             scale 3                 ...

A position sees its own scale and all coarser ones. What goes in, the latents of the scales so far, is the matter of
scale_latents.py; the class also modulates every layer norm (AdaLN, Peebles & Xie 2022, arXiv:2212.09748). Guidance as
published is `guidance_schedule: linear`: t * cfg there is `guidance` - 1 here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.shards import CodeDataset
from codes.spec import Codes, CodeSpec
from common.draws import uniform
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.decoding.prepared import prepared
from stage2_prior.mistakes import flipped, others
from stage2_prior.priors.base import AutoregressivePrior, Places
from stage2_prior.priors.scale_latents import ScaleLatents
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """The published models, of 16 to 36 layers, have width = 64 * layers, heads = layers, drop_path = layers / 240."""

    kind: Literal["var"] = "var"
    layers: int = 8
    width: int = 512  # d
    heads: int = 8  # each of width / heads numbers
    shared_adaln: bool = False  # one modulation for all blocks and offsets of each; else each block has its own
    dropout: float = 0.0  # of what attention and feed-forward add to the residual stream
    drop_path: float = 0.0  # share of samples for which the last block adds nothing; rises to it from 0 at the first
    cosine_attention: bool = True  # scores are cosines times a learned factor; else a quarter of the usual products
    mlp_ratio: float = 4.0  # width inside a feed-forward layer, as a multiple of d
    initial_gain: float = 1e-5  # of what a block adds to the residual stream, as a factor of its usual start

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise UserError(f"width={self.width}, expected a multiple of heads={self.heads}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected a share from 0 to below 1")
        if round(self.width * self.mlp_ratio) < 1:
            raise UserError(f"mlp_ratio={self.mlp_ratio}, expected above 0; published: 4")
        if not self.initial_gain > 0:
            raise UserError(f"initial_gain={self.initial_gain}, expected above 0; published: 1e-3 to 5e-6")


def rising(share: float, layers: int) -> list[float]:
    """From 0 for the first layer to `share` for the last."""
    return [share * number / max(1, layers - 1) for number in range(layers)]


def kept_paths(x: Tensor, dropped: Sequence[float]) -> Tensor:
    """Which samples, x: b n d, take the two paths of each block and not the way around (Huang et al. 2016,
    arXiv:1603.09382): `layers 2 b 1 1`, 0 or the inverse of the share that does. dropped: share that does not, of each
    block."""
    if not any(dropped):
        return x.new_ones(len(dropped), 2, len(x), 1, 1)
    share = 1 - torch.tensor(dropped, device=x.device)[:, None]
    drawn = uniform(len(x), len(dropped), 2, device=x.device)
    return ((drawn < share) / share).permute(1, 2, 0)[..., None, None].to(x.dtype)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm of x, b n d, stretched and moved as the class has it, b 1 d."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Modulation(nn.Module):
    """The class vector, b d -> `b 1 parts d`."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, vectors: Tensor) -> Tensor:
        return rearrange(self.linear(F.silu(vectors)), "b (parts d) -> b 1 parts d", parts=self.parts)


class Offsets(nn.Module):
    """What a block adds to the modulation, `b 1 6 d`, that all blocks share."""

    def __init__(self, width: int):
        super().__init__()
        self.offsets = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.offsets


class Attention(nn.Module):
    """Self-attention by the cosine of queries and keys, times a learned factor of each head, or by their products, a
    quarter of the usual ones. Keys have no bias."""

    largest_factor = 100.0

    def __init__(self, config: VARConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        factor = nn.Parameter(torch.full((config.heads,), math.log(4))) if config.cosine_attention else None
        self.log_factor: Tensor | None
        self.register_parameter("log_factor", factor)
        self.out = nn.Linear(config.width, config.width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `b heads n d`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        if self.log_factor is None:
            return q * product_scale(q.shape[-1]), k, v
        factor = self.log_factor.float().clamp(max=math.log(self.largest_factor)).exp()  # heads
        q, k = F.normalize(q.float(), dim=-1) * factor[:, None, None], F.normalize(k.float(), dim=-1)
        return q.to(v.dtype), k.to(v.dtype), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: n n, True where a query sees a key; None where it sees all. Returns b n d."""
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


def product_scale(head_width: int) -> float:
    """Of products of queries and keys, as published."""
    return 0.25 / math.sqrt(head_width)


class FeedForward(nn.Module):
    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.up = nn.Linear(width, round(width * ratio))
        self.down = nn.Linear(round(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: VARConfig):
        super().__init__()
        self.modulation: Any = Offsets(config.width) if config.shared_adaln else Modulation(config.width, 6)
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.width, config.mlp_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, condition: Tensor, mask: Tensor, kept: Tensor | tuple[float, float] = (1.0, 1.0)
    ) -> Tensor:
        """kept: by what the two paths of each sample are multiplied, 2 b 1 1."""
        gain1, gain2, scale1, scale2, shift1, shift2 = self.modulation(condition).unbind(2)
        attended = self.attention.attend(*self.attention.project(modulated(x, scale1, shift1)), mask)
        x = x + kept[0] * gain1 * self.dropout(attended)
        return x + kept[1] * gain2 * self.dropout(self.feed_forward(modulated(x, scale2, shift2)))


class VAR(AutoregressivePrior):
    """Codes of two or more grids of one vocabulary, coarse to fine. Codes in groups have a grid for each group at each
    scale: these are scales of one size, drawn one after the other, and each sees the groups before it."""

    kind = "var"
    reads_given = False
    config_class = VARConfig
    config: VARConfig
    scale_of: Tensor  # n, of each code, counted from 0

    def __init__(
        self,
        config: VARConfig,
        code_spec: CodeSpec,
        num_classes: int,
        *,
        latent_width: int | None = None,
        latent_gains: bool = False,
        **facts: Any,
    ):
        """latent_width: d of the tokenizer's code vectors, with which `latents.fill` or a state dict will fill the
        prior's; None: it learns its own; latent_gains: whether they come with gains, as those of codes in groups do.
        facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        grids = code_spec.grids
        vocabularies = sorted({grid.vocabulary for grid in grids})
        if len(grids) < 2 or len(vocabularies) > 1:
            raise UserError(
                f"got {code_spec.describe()}, expected two or more grids of one vocabulary: a var prior predicts scale "
                "after scale; take an autoencoder with quantizer.kind=multiscale, or a transformer prior"
            )
        width, sizes = config.width, [grid.size for grid in grids]
        self.latent_width = latent_width
        self.sizes = sizes
        self.latents = ScaleLatents(code_spec, latent_width, latent_gains)
        self.word = nn.Linear(self.latents.codebook.shape[1], width)
        self.classes = nn.Embedding(num_classes + 1, width)  # the last one is the null label
        self.start = nn.Parameter(torch.empty(1, sizes[0], width))
        self.places = nn.Parameter(torch.empty(1, sum(sizes), width))
        self.scales = nn.Embedding(len(sizes), width)
        self.shared: nn.Module = Modulation(width, 6) if config.shared_adaln else nn.Identity()
        self.drop_paths = rising(config.drop_path, config.layers)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_modulation = Modulation(width, 2)
        self.output = nn.Linear(width, vocabularies[0])
        scale_of = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
        self.register_buffer("scale_of", scale_of, persistent=False)
        self.initialise()

    def place_tables(self) -> dict[str, Places]:
        grids = tuple((grid.height, grid.width) for grid in self.code_spec.grids)
        return {"places": Places(0, grids), "start": Places(0, grids[:1])}

    def fitted(self, name: str, weight: Tensor, fresh: Tensor, other: Self) -> Tensor | None:
        if name.startswith("latents."):  # the code vectors are those of the codes
            return weight if torch.equal(weight, fresh) else None
        return super().fitted(name, weight, fresh, other)

    def arguments(self) -> dict[str, Any]:
        gains = {"latent_gains": True} if self.latents.gains is not None else {}
        return {**super().arguments(), "latent_width": self.latent_width, **gains}

    @classmethod
    def for_codes(cls, config: Any, codes: CodeDataset, num_classes: int, **facts: Any) -> Self:
        latents = codes.latents()
        if latents is None:
            return super().for_codes(config, codes, num_classes, **facts)
        width, gains = latents["codebook"].shape[1], "gains" in latents
        prior = cls(config, codes.code_spec, num_classes, latent_width=width, latent_gains=gains, **facts)
        prior.latents.fill(latents)
        return prior

    @torch.no_grad()
    def initialise(self) -> None:
        """As published: variance 1 / (3 d), little of it in the output, half in the modulations, and next to none in
        the gains, so that every block begins as the identity."""
        std = math.sqrt(1 / self.config.width / 3)
        weights: list[Tensor] = [self.start, self.places]
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                weights.append(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for weight in weights:
            nn.init.trunc_normal_(weight, std=std)
        self.output.weight *= 0.02
        self.output_modulation.linear.weight *= 0.5
        for block in cast("list[Block]", self.blocks):
            block.attention.out.weight /= math.sqrt(2 * self.config.layers)
            block.feed_forward.down.weight /= math.sqrt(2 * self.config.layers)
            of_block = block.modulation.offsets[0, 0] if self.config.shared_adaln else block.modulation.linear.weight
            gains, scales, shifts = of_block.chunk(3)
            gains *= self.config.initial_gain
            scales *= 0.5
            shifts *= 0.5

    def class_vectors(self, batch: int, condition: Condition) -> Tensor:
        """`b d`, the start and what modulates the norms."""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)

    def with_mistakes(self, codes: Codes, share: float) -> tuple[Codes, Codes]:
        """See `AutoregressivePrior`; the scales after a mistake are told to mend it."""
        return self.latents.corrected(codes, flipped(codes, share), others(self.code_spec, codes))

    def kept_paths(self, x: Tensor) -> Tensor:
        """See the function `kept_paths`."""
        return kept_paths(x, self.drop_paths if self.training else [0.0] * len(self.blocks))

    def positions(self) -> Tensor:
        """What tells the places of all scales apart: 1 n d."""
        return self.places + self.scales(self.scale_of)

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        batch = len(self.sequence(codes, condition))
        vectors = self.class_vectors(batch, condition)
        seen = self.word(self.latents(codes).to(self.word.weight.dtype))
        x = torch.cat([vectors[:, None] + self.start, seen], dim=1) + self.positions()  # b n d
        modulation, mask = self.shared(vectors), self.scale_of[:, None] >= self.scale_of
        for block, kept in zip(self.blocks, self.kept_paths(x), strict=True):
            x = block(x, modulation, mask, kept)
        return self.output(modulated(x, *self.output_modulation(vectors).unbind(2)))  # b n k

    @property
    def numbers_kept(self) -> int:
        return 2 * self.config.layers * sum(self.sizes) * self.config.width

    @property
    def steps(self) -> int:
        return len(self.sizes)

    def stepper(self, batch: int, condition: Condition) -> VARStepper:
        return VARStepper(self, batch, condition)


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def in_type(module: AnyModule, dtype: torch.dtype) -> AnyModule:
    """The module itself, or where its weights are of another type a copy in this one."""
    same = all(weight.dtype == dtype for weight in module.parameters())
    return module if same else copy.deepcopy(module).to(dtype)


class StepWeights(NamedTuple):
    """What sampling reads of a VAR, in the type that it computes in: once for each state of the weights."""

    word: nn.Linear
    output: nn.Linear
    blocks: list[tuple[Attention, FeedForward]]
    positions: tuple[Tensor, ...]  # 1 m d of each scale

    @classmethod
    def of(cls, prior: VAR, dtype: torch.dtype) -> StepWeights:
        return cls(
            in_type(prior.word, dtype),
            in_type(prior.output, dtype),
            [
                (in_type(block.attention, dtype), in_type(block.feed_forward, dtype))
                for block in cast("list[Block]", prior.blocks)
            ],
            prior.positions().to(dtype).split(prior.sizes, dim=1),
        )


class StepBlock(NamedTuple):
    """A block with the modulation of its samples: it depends on the class alone, so one image needs it once."""

    attention: Attention
    feed_forward: FeedForward
    modulation: tuple[Tensor, ...]  # six of b 1 d
    keys: Tensor  # b heads n d, of all scales: room for those to come
    values: Tensor


class VARStepper:
    """One scale per call: keys and values of earlier scales wait in a cache that is allocated once. Computes in
    autocast's type where autocast is on when it is made, else in the weights' type."""

    @torch.inference_mode()
    def __init__(self, prior: VAR, batch: int, condition: Condition):
        config = prior.config
        device, dtype = prior.output.weight.device, step_dtype(prior.output.weight)
        prior.check(batch, condition)
        self.latents, self.sizes = prior.latents, prior.sizes
        weights = prepared(prior, dtype, lambda: StepWeights.of(prior, dtype))
        self.word, self.output, self.positions = weights.word, weights.output, weights.positions
        vectors = prior.class_vectors(batch, condition.to(device))
        self.first = (vectors[:, None] + prior.start).to(dtype) + self.positions[0]
        self.output_modulation = prior.output_modulation(vectors).to(dtype).unbind(2)
        shared = prior.shared(vectors)
        cache = (config.layers, 2, batch, config.heads, sum(self.sizes), config.width // config.heads)
        self.blocks = [
            StepBlock(*layers, block.modulation(shared).to(dtype).unbind(2), *key_value)
            for block, layers, key_value in zip(
                cast("list[Block]", prior.blocks),
                weights.blocks,
                torch.zeros(cache, dtype=dtype, device=device),
                strict=True,
            )
        ]
        self.total: Tensor | None = None  # the latents of the scales so far, b d h w
        self.scale = self.done = 0  # scales, and codes in them

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.first.device.type, enabled=False):
            x = self.first if previous is None else self._embedded(previous)
            start, self.done = self.done, self.done + x.shape[1]
            self.scale += 1
            return self._logits(x, start, self.done)

    def _embedded(self, previous: Tensor) -> Tensor:
        """What the coming scale sees, b m d; previous: b m', the codes of the one before it."""
        self.total = self.latents.add(self.total, previous, self.scale - 1)
        seen = self.latents.seen_by(self.scale, self.total)
        return self.word(seen.to(self.first.dtype)) + self.positions[self.scale]

    def _logits(self, x: Tensor, start: int, end: int) -> Tensor:
        for attention, feed_forward, modulation, keys, values in self.blocks:
            gain1, gain2, scale1, scale2, shift1, shift2 = modulation
            q, keys[:, :, start:end], values[:, :, start:end] = attention.project(modulated(x, scale1, shift1))
            x = x + gain1 * attention.attend(q, keys[:, :, :end], values[:, :, :end])
            x = x + gain2 * feed_forward(modulated(x, scale2, shift2))
        return self.output(modulated(x, *self.output_modulation)).float()
