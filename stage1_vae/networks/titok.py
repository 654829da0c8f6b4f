"""The networks of TiTok with continuous tokens (Yu et al. 2024, arXiv:2406.07550; its VAEs are of Kim et al. 2025,
arXiv:2501.07730): latents are one row of tokens, none of which has a place in the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from einops import rearrange, repeat
from torch import Tensor, nn

from common.errors import UserError, check_fields
from common.token_transformer import TokenTransformer, initialise_linear, normal
from stage1_vae.posteriors.base import LatentShape


@dataclass(frozen=True, kw_only=True)
class TiTokNetworkConfig:
    """A vision transformer that sees an image as patches, beside its tokens; the latents have the shape
    (model.latents, 1, tokens). The defaults are the paper's small model; base and large are 768 wide with 12 blocks and
    heads, and 1024 wide with 24 blocks and 16 heads."""

    kind: Literal["titok"] = "titok"
    patch: int = 16  # pixels along each side of a patch
    tokens: int = 64  # n, of an image
    width: int = 512  # of the transformer's tokens; MLPs are four times as wide inside
    blocks: int = 8  # of attention and MLP
    heads: int = 8  # of attention
    map: ClassVar[bool] = True  # latents are no vector
    skip: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rules = [(name, getattr(self, name) >= 1, "at least 1") for name in ("patch", "tokens", "blocks", "heads")]
        divides = self.heads >= 1 and self.width >= 1 and self.width % self.heads == 0
        check_fields(self, [*rules, ("width", divides, f"a multiple of heads={self.heads}")])

    def transformer(self, grid: tuple[int, int]) -> TokenTransformer:
        return TokenTransformer(
            patches=grid[0] * grid[1], tokens=self.tokens, width=self.width, blocks=self.blocks, heads=self.heads
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image. Raises UserError where a patch is left over."""
        if height % self.patch or width % self.patch:
            raise UserError(
                f"images of {height}x{width} pixels are no whole patches of patch={self.patch}: choose another "
                "data.image_size, or a patch that divides both sides"
            )
        return height // self.patch, width // self.patch


class TiTokEncoder(nn.Module):
    """Images `b c H W` in [-1, 1] -> `b features 1 n`: what becomes of n learned tokens that attend to the patches."""

    def __init__(self, config: TiTokNetworkConfig, image_shape: tuple[int, int, int], features: int) -> None:
        super().__init__()
        channels, *size = image_shape
        self.patches = nn.Conv2d(channels, config.width, config.patch, stride=config.patch)
        self.tokens = normal(config.tokens, config.width)
        self.transformer = config.transformer(config.grid(*size))
        self.output = nn.Linear(config.width, features)
        self.apply(initialise_linear)

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(self.patches(images), "b d h w -> b (h w) d")
        _, tokens = self.transformer(patches, repeat(self.tokens, "n d -> b n d", b=len(images)))
        return rearrange(self.output(tokens), "b n d -> b d 1 n")


class TiTokDecoder(nn.Module):
    """Latents `n c 1 t` of t tokens -> `n o H W`: what becomes of a mask token at each patch."""

    def __init__(self, config: TiTokNetworkConfig, shape: LatentShape, output_shape: tuple[int, int, int]) -> None:
        """Raises UserError for latents that are not a row of as many tokens."""
        super().__init__()
        if len(shape) != 3 or shape[1:] != (1, config.tokens):
            raise UserError(
                f"decoder.kind=titok with decoder.tokens={config.tokens} reads a row of as many latents, and the "
                f"encoder's have the shape {shape}: give encoder.kind=titok with encoder.tokens={config.tokens}"
            )
        outputs, *size = output_shape
        self.grid, self.patch = config.grid(*size), config.patch
        self.input = nn.Linear(shape[0], config.width)
        self.mask_token = normal(1, config.width)
        self.transformer = config.transformer(self.grid)
        self.head = nn.Linear(config.width, outputs * config.patch**2)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.apply(initialise_linear)

    def forward(self, latents: Tensor) -> Tensor:
        h, w = self.grid
        tokens = self.input(rearrange(latents, "n c 1 t -> n t c"))
        masks = repeat(self.mask_token, "1 d -> n m d", n=len(tokens), m=h * w)
        patches, _ = self.transformer(masks.to(tokens.dtype), tokens)
        x = rearrange(self.head(patches), "n (h w) (p q o) -> n o (h p) (w q)", h=h, w=w, p=self.patch, q=self.patch)
        return self.conv_out(x)
