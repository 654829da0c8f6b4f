"""A diffusion decoder on the codes of any VQ autoencoder, without a discriminator: flow matching in pixels, then one
step distilled from many (Vallaeys et al. 2025, "SSDD: Single-Step Diffusion Decoder for Efficient Image Tokenization",
arXiv:2510.04961).

An image x and noise e lie at the ends of a line, x_t = (1 - t) x + t e, along which the network learns the velocity
x - e, given the code vectors (Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003). To decode is to
walk from noise to an image in `steps` steps of Euler's method. What teaches one step what many do is
stage1_vq/losses/distillation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes, CodeSpec
from common.compatibility import never_compiled
from common.draws import normal_like, spread
from common.errors import UserError
from common.model_io import PretrainedModel, in_type_of
from common.renaming import name_as_own
from stage1_vq.autoencoders.base import Autoencoder, QuantizedAutoencoder, Stage1Output
from stage1_vq.autoencoders.dvae import DVAE, DVAEConfig
from stage1_vq.autoencoders.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from stage1_vq.autoencoders.open_magvit2 import OpenMAGVIT2, OpenMAGVIT2Config
from stage1_vq.autoencoders.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from stage1_vq.autoencoders.vqgan import VQGAN, VQGANConfig
from stage1_vq.autoencoders.vqvae import VQVAE, VQVAEConfig
from stage1_vq.flow_matching import noise_by_codes, normal_of
from stage1_vq.networks.flow_unet import FlowUNet
from stage1_vq.quantizers import Quantizer, QuantizerConfig, quantizer_config

TokenizerConfig = VQVAEConfig | VQGANConfig | DVAEConfig | ViTVQGANConfig | MaskGITVQGANConfig | OpenMAGVIT2Config
TOKENIZERS: dict[str, type[QuantizedAutoencoder]] = {
    "vqvae": VQVAE,
    "vqgan": VQGAN,
    "dvae": DVAE,
    "vit_vqgan": ViTVQGAN,
    "maskgit_vqgan": MaskGITVQGAN,
    "open_magvit2": OpenMAGVIT2,
}
"""Kinds of one code vector at each place, which are all that the decoder sees."""


@dataclass(frozen=True, kw_only=True)
class FlowDecoderConfig:
    """The defaults are of the size of the paper's smallest decoder, S, of 13.4 million weights."""

    kind: Literal["flow_decoder"] = "flow_decoder"
    width: int = 48  # channels at the resolution of the images
    multipliers: tuple[int, ...] = (1, 2, 3, 3)  # of the width, by level; each after the first halves the sides
    residual_blocks: int = 2  # at each level; one more on the way up
    transformer_blocks: int = 8  # at the coarsest level
    heads: int = 4  # of their attention
    window: int = 8  # places, up, down and to the sides, that attention sees
    norm_groups: int = 16  # of the group norms
    steps: int = 8  # in which an image is decoded; 1 after distillation
    noise_seed: int = 0  # of the noise that images are decoded from: another one, other details
    tokenizer: TokenizerConfig = field(default_factory=VQGANConfig)  # whose codes they are; its own decoder is not here

    def __post_init__(self) -> None:
        for name in ("width", "residual_blocks", "transformer_blocks", "heads", "norm_groups", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}, expected at least 1")
        if self.window < 0 or not 0 <= self.noise_seed < 2**63:
            name = "window" if self.window < 0 else "noise_seed"
            raise UserError(f"model.{name}={getattr(self, name)}, expected 0 or more")
        if self.width % 2:
            raise UserError(f"model.width={self.width}, expected an even number: half of it are sines, half cosines")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"model.multipliers={self.multipliers}, expected one or more numbers from 1 up")
        if self.width % self.norm_groups:
            raise UserError(
                f"model.norm_groups={self.norm_groups} does not divide model.width={self.width}: give a number that "
                "does"
            )
        if self.width * self.multipliers[-1] % self.heads:
            raise UserError(
                f"model.heads={self.heads} does not divide the {self.width * self.multipliers[-1]} channels of the "
                "coarsest level (model.width times the last multiplier): give a number that does"
            )
        if self.stride % 2 ** (len(self.multipliers) - 1):
            raise UserError(
                f"model.multipliers={self.multipliers} halve the sides {len(self.multipliers) - 1} times, and a code "
                f"of model.tokenizer stands for {self.stride} pixels: give at most {levels_over(self.stride)} numbers, "
                "so that no level is coarser than the codes"
            )

    @property
    def channels(self) -> int:
        return self.tokenizer.channels

    @property
    def stride(self) -> int:
        return self.tokenizer.stride

    @property
    def quantizer(self) -> QuantizerConfig:
        return self.tokenizer.quantizer


def levels_over(stride: int) -> int:
    """Levels of a network of which none is coarser than codes of this stride."""
    return (stride & -stride).bit_length()


class FlowDecoder(QuantizedAutoencoder):
    """images -> encoder and quantizer of `tokenizer` -> z_q; noise, z_q -> `steps` steps of the network -> images.

    Noise is a function of the codes and of `noise_seed`, at each place of the codes there (`noise_of`): the same codes
    always become the same image, in whichever batch, and a code that is changed changes noise in its own tile alone.
    Under DistributedDataParallel, compilation and shares of weights all goes through `forward`.

    With `--from` the tokenizer is a trained one, and `frozen: [tokenizer]` leaves its codes as they are; without either
    encoder and decoder learn together.
    """

    kind = "flow_decoder"
    config_class = FlowDecoderConfig
    config: FlowDecoderConfig
    decoder: FlowUNet

    def __init__(self, config: FlowDecoderConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.tokenizer = TOKENIZERS[config.tokenizer.kind](config.tokenizer, image_size)
        del self.tokenizer.decoder
        name_as_own(self, "tokenizer")  # what they are in the tokenizer's own models, from which they come
        self.decoder = FlowUNet(
            channels=config.channels,
            latent_channels=self.quantizer.dim_out,
            width=config.width,
            multipliers=config.multipliers,
            residual_blocks=config.residual_blocks,
            transformer_blocks=config.transformer_blocks,
            heads=config.heads,
            window=config.window,
            norm_groups=config.norm_groups,
        )

    @property
    def quantizer(self) -> Quantizer:  # type: ignore[override]
        return self.tokenizer.quantizer

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config = dict(arguments["config"])
        tokenizer = dict(config.pop("tokenizer"))
        quantizer = quantizer_config(tokenizer.pop("quantizer"))
        values: dict[str, Any]
        values, of_tokenizer = (
            {name: tuple(value) if isinstance(value, list) else value for name, value in each.items()}
            for each in (config, tokenizer)
        )
        inner = TOKENIZERS[tokenizer["kind"]].config_class(**of_tokenizer, quantizer=quantizer)
        height, width = arguments["image_size"]
        model = cls(FlowDecoderConfig(**values, tokenizer=inner), (height, width))
        model.codes_maker = arguments.get("codes_maker")
        return model

    def sources(self) -> dict[str, type[Autoencoder]]:
        return {**super().sources(), self.config.tokenizer.kind: type(self.tokenizer)}

    def fitted(self, name: str, weight: Tensor, fresh: Tensor, other: PretrainedModel) -> Tensor | None:
        if name.startswith("decoder.") and other.kind != self.kind:
            return None  # of another network, whose names may happen to be the same
        return super().fitted(name, weight, fresh, other)  # type: ignore[arg-type]

    # ---- codes: the tokenizer's -------------------------------------------------------------------------------------

    def code_spec(self, height: int | None = None, width: int | None = None) -> CodeSpec:
        return self.tokenizer.code_spec(height, width)

    def latents(self, images: Tensor) -> Tensor:
        return self.tokenizer.latents(images)

    def initialise(self, batches: Sequence[Tensor]) -> None:
        if not self.started:
            self.tokenizer.initialise(batches)

    # ---- images -----------------------------------------------------------------------------------------------------

    def aligned_width(self) -> int:
        return self.decoder.middle_width

    def last_layer(self) -> Any:
        return self.decoder.conv_out.weight

    def decoded(self, codes: Codes) -> Tensor:
        return self.decoded_latents(self.quantizer.codes_to_latents(codes), codes)

    def decoded_latents(self, z_q: Tensor, codes: Codes) -> Tensor:
        return self.walk(self.noise_of(codes, z_q), z_q, self.config.steps)

    def decode_in_steps(self, steps: int) -> None:
        self.decode_otherwise(steps=steps)

    def noise_of(self, codes: Codes, z_q: Tensor) -> Tensor:
        """Standard normal numbers, b c H W float32, that images of these codes are decoded from."""
        height, width = (side * self.stride for side in z_q.shape[2:])
        return noise_by_codes(codes, (self.channels, height, width), self.config.noise_seed)

    def velocity(self, x: Tensor, t: Tensor, z_q: Tensor) -> Tensor:
        """x: b c H W float32; t: b; returns float32."""
        return self.decoder(in_type_of(self.decoder, x), t, in_type_of(self.decoder, z_q)).float()

    def walk(self, noise: Tensor, z_q: Tensor, steps: int, first: Tensor | None = None) -> Tensor:
        """From noise, b c H W float32, to images, not clamped. first: the velocity there, where it is known."""
        x, velocity = noise, first
        for now, then in pairwise(times_of(steps)):
            if velocity is None:
                velocity = self.velocity(x, torch.full((len(x),), now, device=x.device), z_q)
            x, velocity = x + (now - then) * velocity, None
        return x

    def forward(self, images: Tensor, noise: Tensor | None = None, target: Tensor | None = None) -> Stage1Output:
        """In training `reconstruction` is the image that the velocity at a time drawn by chance leads to, otherwise
        what the codes decode to. `flow_loss` is the squared error of the velocity; outside of training that of the
        first step. noise, target: b c H W, float32, where one step is to lead from this noise to that image; the
        squared error of what it leads to is the `distillation_loss`."""
        z_q, codes, losses, statistics = self.quantizer(self.latents(images))
        z_q = self.laid_out(z_q, images)
        if not self.training:
            noise = self.noise_of(codes, z_q)
            first = self.velocity(noise, torch.ones(len(images), device=images.device), z_q)
            error = F.mse_loss(first, images.float() - noise)
            reconstruction = self.walk(noise, z_q, self.config.steps, first)
            return Stage1Output(reconstruction, codes, {"flow_loss": error, **losses}, statistics)
        if noise is not None and target is not None:
            name, x, t = "distillation_loss", target, torch.ones(len(images), device=images.device)
        else:
            name, x, noise = "flow_loss", images.float(), normal_like(images.float())
            # The logit of the time is normal: most of it is spent in the middle (Esser et al. 2024, arXiv:2403.03206).
            t = normal_of(spread(len(images), images.device).clamp(1e-6, 1 - 1e-6)).sigmoid()
        x_t = torch.lerp(x, noise, t[:, None, None, None])
        features = self.decoder.trunk(in_type_of(self.decoder, x_t), t, in_type_of(self.decoder, z_q))
        reconstruction, error = self.arrive(features.last, x_t, t, x - noise)
        return Stage1Output(reconstruction, codes, {name: error, **losses}, statistics, features.middle)

    @never_compiled  # as `finish`
    def arrive(self, features: Tensor, x_t: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """The image that all of the velocity leads to, and the mean squared error of the velocity."""
        found = self.decoder.last(features).float()
        return x_t + t[:, None, None, None] * found, F.mse_loss(found, velocity)


def times_of(steps: int) -> list[float]:
    """From 1, noise, to 0, the image: squares, so that steps are short where the image is nearly there."""
    return [(1 - step / steps) ** 2 for step in range(steps + 1)]
