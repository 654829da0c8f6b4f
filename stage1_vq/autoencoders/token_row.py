"""What autoencoders of the TiTok family have in common (Yu et al. 2024, arXiv:2406.07550): an image is one row of
tokens, none of which has a place in it, and vision transformers see tokens and patches together."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.errors import UserError
from common.token_transformer import TokenTransformer, initialise_linear, normal
from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.quantizers import NearestQuantizerConfig, build_quantizer

HALVES = ("encoder", "decoder")


def default_quantizer() -> NearestQuantizerConfig:
    """The paper's codebook: 4,096 vectors of width 12 and length one. Its k-means start and the revival of dead codes
    are not of the paper."""
    return NearestQuantizerConfig(codebook_size=4096, dim=12, l2_normalise=True, codebook_update="gradient")


class TokenRowSettings(Protocol):
    """What the config of each tells; of the decoder it has the same three sizes as of the encoder."""

    @property
    def channels(self) -> int: ...  # c of the images
    @property
    def tokens(self) -> int: ...  # n, of an image
    @property
    def stride(self) -> int: ...  # pixels along each side of a patch
    @property
    def encoder_width(self) -> int: ...
    @property
    def encoder_blocks(self) -> int: ...
    @property
    def encoder_heads(self) -> int: ...


def check_sizes(config: TokenRowSettings, *further: str) -> None:
    """Raises UserError for a size, or a `further` field, below 1, and for a width that its heads do not divide."""
    sizes = [f"{half}_{size}" for half in HALVES for size in ("width", "blocks", "heads")]
    for name in ("channels", "tokens", *sizes, *further):
        if getattr(config, name) < 1:
            raise UserError(f"model.{name}={getattr(config, name)}, expected at least 1")
    for half in HALVES:
        width, heads = getattr(config, f"{half}_width"), getattr(config, f"{half}_heads")
        if width % heads:
            raise UserError(f"model.{half}_width={width}, expected a multiple of model.{half}_heads={heads}")


class Encoder(nn.Module):
    """Images, b c H W -> z, b d 1 n: what becomes of n learned tokens that attend to the patches."""

    def __init__(self, config: TokenRowSettings, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        width = config.encoder_width
        self.patches = nn.Conv2d(config.channels, width, config.stride, stride=config.stride)
        self.tokens = normal(config.tokens, width)
        self.transformer = TokenTransformer(
            patches=grid[0] * grid[1],
            tokens=config.tokens,
            width=width,
            blocks=config.encoder_blocks,
            heads=config.encoder_heads,
        )
        self.output = nn.Linear(width, dim)
        self.apply(initialise_linear)  # the authors' 0.02 is for wide networks: narrow ones hardly mix tokens with it

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.output(self.features(images)), "b n d -> b d 1 n")

    def features(self, images: Tensor) -> Tensor:
        """Of each token, b n width."""
        patches = rearrange(self.patches(images), "b d h w -> b (h w) d")
        _, tokens = self.transformer(patches, repeat(self.tokens, "n d -> b n d", b=len(images)))
        return tokens


class TokenRow(QuantizedAutoencoder):
    """An autoencoder whose codes are a row of tokens. The positions are those of one size of image: no other has
    codes."""

    codes_have_places = False
    whole_row_because: ClassVar[str]  # why no other number of tokens decodes, and what to do instead

    def __init__(self, config: Any, image_size: tuple[int, int]) -> None:
        """Raises UserError for a quantizer that makes other grids than rows of as many codes as there are tokens."""
        super().__init__(config, image_size)
        self.grid = (image_size[0] // self.stride, image_size[1] // self.stride)  # rows and columns of patches
        self.quantizer = build_quantizer(config.quantizer)
        for made in self.quantizer.grids(1, config.tokens):
            if (made.height, made.width) != (1, config.tokens):
                raise UserError(
                    f"model.quantizer.kind={config.quantizer.kind} makes a grid of {made.height}x{made.width} codes of "
                    f"a row of {config.tokens} tokens, expected a code for each: take a quantizer without scales"
                )

    def code_spec(self, height: int | None = None, width: int | None = None) -> CodeSpec:
        size = (self.image_size[0] if height is None else height, self.image_size[1] if width is None else width)
        self.check_image_size(*size)
        return CodeSpec(self.quantizer.grids(1, self.config.tokens), *size, self.channels)

    @property
    def is_nested(self) -> bool:
        """Whether any number of the first tokens decodes."""
        return False

    def prefix_spec(self, tokens: int) -> CodeSpec:
        count = self.config.tokens
        if not self.is_nested and tokens != count:
            raise UserError(
                f"{tokens} tokens, expected {count}: this model was trained with all of them alone; "
                f"{self.whole_row_because}"
            )
        if not 1 <= tokens <= count:
            raise UserError(f"{tokens} tokens, expected 1 to {count}, which this model has")
        return CodeSpec(self.quantizer.grids(1, tokens), *self.image_size, self.channels)

    def check_image_size(self, height: int, width: int) -> None:
        """Raises UserError unless this is the size of the training images."""
        super().check_image_size(height, width)
        if (height, width) != self.image_size:
            expected = f"{self.image_size[0]}x{self.image_size[1]}"
            raise UserError(
                f"{height}x{width} images, expected {expected}: the tokens of this model are of images of that size "
                "alone; those to be encoded are scaled and cut to it by compress with --crop"
            )

    def check_codes(self, codes: Codes, stride: int) -> None:
        rows = codes[0].shape[-1] if codes and codes[0].ndim == 3 else self.config.tokens
        fits = self.is_nested and 1 <= rows <= self.config.tokens
        (self.prefix_spec(rows) if fits else self.code_spec()).check(codes)


def completed(tokens: Tensor, absent: Tensor, count: int, kept: Tensor | None = None) -> Tensor:
    """All `count` tokens of an image, of its first ones, b n d. absent: 1 d, what stands in the place of the others.
    kept: b, how many of the first are taken of each image, None for all that there are."""
    absent = absent.to(tokens.dtype)
    tokens = torch.cat([tokens, absent.expand(len(tokens), count - tokens.shape[1], -1)], 1)
    if kept is None:
        return tokens
    places = torch.arange(count, device=tokens.device)
    return torch.where(rearrange(places < kept.unsqueeze(1), "b n -> b n 1"), tokens, absent)
