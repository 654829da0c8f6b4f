"""FlexTok of Bachmann et al. 2025, "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length"
(arXiv:2502.13967): an image as a row of tokens of which any number of the first ones decodes, by a decoder that draws
what they leave open, so that few tokens too make a sharp image.

Encoder and decoder see patches and registers together. The encoder's registers see those before them alone, nested
dropout (Rippel et al. 2014, arXiv:1402.0915) takes the last ones away from the decoder, and that is one of flow
matching: x_t = (1 - t) x + t e on the line from an image to noise, of which it tells the velocity x - e (Lipman et al.
2022, arXiv:2210.02747). The authors' model is of the latents of a VAE; this one is of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from codes.spec import Codes
from common.compatibility import never_compiled
from common.draws import normal_like, uniform
from common.errors import UserError, check_fields
from common.model_io import in_type_of
from common.token_transformer import initialise_linear, normal
from stage1_vq.autoencoders.base import Stage1Output
from stage1_vq.autoencoders.token_row import TokenRow, check_sizes, completed
from stage1_vq.flow_matching import Form, Guidance, Times, drawn_times, noise_by_codes, towards_noise
from stage1_vq.networks.flow_unet import sines
from stage1_vq.networks.register_transformer import SMALL, Block, TimedBlock, causal_last, normalised, places_of
from stage1_vq.quantizers import FSQConfig, QuantizerConfig

Nested = Literal["powers-of-two", "uniform", "uniform-powers-of-two"]


def published_quantizer() -> FSQConfig:
    """64,000 codes."""
    return FSQConfig(levels=(8, 8, 8, 5, 5, 5), dim=6)


@dataclass(frozen=True, kw_only=True)
class FlexTokConfig:
    """The defaults are of the size of the paper's d12-d12. A network dN has N blocks, N heads and width 64 N: the paper
    has d18 for both, and d18 with d28, too."""

    kind: Literal["flextok"] = "flextok"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    patch: int = 8  # pixels along each side of a patch: the networks see the image as patches
    tokens: int = 256  # n, registers and codes of an image: one row
    encoder_width: int = 768  # of its tokens
    encoder_blocks: int = 12  # of attention and MLP
    encoder_heads: int = 12  # of attention
    decoder_width: int = 768
    decoder_blocks: int = 12
    decoder_heads: int = 12
    nested: Nested | None = "powers-of-two"  # training decodes the first m tokens, m drawn of each image so; null: all
    unconditional: float = 0.1  # share of images that training decodes of no token at all, for guidance
    times: Times = "stratified"  # how training draws the times between image and noise
    time_shift: float = 1.0  # of these times, and of steps, towards noise: above 1 more of them are there
    steps: int = 25  # in which an image is decoded
    guidance: float = 1.0  # by the tokens, when decoding; 1: none, and half the time
    guidance_form: Form = "normalised"  # or plain
    guidance_length: float = 2.5  # of the normalised one: no difference is longer, over all pixels of an image
    noise_seed: int = 0  # of the noise that images are decoded from: another one, other details
    quantizer: QuantizerConfig = field(default_factory=published_quantizer)

    def __post_init__(self) -> None:
        check_sizes(self, "patch", "steps")
        for half in ("encoder", "decoder"):
            if (width := getattr(self, f"{half}_width")) % 4:
                raise UserError(f"model.{half}_width={width}, expected a multiple of 4: sines and cosines of two axes")
        if self.decoder_width < (numbers := self.patch**2 * self.channels):
            raise UserError(
                f"model.decoder_width={self.decoder_width}, expected at least {numbers}, the numbers of a patch of "
                f"model.patch={self.patch}: a velocity has the noise of each, and a narrower network cannot tell it; "
                "give smaller patches or a wider decoder"
            )
        names = ("powers-of-two", "uniform", "uniform-powers-of-two")
        rules = [
            ("nested", self.nested in (None, *names), f"{', '.join(names)}, or null for none"),
            ("nested", not self.nested or self.tokens > 1, f"null with model.tokens={self.tokens}, or more tokens"),
            ("unconditional", 0 <= self.unconditional < 1, "a share from 0 to below 1; 0.1 is common"),
            ("times", self.times in ("stratified", "logit-normal", "mode"), "stratified, logit-normal or mode"),
            ("time_shift", self.time_shift > 0, "above 0; 1 for none"),
            ("guidance", self.guidance >= 1, "1 (none) or more"),
            (
                "guidance",
                self.guidance == 1 or self.unconditional > 0,
                "1 where model.unconditional=0: the decoder must know images of no token to be led away from them",
            ),
            ("guidance_form", self.guidance_form in ("normalised", "plain"), "normalised or plain"),
            ("guidance_length", self.guidance_length > 0, "above 0"),
            ("noise_seed", 0 <= self.noise_seed < 2**63, "0 or more"),
        ]
        check_fields(self, rules)

    @property
    def stride(self) -> int:
        return self.patch

    @property
    def drops(self) -> bool:
        """Whether the decoder ever misses a token."""
        return self.nested is not None or self.unconditional > 0


def kept_tokens(nested: Nested, uniforms: Tensor, tokens: int) -> Tensor:
    """How many of its first tokens each image keeps, int64 from 1 to `tokens`: of uniform numbers in [0, 1), any shape.

    uniform: each number as likely. powers-of-two: 1, 2, 4 and so on, and all, each as likely. uniform-powers-of-two:
    the first power of two that is no less than a uniform one, so that many images keep all.
    """
    if nested == "uniform":
        return (uniforms * tokens).long() + 1
    exponents = (tokens - 1).bit_length()  # of the first power that is no less than all
    powers = torch.tensor([min(2**exponent, tokens) for exponent in range(exponents + 1)], device=uniforms.device)
    if nested == "powers-of-two":
        return powers[(uniforms * len(powers)).long()]
    return powers[torch.searchsorted(powers, (uniforms * tokens).long() + 1)]


def in_patches(images: Tensor, patch: int) -> Tensor:
    """b c H W -> b (h w) (p q c)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


class Encoder(nn.Module):
    """Images, b c H W -> z, b d 1 n: what becomes of n learned registers that see all patches and those before them."""

    places: Tensor  # (h w) width
    sees: Tensor  # (h w + n) (h w + n), bool

    def __init__(self, config: FlexTokConfig, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        width = config.encoder_width
        self.patch = config.patch
        self.patches = nn.Linear(config.patch**2 * config.channels, width)
        self.registers = normal(config.tokens, width)
        self.blocks = nn.ModuleList(Block(width, config.encoder_heads) for _ in range(config.encoder_blocks))
        self.output = nn.Linear(width, dim)
        self.apply(initialise_linear)
        self.register_buffer("places", places_of(*grid, width), persistent=False)
        self.register_buffer("sees", causal_last(grid[0] * grid[1], config.tokens), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.output(normalised(self.features(images))), "b n d -> b d 1 n")

    def features(self, images: Tensor) -> Tensor:
        """Of each register, b n width."""
        patches = self.embedded(images)
        registers = repeat(self.registers, "n d -> b n d", b=len(images)).to(patches.dtype)
        x = torch.cat([patches, registers], 1)
        for block in self.blocks:
            x = block(x, self.sees)
        return x[:, patches.shape[1] :]

    def embedded(self, images: Tensor) -> Tensor:
        """Patches with their places, b (h w) width."""
        patches = self.patches(in_patches(images, self.patch))
        return patches + self.places.to(patches.dtype)


class Features(NamedTuple):
    """Of all of the decoder but its last layer."""

    last: Tensor  # b (h w) width
    middle: Tensor  # b width h w, of the patches half-way


class Decoder(nn.Module):
    """A noisy image, b c H W, its time, b, and z_q, b d 1 m, of the first m tokens -> velocity, b c H W.

    In the place of tokens that are not there stands a learned vector.
    """

    places: Tensor  # (h w) width

    def __init__(self, config: FlexTokConfig, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        width, numbers = config.decoder_width, config.patch**2 * config.channels
        self.grid, self.patch = grid, config.patch
        self.input = nn.Linear(dim, width)
        self.absent = normal(1, width) if config.drops else None
        self.token_places = normal(config.tokens, width)
        self.patches = nn.Linear(numbers, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(TimedBlock(width, config.decoder_heads) for _ in range(config.decoder_blocks))
        self.modulation = nn.Linear(width, 2 * width)  # of the last norm
        self.head = nn.Linear(width, numbers)
        self.apply(initialise_linear)
        for name, module in self.named_modules():
            if name.endswith(("modulation", "head")):
                with torch.no_grad():  # not 0, as DiT has them: other weights would have no gradient in the first step
                    module.get_parameter("weight").mul_(SMALL)
        self.register_buffer("places", places_of(*grid, width), persistent=False)

    def forward(self, x: Tensor, t: Tensor, z_q: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.last(self.trunk(x, t, z_q, kept).last)

    def trunk(self, x: Tensor, t: Tensor, z_q: Tensor, kept: Tensor | None = None) -> Features:
        """kept: b, how many of its first tokens are taken of each image, None for all that there are."""
        registers = self.tokens(z_q, kept)
        registers = registers + self.token_places.to(registers.dtype)
        patches = self.patches(in_patches(x, self.patch))
        patches = patches + self.places.to(patches.dtype)
        count, n = patches.shape[1], registers.shape[1]
        time = self.time(sines(t, self.places.shape[1]).to(patches.dtype))
        x = torch.cat([patches, registers], 1)
        middle = x
        for number, block in enumerate(self.blocks):
            x = block(x, time, n)
            if 2 * number < len(self.blocks):
                middle = x
        scale, shift = self.modulation(F.silu(time)).unsqueeze(1).chunk(2, -1)
        last = normalised(x[:, :count]) * (1 + scale) + shift
        return Features(last, rearrange(middle[:, :count], "b (h w) d -> b d h w", h=self.grid[0]))

    def tokens(self, z_q: Tensor, kept: Tensor | None) -> Tensor:
        """All tokens of an image, b n width, of its first ones."""
        tokens = self.input(rearrange(z_q, "b d 1 m -> b m d"))
        return tokens if self.absent is None else completed(tokens, self.absent, len(self.token_places), kept)

    def last(self, features: Tensor) -> Tensor:
        h, w = self.grid
        pattern = "b (h w) (p q c) -> b c (h p) (w q)"
        return rearrange(self.head(features), pattern, h=h, w=w, p=self.patch, q=self.patch)


class FlexTok(TokenRow):
    """images -> patches, with registers -> blocks -> registers -> z -> quantizer -> z_q
    noise, with z_q of the first tokens -> `steps` steps of the decoder -> images

    Noise is a function of the first code and of `noise_seed`: the same codes always become the same image, in whichever
    batch, and images of more and of fewer tokens begin with the same noise.
    """

    kind = "flextok"
    config_class = FlexTokConfig
    config: FlexTokConfig
    whole_row_because = "give model.nested=powers-of-two in training for one whose first tokens decode"
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: FlexTokConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.encoder = Encoder(config, self.grid, self.quantizer.dim)
        self.decoder = Decoder(config, self.grid, self.quantizer.dim_out)

    @property
    def is_nested(self) -> bool:
        return self.config.nested is not None

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def decode_in_steps(self, steps: int) -> None:
        self.decode_otherwise(steps=steps)

    def decode_guided(self, guidance: float) -> None:
        self.decode_otherwise(guidance=guidance)

    def decoded_latents(self, z_q: Tensor, codes: Codes) -> Tensor:
        return self.walk(self.noise_of(codes), z_q)

    def noise_of(self, codes: Codes) -> Tensor:
        """Standard normal numbers, b c H W float32, that images of these codes are decoded from."""
        return noise_by_codes((codes[0][:, :, :1],), (self.channels, *self.image_size), self.config.noise_seed)

    def velocity(self, x: Tensor, t: float, z_q: Tensor, kept: Tensor | None = None) -> Tensor:
        """x: b c H W float32; returns float32."""
        times = torch.full((len(x),), t, device=x.device)
        return self.decoder(in_type_of(self.decoder, x), times, in_type_of(self.decoder, z_q), kept).float()

    def walk(self, noise: Tensor, z_q: Tensor, first: Tensor | None = None) -> Tensor:
        """From noise, b c H W float32, to images, not clamped, in steps of Euler's method that are equal but for the
        shift of times. first: the velocity there given the tokens, where it is known."""
        config, x = self.config, noise
        guidance = Guidance(config.guidance, config.guidance_form, config.guidance_length)
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        times = towards_noise(torch.linspace(1, 0, config.steps + 1, dtype=torch.float64), config.time_shift).tolist()
        for now, then in pairwise(times):
            velocity = self.velocity(x, now, z_q) if first is None or now < 1 else first
            if config.guidance != 1:
                velocity = guidance(velocity, self.velocity(x, now, z_q, none))
            x = x + (now - then) * velocity
        return x

    # ---- training ---------------------------------------------------------------------------------------------------

    def last_layer(self) -> nn.Parameter:
        return self.decoder.head.get_parameter("weight")

    def aligned_width(self) -> int:
        return self.config.decoder_width

    @property
    def aligned_has_places(self) -> bool:
        return True  # patches, which no code stands for

    def kept(self, images: Tensor) -> Tensor | None:
        """How many of its first tokens a training step leaves to each image; None for all."""
        nested, count, device = self.config.nested, self.config.tokens, images.device
        if not self.config.drops:
            return None
        if nested is None:
            kept = torch.full((len(images),), count, device=device)
        else:
            kept = kept_tokens(nested, uniform(len(images), device=device), count)
        without = uniform(len(images), device=device) < self.config.unconditional
        return torch.where(without, 0, kept)

    def forward(self, images: Tensor) -> Stage1Output:
        """In training `reconstruction` is the image that the velocity at a time drawn by chance leads to, given some of
        the tokens; otherwise what all codes decode to. `flow_loss` is the squared error of the velocity; outside of
        training that of the first step, given all tokens."""
        z_q, codes, losses, statistics = self.quantizer(self.latents(images))
        x = images.float()
        if not self.training:
            noise = self.noise_of(codes)
            first = self.velocity(noise, 1.0, z_q)
            error = F.mse_loss(first, x - noise)
            return Stage1Output(self.walk(noise, z_q, first), codes, {"flow_loss": error, **losses}, statistics)
        noise, t = normal_like(x), drawn_times(self.config.times, len(x), x.device)
        t = towards_noise(t, self.config.time_shift)
        x_t = torch.lerp(x, noise, t[:, None, None, None])
        given = in_type_of(self.decoder, x_t), t, in_type_of(self.decoder, z_q)
        features = self.decoder.trunk(*given, self.kept(images))
        reconstruction, error = self.arrive(features.last, x_t, t, x - noise)
        return Stage1Output(reconstruction, codes, {"flow_loss": error, **losses}, statistics, features.middle)

    @never_compiled  # as `finish`
    def arrive(self, features: Tensor, x_t: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """The image that all of the velocity leads to, and the mean squared error of the velocity."""
        found = self.decoder.last(features).float()
        return x_t + t[:, None, None, None] * found, F.mse_loss(found, velocity)
