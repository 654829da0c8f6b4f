"""TiTok of Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation" (arXiv:2406.07550), trained
in one stage, with a head for pixels, as by Kim et al. 2025 (TA-TiTok, arXiv:2501.07730, section 3.1).

With, by choice, nested dropout (Rippel et al. 2014, arXiv:1402.0915): in training each image is also decoded from its
first tokens alone, as by Bachmann et al. 2025 (FlexTok, arXiv:2502.13967), so that any number of the first tokens
decodes. That it is decoded from all of them as well, in the same step, is the sandwich rule of Yu & Huang 2019
(arXiv:1903.05134): otherwise the later tokens, which few steps see, hardly learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from common.draws import uniform
from common.errors import UserError
from common.token_transformer import TokenTransformer, initialise_linear, normal
from stage1_vq.autoencoders.base import Stage1Output
from stage1_vq.autoencoders.token_row import Encoder, TokenRow, check_sizes, completed, default_quantizer
from stage1_vq.losses.pixel_errors import check_error_weights, pixel_errors
from stage1_vq.quantizers import QuantizerConfig

Nested = Literal["powers-of-two", "uniform"]


@dataclass(frozen=True, kw_only=True)
class TiTokConfig:
    """Encoder and decoder each have one of the paper's sizes; the defaults are its small model of 128 tokens.

    | size  | width | blocks | heads |
    |-------|------:|-------:|------:|
    | small |   512 |      8 |     8 |
    | base  |   768 |     12 |    12 |
    | large |  1024 |     24 |    16 |
    """

    kind: Literal["titok"] = "titok"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    patch: int = 16  # pixels along each side of a patch: the networks see the image as patches
    tokens: int = 128  # of an image: one row of as many codes
    encoder_width: int = 512  # of its tokens; MLPs are four times as wide inside
    encoder_blocks: int = 8  # of attention and MLP
    encoder_heads: int = 8  # of attention
    decoder_width: int = 512
    decoder_blocks: int = 8
    decoder_heads: int = 8
    nested: Nested | None = None  # training decodes the first n tokens too, n drawn of each image so; null: all alone
    nested_share: float = 0.5  # of the reconstruction loss, which is that of the first tokens; the rest is that of all
    l1_weight: float = 0.0  # of the absolute error of pixels in [-1, 1]
    l2_weight: float = 1.0  # of the squared error
    quantizer: QuantizerConfig = field(default_factory=default_quantizer)

    def __post_init__(self) -> None:
        check_sizes(self, "patch")
        if self.nested not in (None, "powers-of-two", "uniform"):
            raise UserError(f"model.nested={self.nested}, expected powers-of-two, uniform, or null for none")
        if self.nested and self.tokens < 2:
            raise UserError(f"model.nested={self.nested} with model.tokens={self.tokens}, expected 2 or more to nest")
        if not 0 < self.nested_share < 1:
            raise UserError(
                f"model.nested_share={self.nested_share}, expected a share between 0 and 1; nested=null: none"
            )
        check_error_weights(self, "l2_weight=1 is common")

    @property
    def stride(self) -> int:
        return self.patch


def kept_tokens(nested: Nested, uniforms: Tensor, tokens: int) -> Tensor:
    """How many of its first tokens each image keeps, int64 from 1 to `tokens` - 1: of uniform numbers in [0, 1), any
    shape.

    powers-of-two: 1, 2, 4 and so on, each as likely: what a token adds falls with the number before it, so that each
    doubling is worth about as much. uniform: each number as likely, so that those of many tokens are the rule.
    """
    if nested == "uniform":
        return (uniforms * (tokens - 1)).long() + 1
    powers = torch.tensor([2**exponent for exponent in range((tokens - 1).bit_length())], device=uniforms.device)
    return powers[(uniforms * len(powers)).long()]


class Decoder(nn.Module):
    """z_q, b d 1 n, of the first n tokens -> b c H W: what becomes of a mask token at each patch.

    In the place of tokens that are not there stands a learned vector.
    """

    def __init__(self, config: TiTokConfig, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        width = config.decoder_width
        self.grid, self.patch = grid, config.patch
        self.input = nn.Linear(dim, width)
        self.mask_token = normal(1, width)
        self.absent = normal(1, width) if config.nested else None
        self.transformer = TokenTransformer(
            patches=grid[0] * grid[1],
            tokens=config.tokens,
            width=width,
            blocks=config.decoder_blocks,
            heads=config.decoder_heads,
        )
        self.head = nn.Linear(width, config.channels * config.patch**2)
        self.conv_out = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.apply(initialise_linear)

    def forward(self, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(z_q))

    def trunk(self, z_q: Tensor, kept: Tensor | None = None) -> Tensor:
        """The image, b c H W, before the last convolution. kept: b, how many of its first tokens are taken of each
        image, None for all that there are."""
        tokens = self.input(rearrange(z_q, "b d 1 n -> b n d"))
        if self.absent is not None:
            tokens = completed(tokens, self.absent, len(self.transformer.token_positions), kept)
        masks = repeat(self.mask_token, "1 d -> b m d", b=len(tokens), m=self.grid[0] * self.grid[1])
        patches, _ = self.transformer(masks.to(tokens.dtype), tokens)
        h, w = self.grid
        return rearrange(self.head(patches), "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=self.patch, q=self.patch)

    def last(self, features: Tensor) -> Tensor:
        return self.conv_out(features)


class TiTok(TokenRow):
    """Encoder and decoder are vision transformers; codes are a row of tokens, none of which has a place in the image:

    images -> patches, with learned tokens -> blocks -> tokens -> z -> quantizer
    z_q -> tokens, with a mask token at each patch -> blocks -> patches -> 3x3 convolution -> images
    """

    kind = "titok"
    config_class = TiTokConfig
    config: TiTokConfig
    whole_row_because = "give model.nested=powers-of-two in training for one whose first tokens decode"
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: TiTokConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.encoder = Encoder(config, self.grid, self.quantizer.dim)
        self.decoder = Decoder(config, self.grid, self.quantizer.dim_out)

    @property
    def is_nested(self) -> bool:
        return self.config.nested is not None

    def forward(self, images: Tensor) -> Stage1Output:
        z_q, codes, losses, statistics = self.quantizer(self.latents(images))
        z_q, nested = self.laid_out(z_q, images), self.config.nested
        reconstruction, own = self.finish(self.decoder.trunk(z_q), images)
        if self.training and nested is not None:
            kept = kept_tokens(nested, uniform(len(images), device=images.device), self.config.tokens)
            _, of_first = self.finish(self.decoder.trunk(z_q, kept), images)
            share = self.config.nested_share
            own = {name: (1 - share) * loss for name, loss in own.items()}
            own |= {f"nested_{name}": share * loss for name, loss in of_first.items()}
        return Stage1Output(reconstruction, codes, {**own, **losses}, statistics, z_q)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """`reconstruction_loss`: the weighted sum of the mean absolute and the mean squared error. In training with
        nested tokens `1 - nested_share` of it, and `nested_share` of that of the first tokens,
        `nested_reconstruction_loss`."""
        return pixel_errors(self.config, decoded, images)

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.get_parameter("weight")
