"""The vision transformer of TiTok (Yu et al. 2024, arXiv:2406.07550), of timm's blocks: tokens of patches and tokens of
the whole image attend to each other."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

MLP_RATIO = 4  # width of the hidden layer of an MLP, as a multiple of the width of the tokens


def initialise_linear(module: nn.Module) -> None:
    """As ViT's authors do: variances stay the same forwards and backwards."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


class TokenTransformer(nn.Module):
    """A class token, tokens of patches and latent tokens, each with its position -> norm, blocks, norm -> b n d."""

    def __init__(self, *, patches: int, tokens: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block  # seconds, which other models need not wait for

        self.class_token = normal(1, width)
        self.positions = normal(1 + patches, width)  # of the class token and the patches
        self.token_positions = normal(tokens, width)
        self.norm_before = nn.LayerNorm(width)
        made = (Block(width, heads, MLP_RATIO, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(blocks))
        self.blocks = nn.Sequential(*made)  # the norms have the epsilon of torch, 1e-5, and not timm's
        self.norm_after = nn.LayerNorm(width)

    def forward(self, patches: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """patches: b m d; tokens: b n d. Returns both as they come out, likewise."""
        first = repeat(self.class_token, "n d -> b n d", b=len(patches)).to(patches.dtype)
        picture = torch.cat([first, patches], 1) + self.positions
        x = self.norm_before(torch.cat([picture, tokens + self.token_positions], 1))
        x = self.norm_after(self.blocks(x))
        return x[:, 1 : picture.shape[1]], x[:, picture.shape[1] :]
