"""TA-TiTok of Kim et al. 2025, "Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware
One-Dimensional Tokens" (arXiv:2501.07730): a TiTok whose decoder also reads what a text encoder says of a caption, so
that the tokens may leave to it what words can tell. The encoder sees the image alone.

Trained here it has images without captions, to which its text tokens are constants; its published weights have learned
from captions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from codes.spec import Codes
from common.errors import UserError
from common.model_io import in_type_of
from common.token_transformer import TokenTransformer, initialise_linear, normal
from stage1_vq.autoencoders.base import CaptionSpec
from stage1_vq.autoencoders.token_row import Encoder, TokenRow, check_sizes
from stage1_vq.losses.pixel_errors import check_error_weights, pixel_errors
from stage1_vq.quantizers import NearestQuantizerConfig, QuantizerConfig


def published_quantizer() -> NearestQuantizerConfig:
    return NearestQuantizerConfig(
        codebook_size=8192, dim=64, codebook_update="gradient", kmeans_iterations=0, revive_after=0, refresh=True
    )


@dataclass(frozen=True, kw_only=True)
class TATiTokConfig:
    """The defaults are the published BL-32: a base encoder and a large decoder (see TiTokConfig)."""

    kind: Literal["tatitok"] = "tatitok"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    patch: int = 16  # pixels along each side of a patch: the networks see the image as patches
    tokens: int = 32  # n, of an image: one row of as many codes
    encoder_width: int = 768  # of its tokens; MLPs are four times as wide inside
    encoder_blocks: int = 12  # of attention and MLP
    encoder_heads: int = 12  # of attention
    decoder_width: int = 1024
    decoder_blocks: int = 24
    decoder_heads: int = 16
    text_length: int = 77  # t, vectors of a caption
    text_width: int = 768  # of each
    text_encoder: str = "openai/clip-vit-large-patch14-336"  # CLIP whose vectors they are: a hub id, or a folder
    l1_weight: float = 0.0  # of the absolute error of pixels in [-1, 1]
    l2_weight: float = 1.0  # of the squared error
    quantizer: QuantizerConfig = field(default_factory=published_quantizer)

    def __post_init__(self) -> None:
        check_sizes(self, "patch", "text_length", "text_width")
        check_error_weights(self, "l2_weight=1 is common")

    @property
    def stride(self) -> int:
        return self.patch


class Decoder(nn.Module):
    """z_q, b d 1 n, and vectors of a caption, b t text_width -> b c H W: what becomes of a mask token at each patch."""

    no_text: Tensor  # t text_width: the vectors of the empty caption, read where none is given; random in a fresh model

    def __init__(self, config: TATiTokConfig, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        width = config.decoder_width
        self.grid, self.patch = grid, config.patch
        self.input = nn.Linear(dim, width)
        self.text = nn.Linear(config.text_width, width)
        self.mask_token = normal(1, width)
        self.transformer = TokenTransformer(
            patches=grid[0] * grid[1],
            tokens=config.tokens + config.text_length,
            width=width,
            blocks=config.decoder_blocks,
            heads=config.decoder_heads,
        )
        self.head = nn.Linear(width, config.channels * config.patch**2)
        self.conv_out = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.apply(initialise_linear)
        self.register_buffer("no_text", torch.randn(config.text_length, config.text_width))

    def forward(self, z_q: Tensor, text: Tensor | None = None) -> Tensor:
        return self.last(self.trunk(z_q, text))

    def trunk(self, z_q: Tensor, text: Tensor | None = None) -> Tensor:
        """The image, b c H W, before the last convolution. text: None for the empty caption."""
        b, (h, w) = len(z_q), self.grid
        text = self.no_text.expand(b, -1, -1) if text is None else text
        tokens = self.input(rearrange(z_q, "b d 1 n -> b n d"))
        tokens = torch.cat([tokens, self.text(text.to(z_q.dtype))], 1)
        masks = repeat(self.mask_token, "1 d -> b m d", b=b, m=h * w)
        patches, _ = self.transformer(masks.to(tokens.dtype), tokens)
        return rearrange(self.head(patches), "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=self.patch, q=self.patch)

    def last(self, features: Tensor) -> Tensor:
        return self.conv_out(features)


class TATiTok(TokenRow):
    """images -> patches, with learned tokens -> blocks -> tokens -> z -> quantizer
    z_q, a caption's vectors -> tokens, with a mask token at each patch -> blocks -> patches -> convolution -> images
    """

    kind = "tatitok"
    config_class = TATiTokConfig
    config: TATiTokConfig
    whole_row_because = (
        "name a titok or flextok model that was trained with model.nested for one whose first tokens decode"
    )
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: TATiTokConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.encoder = Encoder(config, self.grid, self.quantizer.dim)
        self.decoder = Decoder(config, self.grid, self.quantizer.dim_out)

    def traits(self) -> list[str]:
        return [*super().traits(), f"reads captions by {self.config.text_encoder}"]

    def captions(self) -> CaptionSpec:
        return CaptionSpec(self.config.text_length, self.config.text_width, self.config.text_encoder)

    def decode_with_text(self, codes: Codes, text: Tensor) -> Tensor:
        self.check_codes(codes, self.stride)
        expected = (len(codes[0]), self.config.text_length, self.config.text_width)
        if text.shape != expected or not text.is_floating_point():
            raise UserError(
                f"got vectors of captions of shape {tuple(text.shape)} and type {text.dtype}, expected floats "
                f"{expected}: (images, vectors of each caption, their width)"
            )
        z_q = in_type_of(self.decoder, self.quantizer.codes_to_latents(codes))
        return self.images_of(self.decoder(z_q, text).float()).clamp(-1, 1)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        return pixel_errors(self.config, decoded, images)

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.get_parameter("weight")
