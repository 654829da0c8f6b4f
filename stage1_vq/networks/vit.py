"""Vision transformer as encoder and as decoder (Yu et al. 2021, arXiv:2110.04627, section 3.1), of timm's blocks.

The ViT of Dosovitskiy et al. 2020 (arXiv:2010.11929) without class token: one token per patch of pixels, and one code
per token. Height and width are free: the positions are made for the grid of training and interpolated for others.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.token_transformer import MLP_RATIO, initialise_linear

PositionKind = Literal["learned", "sincos"]


class Positions(nn.Module):
    """Adds to each token, b d h w, a vector that tells its row and column."""

    table: Tensor  # d h w, for the grid of training

    def __init__(self, grid: tuple[int, int], width: int, kind: PositionKind) -> None:
        super().__init__()
        h, w = grid
        if kind == "sincos":
            from timm.layers import build_sincos2d_pos_embed  # seconds, which other models need not wait for

            table = rearrange(build_sincos2d_pos_embed([h, w], width), "(h w) d -> d h w", h=h, w=w)
            self.register_buffer("table", table, persistent=False)
        else:
            self.table = nn.Parameter(0.02 * torch.randn(width, h, w))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        table = self.table
        if (h, w) != table.shape[1:]:
            table = F.interpolate(table.unsqueeze(0), (h, w), mode="bicubic").squeeze(0)
        # A table of sines is not saved, and float32 in a loaded model of another type. Under autocast it is float32
        # too, and so are the tokens from here on: the blocks add to them in float32.
        return x + (table if torch.is_autocast_enabled(x.device.type) else table.to(x.dtype))


class Transformer(nn.Module):
    """Tokens, b d h w -> positions, blocks of attention and MLP, layer norm -> b (h w) d."""

    def __init__(self, *, grid: tuple[int, int], width: int, blocks: int, heads: int, positions: PositionKind) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block  # seconds, which other models need not wait for

        self.positions = Positions(grid, width, positions)
        self.blocks = nn.Sequential(*(Block(width, heads, MLP_RATIO, qkv_bias=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(rearrange(self.positions(x), "b d h w -> b (h w) d")))


def tanh_mlp(width: int, width_out: int) -> nn.Sequential:
    """The head of encoder and decoder: two layers with tanh in the middle, and no activation at the end."""
    hidden = MLP_RATIO * width
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width_out))


class ViTEncoder(nn.Module):
    """Images, b c H W -> z, b d h w."""

    def __init__(
        self,
        *,
        channels: int,
        patch: int,
        grid: tuple[int, int],
        width: int,
        blocks: int,
        heads: int,
        positions: PositionKind,
        width_out: int,
    ) -> None:
        """grid: of patches (rows, columns) in the images of training."""
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.transformer = Transformer(grid=grid, width=width, blocks=blocks, heads=heads, positions=positions)
        self.head = tanh_mlp(width, width_out)
        self.apply(initialise_linear)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images)
        z = self.head(self.transformer(tokens))
        return rearrange(z, "b (h w) d -> b d h w", h=tokens.shape[2], w=tokens.shape[3])


class ViTDecoder(nn.Module):
    """z_q, b d h w -> b c H W. A 1x1 convolution comes first where the width of z_q is not that of the tokens."""

    def __init__(
        self,
        *,
        width_in: int,
        channels: int,
        patch: int,
        grid: tuple[int, int],
        width: int,
        blocks: int,
        heads: int,
        positions: PositionKind,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.input = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.transformer = Transformer(grid=grid, width=width, blocks=blocks, heads=heads, positions=positions)
        self.head = tanh_mlp(width, channels * patch**2)
        self.apply(initialise_linear)

    def forward(self, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(z_q))

    def trunk(self, z_q: Tensor) -> Tensor:
        """All but the last layer of the head: b h w d."""
        tokens = self.transformer(self.input(z_q))
        return rearrange(self.head[:-1](tokens), "b (h w) d -> b h w d", h=z_q.shape[2], w=z_q.shape[3])

    def last(self, features: Tensor) -> Tensor:
        patches = self.head[-1](features)
        return rearrange(patches, "b h w (c p q) -> b c (h p) (w q)", p=self.patch, q=self.patch)
