"""TiTok in two stages (Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation",
arXiv:2406.07550, section 3.3): a row of tokens tells which codes of MaskGIT's VQ-GAN the image has, and the decoder of
that makes the pixels.

The networks are those of the published weights. Here they are trained as one; the paper's first stage, whose targets
are the codes of a trained VQ-GAN, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from common.errors import UserError
from common.token_transformer import TokenTransformer, initialise_linear, normal
from stage1_vq.autoencoders.maskgit_vqgan import Decoder as PixelDecoder
from stage1_vq.autoencoders.maskgit_vqgan import MaskGITVQGANConfig
from stage1_vq.autoencoders.token_row import Encoder as TokenRowEncoder
from stage1_vq.autoencoders.token_row import TokenRow, check_sizes, default_quantizer
from stage1_vq.losses.pixel_errors import check_error_weights, pixel_errors
from stage1_vq.quantizers import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class TwoStageTiTokConfig:
    """The defaults are the published L-32; B-64 and S-128 are of the sizes base and small (see TiTokConfig)."""

    kind: Literal["titok_two_stage"] = "titok_two_stage"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    tokens: int = 32  # of an image: one row of as many codes
    encoder_width: int = 1024  # of its tokens; MLPs are four times as wide inside
    encoder_blocks: int = 24  # of attention and MLP
    encoder_heads: int = 16  # of attention
    decoder_width: int = 1024
    decoder_blocks: int = 24
    decoder_heads: int = 16
    pixel_codebook_size: int = 1024  # entries that each patch is a mixture of
    pixel_dim: int = 256  # of an entry
    pixel_width: int = 128  # of MaskGIT's decoder: channels at the resolution of the images
    pixel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of that width, at each level; patches are of its stride
    pixel_residual_blocks: int = 2  # at each level
    norm_groups: int = 32  # of its group norms
    l1_weight: float = 0.0  # of the absolute error of pixels in [-1, 1]
    l2_weight: float = 1.0  # of the squared error
    quantizer: QuantizerConfig = field(default_factory=default_quantizer)

    def __post_init__(self) -> None:
        pixel = ("pixel_codebook_size", "pixel_dim", "pixel_width", "pixel_residual_blocks", "norm_groups")
        check_sizes(self, *pixel)
        if not self.pixel_multipliers or min(self.pixel_multipliers) < 1:
            raise UserError(f"model.pixel_multipliers={self.pixel_multipliers}, expected one or more numbers from 1 up")
        if self.pixel_width % self.norm_groups:
            raise UserError(
                f"model.norm_groups={self.norm_groups} does not divide model.pixel_width={self.pixel_width}: give a "
                "number that does"
            )
        check_error_weights(self, "l2_weight=1 is common")

    @property
    def stride(self) -> int:
        return 2 ** (len(self.pixel_multipliers) - 1)

    def pixel_decoder(self) -> MaskGITVQGANConfig:
        return MaskGITVQGANConfig(
            channels=self.channels,
            width=self.pixel_width,
            multipliers=self.pixel_multipliers,
            residual_blocks=self.pixel_residual_blocks,
            norm_groups=self.norm_groups,
        )


class Encoder(TokenRowEncoder):
    """Images, b c H W -> z, b d 1 n: what becomes of n learned tokens that attend to the patches."""

    def features(self, images: Tensor) -> Tensor:
        # The published weights were trained so: the numbers of all tokens in a row, cut anew as if they lay by their
        # features first. Each z so is of numbers of several tokens; with a transpose the weights would be of no use.
        tokens = super().features(images)
        b, n, width = tokens.shape
        return tokens.reshape(b, width, n).mT


class Decoder(nn.Module):
    """z_q, b d 1 n -> logits over the entries of a codebook for each patch -> the mixture of the entries by their
    probabilities, b pixel_dim h w -> MaskGIT's decoder -> images, b c H W."""

    def __init__(self, config: TwoStageTiTokConfig, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        width = config.decoder_width
        self.grid = grid
        self.input = nn.Linear(dim, width)
        self.mask_token = normal(1, width)
        self.transformer = TokenTransformer(
            patches=grid[0] * grid[1],
            tokens=config.tokens,
            width=width,
            blocks=config.decoder_blocks,
            heads=config.decoder_heads,
        )
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, config.pixel_codebook_size)
        )
        self.apply(initialise_linear)
        self.codebook = nn.Parameter(torch.randn(config.pixel_codebook_size, config.pixel_dim))
        self.pixels = PixelDecoder(config.pixel_decoder(), config.pixel_dim)

    def forward(self, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(z_q))

    def logits(self, z_q: Tensor) -> Tensor:
        """Over the entries of the codebook: b k h w, float32."""
        tokens = self.input(rearrange(z_q, "b d 1 n -> b n d"))
        h, w = self.grid
        masks = repeat(self.mask_token, "1 d -> b m d", b=len(tokens), m=h * w)
        patches, _ = self.transformer(masks.to(tokens.dtype), tokens)
        return rearrange(self.head(patches).float(), "b (h w) k -> b k h w", h=h)

    def mixture(self, z_q: Tensor) -> Tensor:
        """b pixel_dim h w: no entry is chosen."""
        shares = rearrange(self.logits(z_q).softmax(1), "b k h w -> b h w k").to(self.codebook.dtype)
        return rearrange(shares @ self.codebook, "b h w d -> b d h w")

    def trunk(self, z_q: Tensor) -> Tensor:
        return self.pixels.trunk(self.mixture(z_q))

    def last(self, features: Tensor) -> Tensor:
        return self.pixels.last(features)


class TwoStageTiTok(TokenRow):
    """images -> patches, with learned tokens -> blocks -> z -> quantizer -> z_q -> tokens, with a mask token at each
    patch -> blocks -> a mixture of codebook entries at each patch -> MaskGIT's decoder -> images.
    """

    kind = "titok_two_stage"
    config_class = TwoStageTiTokConfig
    config: TwoStageTiTokConfig
    whole_row_because = (
        "name a titok or flextok model that was trained with model.nested for one whose first tokens decode"
    )
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: TwoStageTiTokConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.encoder = Encoder(config, self.grid, self.quantizer.dim)
        self.decoder = Decoder(config, self.grid, self.quantizer.dim_out)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        return pixel_errors(self.config, decoded, images)

    def last_layer(self) -> nn.Parameter:
        return self.decoder.pixels.conv_out.get_parameter("weight")
