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
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.errors import UserError
from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.autoencoders.maskgit_vqgan import Decoder as PixelDecoder
from stage1_vq.autoencoders.maskgit_vqgan import MaskGITVQGANConfig
from stage1_vq.autoencoders.titok import Transformer, default_quantizer, normal
from stage1_vq.networks.vit import initialise_linear
from stage1_vq.quantizers import QuantizerConfig, build_quantizer


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
        sizes = [f"{half}_{size}" for half in ("encoder", "decoder") for size in ("width", "blocks", "heads")]
        pixel = ("pixel_codebook_size", "pixel_dim", "pixel_width", "pixel_residual_blocks", "norm_groups")
        for name in ("channels", "tokens", *sizes, *pixel):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}, expected at least 1")
        for half in ("encoder", "decoder"):
            width, heads = getattr(self, f"{half}_width"), getattr(self, f"{half}_heads")
            if width % heads:
                raise UserError(f"model.{half}_width={width}, expected a multiple of model.{half}_heads={heads}")
        if not self.pixel_multipliers or min(self.pixel_multipliers) < 1:
            raise UserError(f"model.pixel_multipliers={self.pixel_multipliers}, expected one or more numbers from 1 up")
        if self.pixel_width % self.norm_groups:
            raise UserError(
                f"model.norm_groups={self.norm_groups} does not divide model.pixel_width={self.pixel_width}: give a "
                "number that does"
            )
        for name in ("l1_weight", "l2_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}={getattr(self, name)}, expected 0 or more")
        if not self.l1_weight + self.l2_weight:
            raise UserError("model.l1_weight and model.l2_weight are both 0: give one of them, l2_weight=1 is common")

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


class Encoder(nn.Module):
    """Images, b c H W -> z, b d 1 n: what becomes of n learned tokens that attend to the patches."""

    def __init__(self, config: TwoStageTiTokConfig, patches: int, dim: int) -> None:
        super().__init__()
        width = config.encoder_width
        self.patches = nn.Conv2d(config.channels, width, config.stride, stride=config.stride)
        self.tokens = normal(config.tokens, width)
        self.transformer = Transformer(
            patches=patches,
            tokens=config.tokens,
            width=width,
            blocks=config.encoder_blocks,
            heads=config.encoder_heads,
        )
        self.output = nn.Linear(width, dim)
        self.apply(initialise_linear)

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(self.patches(images), "b d h w -> b (h w) d")
        _, tokens = self.transformer(patches, repeat(self.tokens, "n d -> b n d", b=len(images)))
        # The published weights were trained so: the numbers of all tokens in a row, cut anew as if they lay by their
        # features first. Each z so is of numbers of several tokens; with a transpose the weights would be of no use.
        b, n, width = tokens.shape
        return rearrange(self.output(tokens.reshape(b, width, n).mT), "b n d -> b d 1 n")


class Decoder(nn.Module):
    """z_q, b d 1 n -> logits over the entries of a codebook for each patch -> the mixture of the entries by their
    probabilities, b pixel_dim h w -> MaskGIT's decoder -> images, b c H W."""

    def __init__(self, config: TwoStageTiTokConfig, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        width = config.decoder_width
        self.grid = grid
        self.input = nn.Linear(dim, width)
        self.mask_token = normal(1, width)
        self.transformer = Transformer(
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


class TwoStageTiTok(QuantizedAutoencoder):
    """images -> patches, with learned tokens -> blocks -> z -> quantizer -> z_q -> tokens, with a mask token at each
    patch -> blocks -> a mixture of codebook entries at each patch -> MaskGIT's decoder -> images.

    The positions are those of one size of image: no other has codes.
    """

    kind = "titok_two_stage"
    config_class = TwoStageTiTokConfig
    config: TwoStageTiTokConfig
    codes_have_places = False
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: TwoStageTiTokConfig, image_size: tuple[int, int]) -> None:
        """Raises UserError for a quantizer that makes other grids than rows of as many codes as there are tokens."""
        super().__init__(config, image_size)
        grid = (image_size[0] // config.stride, image_size[1] // config.stride)
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = Encoder(config, grid[0] * grid[1], self.quantizer.dim)
        self.decoder = Decoder(config, grid, self.quantizer.dim_out)
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

    def prefix_spec(self, tokens: int) -> CodeSpec:
        if tokens != self.config.tokens:
            raise UserError(
                f"{tokens} tokens, expected {self.config.tokens}: this model was trained with all of them alone; name "
                "a titok model that was trained with model.nested for one whose first tokens decode"
            )
        return self.code_spec()

    def check_image_size(self, height: int, width: int) -> None:
        """Raises UserError unless this is the size of the training images."""
        super().check_image_size(height, width)
        if (height, width) != self.image_size:
            raise UserError(
                f"cannot encode {height}x{width} images: the tokens of this model are of "
                f"{self.image_size[0]}x{self.image_size[1]} images alone; scale and cut "
                "them to that, as compress does with --crop"
            )

    def check_codes(self, codes: Codes, stride: int) -> None:
        self.code_spec().check(codes)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """`reconstruction_loss`: the weighted sum of the mean absolute and the mean squared error."""
        weights = {F.l1_loss: self.config.l1_weight, F.mse_loss: self.config.l2_weight}
        terms = [weight * error(decoded, images) for error, weight in weights.items() if weight]
        return {"reconstruction_loss": sum(terms[1:], terms[0])}

    def last_layer(self) -> nn.Parameter:
        return self.decoder.pixels.conv_out.get_parameter("weight")
