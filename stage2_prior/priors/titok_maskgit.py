"""The masked priors of TiTok (Yu et al. 2024, arXiv:2406.07550) over the codes of 1-D tokenizers: MaskGIT on BERT
(Devlin et al. 2018, arXiv:1810.04805), or on a U-ViT (Bao et al. 2022, arXiv:2209.12152) whose second half sees what
each block of the first one gave.

    input      class   code 0   mask     mask     code 3   ...       classes stand in the table of codes, after the mask
    logits of                   code 1   code 2                      positions are learned
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.draws import spread
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors.base import Places, TrainingLoss
from stage2_prior.priors.masked import MaskedPrior, hide


@dataclass(frozen=True, kw_only=True)
class TiTokMaskGITConfig:
    kind: Literal["titok_maskgit"] = "titok_maskgit"
    network: Literal["bert", "uvit"] = "bert"
    layers: int = 24  # of a U-ViT even: half of them down, half up; one more stands between
    width: int = 768  # d
    heads: int = 16
    hidden_width: int = 3072  # of the feed-forward layers
    dropout: float = 0.1  # of BERT, as published; a U-ViT has none
    label_smoothing: float = 0.1  # share of the target that is spread over all codes
    nll_levels: int = 8  # passes by which a validation estimates the nll of an image; more: less noise

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "hidden_width", "nll_levels"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.network not in NETWORKS:
            raise UserError(f"network={self.network}, expected one of {', '.join(NETWORKS)}")
        if self.width % self.heads:
            raise UserError(f"width={self.width} with heads={self.heads}, expected a width that is a multiple of heads")
        if self.network == "uvit" and self.layers % 2:
            raise UserError(f"layers={self.layers} of a uvit, expected an even number: as many go down as up")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected a share from 0 to below 1")


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float = 0.0) -> Tensor:
    """Of all places to all: `b n d` each."""
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), "b heads n d -> b n (heads d)")


class BertBlock(nn.Module):
    """Norms follow what is added."""

    def __init__(self, config: TiTokMaskGITConfig):
        super().__init__()
        width = config.width
        self.heads, self.share = config.heads, config.dropout
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.up = nn.Linear(width, config.hidden_width)
        self.down = nn.Linear(config.hidden_width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        attended = attention(self.q(x), self.k(x), self.v(x), self.heads, self.share if self.training else 0.0)
        x = self.attention_norm(x + self.dropout(self.out(attended)))
        return self.feed_forward_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    def __init__(self, config: TiTokMaskGITConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class UViTBlock(nn.Module):
    """Norms come before what is added."""

    def __init__(self, config: TiTokMaskGITConfig, joins: bool = False):
        """joins: takes what a block of the first half gave beside its input."""
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.skip = nn.Linear(2 * width, width) if joins else None
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.hidden_width)
        self.down = nn.Linear(config.hidden_width, width)

    def forward(self, x: Tensor, earlier: Tensor | None = None) -> Tensor:
        if self.skip is not None and earlier is not None:
            x = self.skip(torch.cat([x, earlier], dim=-1))
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        # As published, attention is in float32 whatever the rest is in.
        attended = attention(q.float(), k.float(), v.float(), self.heads).to(q.dtype)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


class UViT(nn.Module):
    def __init__(self, config: TiTokMaskGITConfig):
        super().__init__()
        half = config.layers // 2
        self.down = nn.ModuleList(UViTBlock(config) for _ in range(half))
        self.middle = UViTBlock(config)
        self.up = nn.ModuleList(UViTBlock(config, joins=True) for _ in range(half))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.up:
            x = block(x, skips.pop())
        return self.norm(x)


NETWORKS: dict[str, type[Bert] | type[UViT]] = {"bert": Bert, "uvit": UViT}


class TiTokMaskGIT(MaskedPrior):
    kind = "titok_maskgit"
    config_class = TiTokMaskGITConfig
    config: TiTokMaskGITConfig
    reads_given = False
    sampling_steps = 8
    mask_schedule = "arccos"
    fill_order = "confidence"
    choice_temperature = 4.5  # the default of the published code

    def __init__(self, config: TiTokMaskGITConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`. Raises UserError for codes of several grids."""
        super().__init__(config, code_spec, num_classes, **facts)
        grid = self.only_grid()
        # Codes, the mask, classes, the null label.
        self.embedding = nn.Embedding(grid.vocabulary + num_classes + 2, config.width)
        self.places = nn.Parameter(torch.zeros(1 + grid.size, config.width))
        self.network = NETWORKS[config.network](config)
        self.output = nn.Linear(config.width, grid.vocabulary)
        self.initialise()

    def fitted(self, name: str, weight: Tensor, fresh: Tensor, other: Self) -> Tensor | None:
        """In the one table of codes and classes, the classes are those of their names."""
        if (
            name == "embedding.weight"
            and self.vocabularies == other.vocabularies
            and weight.shape[1:] == fresh.shape[1:]
        ):
            codes = self.vocabularies[0] + 1
            classes = self.classes_of(weight[codes:], other)
            kept = classes.shape == weight[codes:].shape and torch.equal(classes, weight[codes:])
            return weight if kept else torch.cat([weight[:codes], classes])
        return super().fitted(name, weight, fresh, other)

    def place_tables(self) -> dict[str, Places]:
        grid = self.only_grid()
        return {"places": Places(1, ((grid.height, grid.width),))}

    def initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def logits_of_grids(self, sequence: Tensor, condition: Condition) -> list[Tensor]:
        self.check(len(sequence), condition)
        labels = sequence.new_full((len(sequence),), self.num_classes) if condition.labels is None else condition.labels
        tokens = torch.cat(
            [(labels + self.vocabularies[0] + 1)[:, None], torch.where(sequence < 0, self.masks, sequence)], dim=1
        )
        x = self.network(self.embedding(tokens) + self.places)
        return [self.output(x[:, 1:])]

    def forward(self, codes: Codes, condition: Condition) -> TrainingLoss:
        """The cross-entropy of hidden codes, whose share of the image is the arccosine of a uniform number over a right
        angle. Every hidden code counts alike: the sum over those of an image is divided by how many it has on average,
        2/pi n."""
        sequence = self.sequence(codes, condition)
        positions = sequence.shape[1]
        shares = spread(len(sequence), sequence.device).clamp(max=1).acos() / (math.pi / 2)
        hidden = hide((positions * shares).round().clamp(1, positions), positions)
        losses = self.hidden_nll(sequence, hidden, condition, self.config.label_smoothing)
        return TrainingLoss(losses.sum(dim=1) / (2 / math.pi * positions), None)
