"""The layers of PixelSNAIL (pixelsnail.py), and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError
from stage2_prior.priors.gated_convolutions import CausalConvolution, Convolution, GatedResidual


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig:
    kind: Literal["pixelsnail"] = "pixelsnail"
    blocks: int = 2  # residual blocks and attention each
    residual_blocks: int = 4  # of a block
    width: int = 128  # d, channels between residual blocks
    residual_width: int = 128  # channels inside a residual block
    kernel_size: int = 5  # of the causal convolutions: rows, the current one included, and columns
    attention: bool = True  # False: a block ends with a 1x1 convolution; attention grows with the square of a grid
    heads: int = 8  # of attention; all of them together have width / 2 channels
    output_blocks: int = 0  # residual blocks of 1x1 convolutions before the logits
    dropout: float = 0.1  # inside residual blocks, and of the shares of attention
    given_blocks: int = 3  # residual blocks over each grid of given codes; without given codes it means nothing
    given_width: int = 64  # channels of each given grid's features
    given_kernel_size: int = 3  # of the convolutions over given codes

    def __post_init__(self) -> None:
        for name in ("blocks", "residual_blocks", "width", "residual_width", "heads", "given_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        for name in ("output_blocks", "given_blocks"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}, expected 0 or more")
        for name, least in (("kernel_size", 3), ("given_kernel_size", 1)):
            if getattr(self, name) < least or getattr(self, name) % 2 == 0:
                raise UserError(f"{name}={getattr(self, name)}, expected an odd number of at least {least}")
        if self.attention and self.width % (2 * self.heads):
            raise UserError(
                f"width={self.width} with heads={self.heads}, expected a width that is a multiple of {2 * self.heads}: "
                "the heads share half of it"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}, expected a share from 0 to below 1")


class Attention(nn.Module):
    """Each position attends to those before it, and not to itself: queries `b q h w`, keys `b k h w` -> `b d h w`. The
    first position has none to attend to: zeros."""

    def __init__(self, query_width: int, key_width: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.share_dropout = dropout
        self.query = Convolution(query_width, width)
        self.key = Convolution(key_width, width)
        self.value = Convolution(key_width, width)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        q, k, v = (
            rearrange(x, "b (heads d) h w -> b heads (h w) d", heads=self.heads)
            for x in (self.query(queries), self.key(keys), self.value(keys))
        )
        # From the second position on, each sees the keys up to the one before it.
        dropout = self.share_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], dropout_p=dropout, is_causal=True
        )
        return rearrange(F.pad(attended, (0, 0, 1, 0)), "b heads (h w) d -> b (heads d) h w", h=queries.shape[2])


class GateBias(nn.Module):
    """What a class and given codes add to the gates of a residual block; None where a prior has neither."""

    def __init__(self, gates: int, num_classes: int, given_width: int):
        super().__init__()
        self.classes = nn.Embedding(num_classes + 1, gates) if num_classes else None  # the last is the null label
        self.given = Convolution(given_width, gates, bias=False) if given_width else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, labels: Tensor | None, features: Tensor | None) -> Tensor | None:
        """labels: b; features: b given_width h w -> b gates h w, or b gates 1 1 without given codes."""
        bias = None if self.classes is None else rearrange(self.classes(labels), "b d -> b d 1 1")
        if self.given is None:
            return bias
        return self.given(features) if bias is None else self.given(features) + bias


class Block(nn.Module):
    """b d h w -> b d h w: what is near, then what is far."""

    def __init__(self, config: PixelSNAILConfig, num_classes: int, given_width: int):
        super().__init__()
        width, dropout = config.width, config.dropout
        convolution = partial(CausalConvolution, kernel_size=config.kernel_size)
        count = range(config.residual_blocks)
        self.residuals = nn.ModuleList(GatedResidual(width, config.residual_width, convolution, dropout) for _ in count)
        self.gate_biases = nn.ModuleList(GateBias(2 * width, num_classes, given_width) for _ in count)
        self.out: GatedResidual | Convolution
        if config.attention:
            queries, keys = width + 2, 2 * width + 2  # with the place
            self.keys = GatedResidual(keys, width, Convolution, dropout)
            self.queries = GatedResidual(queries, width, Convolution, dropout)
            self.attention = Attention(queries, keys, width // 2, config.heads, dropout)
            self.out = GatedResidual(width, width, Convolution, dropout, side_width=width // 2)
        else:
            self.out = Convolution(width + 2, width)

    def forward(self, x: Tensor, places: Tensor, labels: Tensor | None, features: Tensor | None) -> Tensor:
        """places: b 2 h w."""
        near = x
        for residual, gate_bias in zip(self.residuals, self.gate_biases, strict=True):
            near = residual(near, gate_bias=gate_bias(labels, features))
        located = torch.cat([near, places], dim=1)
        if isinstance(self.out, Convolution):
            return self.out(located)
        keys = self.keys(torch.cat([x, located], dim=1))
        return self.out(near, side=self.attention(self.queries(located), keys))
