"""The transformer of Halton-MaskGIT (Besnier et al. 2025, arXiv:2503.17076): a masked prior whose class steers every
block, as in DiT (Peebles and Xie 2022, arXiv:2212.09748), in place of a token of its own.

    input      code 0   mask     mask     code 3   ...   register 0 ...      positions are learned
    logits of           code 1   code 2

    x = x + gate * attention(shift + (1 + scale) * norm(x))      shift, scale, gate: of each block, by the class
    x = x + gate * SwiGLU(shift + (1 + scale) * norm(x))

Registers are learned vectors behind the codes (Darcet et al. 2023, arXiv:2309.16588). Queries and keys are normalised
over all heads together. The output has the weights of the code embedding, which holds the mask, too, and a bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.draws import spread, uniform
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.cross_entropy import nll_of
from stage2_prior.priors.base import Places, TrainingLoss
from stage2_prior.priors.masked import MaskedPrior

EPSILON = 1e-5  # of every norm, inside the root


@dataclass(frozen=True, kw_only=True)
class HaltonMaskGITConfig:
    kind: Literal["halton_maskgit"] = "halton_maskgit"
    layers: int = 12
    width: int = 768  # d
    heads: int = 12  # each of width // heads numbers, which need not fill the width
    hidden_width: int | None = None  # of SwiGLU; None: 8/3 of the width, rounded up to a multiple of 256
    registers: int = 1
    dropout: float = 0.0  # of attention, and of what attention and feed-forward add to the residual stream
    nll_levels: int = 8  # passes by which a validation estimates the nll of an image; more: less noise

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("heads", 1), ("width", self.heads), ("registers", 0), ("nll_levels", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}, expected at least {least}")
        if self.hidden_width is not None and self.hidden_width < 1:
            raise UserError(f"hidden_width={self.hidden_width}, expected at least 1; leave it out for 8/3 of the width")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}, expected a share from 0 to below 1")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        return self.hidden_width or math.ceil(8 * self.width // 3 / 256) * 256


def normalised(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis, in float32."""
    return (x.float() * (x.float().square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt()).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, width: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = normalised(x) * self.weight
        return x if self.bias is None else x + self.bias


class Modulation(nn.Module):
    """Vectors of an image, `b 1 d` each, told by its class, `b d`; 0 before training."""

    def __init__(self, width: int, vectors: int):
        super().__init__()
        self.vectors = vectors
        self.linear = nn.Linear(width, vectors * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition))[:, None].chunk(self.vectors, dim=-1)


class Attention(nn.Module):
    def __init__(self, config: HaltonMaskGITConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        inner = config.heads * config.head_width
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(y, "b n (heads d) -> b heads n d", heads=self.heads)
            for y in (normalised(self.q(x)), normalised(self.k(x)), self.v(x))
        )
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


class FeedForward(nn.Module):
    """SwiGLU"""

    def __init__(self, config: HaltonMaskGITConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: HaltonMaskGITConfig):
        super().__init__()
        self.modulation = Modulation(config.width, 6)
        self.attention_norm = Norm(config.width)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config.width)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition)
        x = x + gate * self.dropout(self.attention(shift + (1 + scale) * self.attention_norm(x)))
        return x + gate_2 * self.dropout(self.feed_forward(shift_2 + (1 + scale_2) * self.feed_forward_norm(x)))


class HaltonMaskGIT(MaskedPrior):
    kind = "halton_maskgit"
    config_class = HaltonMaskGITConfig
    config: HaltonMaskGITConfig
    reads_given = False
    sampling_steps = 32
    mask_schedule = "arccos"
    fill_order = "halton"

    def __init__(self, config: HaltonMaskGITConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`. Raises UserError for codes of several grids."""
        super().__init__(config, code_spec, num_classes, **facts)
        grid, width = self.only_grid(), config.width
        self.classes = nn.Embedding(num_classes + 1, width)  # the last one is the null label
        self.embedding = nn.Embedding(grid.vocabulary + 1, width)  # the last one is the mask
        self.places = nn.Embedding(grid.size, width)
        self.registers = nn.Parameter(torch.empty(config.registers, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(width, bias=True)
        self.modulation = Modulation(width, 2)
        self.bias = nn.Parameter(torch.zeros(grid.vocabulary + 1))
        self.initialise()

    def place_tables(self) -> dict[str, Places]:
        grid = self.only_grid()
        return {"places.weight": Places(0, ((grid.height, grid.width),))}

    def initialise(self) -> None:
        """As published: blocks begin as identities."""
        for name, parameter in self.named_parameters():
            if "modulation" in name:
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2 and name.startswith("blocks."):
                nn.init.xavier_uniform_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def logits_and_mask(self, sequence: Tensor, condition: Condition) -> Tensor:
        """Logits `b n k+1` of the codes of a `sequence` b n, -1 where one is hidden; the last is that of the mask,
        which the published samplers may draw."""
        self.check(len(sequence), condition)
        labels = sequence.new_full((len(sequence),), self.num_classes) if condition.labels is None else condition.labels
        classes = self.classes(labels)  # b d
        x = self.embedding(torch.where(sequence < 0, self.masks, sequence)) + self.places.weight
        x = torch.cat([x, self.registers.expand(len(x), -1, -1).to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x, classes)
        shift, scale = self.modulation(classes)
        x = shift + (1 + scale) * self.norm(x[:, : sequence.shape[1]])
        return F.linear(x, self.embedding.weight, self.bias)

    def logits_of_grids(self, sequence: Tensor, condition: Condition) -> list[Tensor]:
        return [self.logits_and_mask(sequence, condition)[..., :-1]]

    def forward(self, codes: Codes, condition: Condition) -> TrainingLoss:
        """The mean cross-entropy of all codes, hidden or not, as the published training has it. Each is hidden with the
        same probability, the arccosine of a uniform number over a right angle."""
        sequence = self.sequence(codes, condition)
        shares = spread(len(sequence), sequence.device).clamp(max=1).acos() / (math.pi / 2)
        hidden = uniform(*sequence.shape, device=sequence.device) < shares[:, None]
        (logits,) = self.logits_of_grids(sequence.masked_fill(hidden, -1), condition)
        return TrainingLoss(nll_of(logits, sequence).mean(dim=1), None)
