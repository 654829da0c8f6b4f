"""NVAE of Vahdat and Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder" (arXiv:2007.03898).

    image -> stem -> preprocess cells -> encoder tower, whose features are kept -> the first group
    learned map -> decoder tower, which takes each group's latents in turn -> postprocess cells -> image

Groups lie at a few scales, several at each. The posterior of a group is told relative to its prior:

    p(z_l | above) = N(mu, sigma),  q(z_l | x, above) = N(mu + d mu, of log sigma + d log sigma)

where every mean is bent by 5 tanh(x / 5), every log of a scale likewise, and 0.01 is added to every scale: that of the
first group, whose prior has mean 0 and log-scale 0, is 1.01. With flows, what the posterior draws passes through them,
and the KL is log q - log p of the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, check_fields
from common.model_io import in_type_of
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.base import Choose, Group, HierarchicalVAE, Normal
from stage1_vae.hierarchies.nvae_cells import (
    Cell,
    Conv2D,
    Convolution,
    DecoderCombiner,
    EncoderCombiner,
    Flow,
    Primitive,
    Scaling,
)
from stage1_vae.likelihoods import LikelihoodConfig, LogisticMixtureConfig
from stage1_vae.likelihoods.base import at_least_float
from stage1_vae.networks.batch_norm import batch_norms
from stage1_vae.objectives.spectral import Regularised

Cells = Literal["res_mbconv", "res_bnswish", "mbconv_sep"]


@dataclass(frozen=True, kw_only=True)
class NVAEConfig:
    """Encoder and decoder of as many scales, each half the resolution and twice the channels of the one below."""

    kind: Literal["nvae"] = "nvae"
    channels: int = 3  # c of the images
    padding: int = 0  # black pixels around them in the network; of digits of 28x28 pixels 2
    latents: int = 20  # channels of each group
    scales: int = 2  # at which groups lie
    groups: int = 10  # at the largest scale
    halve_groups: bool = True  # whether each smaller scale has half as many, rounded down
    fewest_groups: int = 1  # of a scale, where they are halved
    encoder_width: int = 32  # channels at the resolution of images
    decoder_width: int = 32
    blocks: int = 2  # of cells between images and the largest scale, each halving the resolution
    preprocess_cells: int = 3  # of a block of the encoder
    postprocess_cells: int = 3  # of a block of the decoder
    encoder_cells: int = 2  # of a group
    decoder_cells: int = 2  # of a group but the first
    cells: Cells = "res_mbconv"  # as the public code names them: depthwise in the decoder; nowhere; everywhere
    squeeze_excite: bool = True
    residual_posterior: bool = True  # whether posteriors are told relative to priors
    flows: int = 0  # pairs of masked flows of each group's posterior
    likelihood: LikelihoodConfig = field(default_factory=LogisticMixtureConfig)

    def __post_init__(self) -> None:
        names = "channels latents scales groups fewest_groups blocks preprocess_cells postprocess_cells encoder_cells"
        check_fields(self, [(name, getattr(self, name) >= 1, "at least 1") for name in names.split()])
        widths = [(name, getattr(self, name) >= 2, "at least 2") for name in ("encoder_width", "decoder_width")]
        rules = [
            ("decoder_cells", self.decoder_cells >= 1, "at least 1"),
            ("padding", self.padding >= 0, "0 or more"),
            ("flows", self.flows >= 0, "0 (none) or more"),
            ("cells", self.cells in PRIMITIVES, f"one of {', '.join(PRIMITIVES)}"),
            (
                "groups",
                sum(self.groups_of_scales) >= 2,
                "at least 2 in all: of one there is nothing to be above another; model.kind=vae is for one",
            ),
        ]
        check_fields(self, [*widths, *rules])

    @property
    def groups_of_scales(self) -> list[int]:
        """The smallest scale, which comes first, first."""
        counts = [self.groups]
        for _ in range(self.scales - 1):
            counts.append(max(self.fewest_groups, counts[-1] // 2) if self.halve_groups else self.groups)
        return counts[::-1]


class Primitives(NamedTuple):
    """Of the residual branches of cells."""

    encoder: tuple[Primitive, ...]
    decoder: tuple[Primitive, ...]
    preprocess: tuple[Primitive, ...]
    postprocess: tuple[Primitive, ...]


TWICE: tuple[Primitive, ...] = ("res_bnswish", "res_bnswish")
PRIMITIVES: dict[Cells, Primitives] = {
    "res_mbconv": Primitives(TWICE, ("mconv_e6k5g0",), TWICE, ("mconv_e3k5g0",)),
    "res_bnswish": Primitives(TWICE, TWICE, TWICE, TWICE),
    "mbconv_sep": Primitives(("mconv_e6k5g0",), ("mconv_e6k5g0",), ("mconv_e3k5g0",), ("mconv_e3k5g0",)),
}


def soft_clamp(x: Tensor) -> Tensor:
    """Between -5 and 5, and x near 0."""
    return 5 * (x / 5).tanh()


def normal(mean: Tensor, log_scale: Tensor) -> Normal:
    """Of what a network says of both."""
    scale = soft_clamp(log_scale).exp() + 0.01
    return Normal(soft_clamp(mean), scale.log())


class NVAE(HierarchicalVAE):
    """Groups are maps, latents x h x w, of the smallest scale first."""

    kind = "nvae"
    config_class = NVAEConfig
    config: NVAEConfig

    def __init__(self, config: NVAEConfig, image_size: tuple[int, int], binarised: Binarised | None = None) -> None:
        super().__init__(config, image_size, binarised)
        halvings = config.blocks + config.scales - 1
        padded = [side + 2 * config.padding for side in image_size]
        if any(side % 2**halvings for side in padded):
            raise UserError(
                f"model.kind=nvae cannot halve {padded[0]}x{padded[1]} pixels (images of {image_size[0]}x"
                f"{image_size[1]}, model.padding={config.padding}) {halvings} times, which are model.blocks and "
                f"model.scales - 1, expected multiples of {2**halvings}: give another model.padding, data.image_size, "
                "or fewer of these"
            )
        smallest = [side // 2**halvings for side in padded]
        counts, kinds, excited = config.groups_of_scales, PRIMITIVES[config.cells], config.squeeze_excite
        self.group_shapes = tuple(
            (config.latents, smallest[0] * 2**scale, smallest[1] * 2**scale)
            for scale, count in enumerate(counts)
            for _ in range(count)
        )

        def cells(count: int, width: int, primitives: tuple[Primitive, ...]) -> list[nn.Module]:
            return [cell(width, "none", primitives) for _ in range(count)]

        def cell(width: int, scaling: Scaling, primitives: tuple[Primitive, ...]) -> nn.Module:
            return Cell(width, scaling, primitives, excited)

        # Widths at each resolution, that of images first.
        encoder_widths = [config.encoder_width * 2**halving for halving in range(halvings + 1)]
        decoder_widths = [config.decoder_width * 2**halving for halving in range(halvings + 1)]
        self.prior_ftr0 = nn.Parameter(torch.rand(decoder_widths[-1], *smallest))
        self.stem = Conv2D(config.channels, config.encoder_width, 3)
        self.pre_process = nn.ModuleList()
        for width in encoder_widths[: config.blocks]:
            self.pre_process += cells(config.preprocess_cells - 1, width, kinds.preprocess)
            self.pre_process.append(cell(width, "down", kinds.preprocess))

        self.enc_tower = nn.ModuleList()  # from the largest scale to the smallest
        for scale in reversed(range(config.scales)):
            halving = halvings - scale
            for group in reversed(range(counts[scale])):
                self.enc_tower += cells(config.encoder_cells, encoder_widths[halving], kinds.encoder)
                if (scale, group) != (0, 0):
                    self.enc_tower.append(EncoderCombiner(encoder_widths[halving], decoder_widths[halving]))
            if scale:
                self.enc_tower.append(cell(encoder_widths[halving], "down", kinds.encoder))

        self.enc0 = nn.Sequential(nn.ELU(), Conv2D(encoder_widths[-1], encoder_widths[-1], 1), nn.ELU())
        self.enc_sampler, self.dec_sampler = nn.ModuleList(), nn.ModuleList()
        self.nf_cells = nn.ModuleList()
        self.dec_tower = nn.ModuleList()
        for scale, count in enumerate(counts):
            halving = halvings - scale
            width = decoder_widths[halving]
            for group in range(count):
                self.enc_sampler.append(Conv2D(encoder_widths[halving], 2 * config.latents, 3))
                self.nf_cells += [Flow(config.latents) for _ in range(config.flows)]
                if (scale, group) != (0, 0):
                    self.dec_sampler.append(nn.Sequential(nn.ELU(), Conv2D(width, 2 * config.latents, 1)))
                    self.dec_tower += cells(config.decoder_cells, width, kinds.decoder)
                self.dec_tower.append(DecoderCombiner(width, config.latents))
            if scale < config.scales - 1:
                self.dec_tower.append(cell(width, "up", kinds.decoder))

        self.post_process = nn.ModuleList()
        for halving in reversed(range(config.blocks)):
            self.post_process.append(cell(decoder_widths[halving + 1], "up", kinds.postprocess))
            self.post_process += cells(config.postprocess_cells - 1, decoder_widths[halving], kinds.postprocess)
        self.image_conditional = nn.Sequential(nn.ELU(), Conv2D(config.decoder_width, self.likelihood.outputs, 3))

    # ---- encoder ----

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """What each group's posterior is told of the image, the top group first."""
        padding = self.config.padding
        x = F.pad(images, (padding,) * 4, value=-1.0) if padding else images
        x = self.stem(in_type_of(self.stem, x))
        for cell in self.pre_process:
            x = cell(x)
        kept = []
        for cell in self.enc_tower:
            if isinstance(cell, EncoderCombiner):
                kept.append(x)
            else:
                x = cell(x)
        return [self.enc0(x), *reversed(kept)]

    @property
    def combiners(self) -> list[EncoderCombiner]:
        """Of each group but the first."""
        return [cell for cell in self.enc_tower if isinstance(cell, EncoderCombiner)][::-1]

    def infer(self, features: Sequence[Tensor], noise: Sequence[Tensor] | None) -> tuple[list[Group], Tensor]:
        groups: list[Group] = []
        combiners = self.combiners

        def latents(place: int, decoded: Tensor) -> Tensor:
            prior = self.prior_parameters(place, decoded)
            known = combiners[place - 1](features[place], decoded) if place else features[0]
            posterior = parameters(self.enc_sampler[place](known))
            if self.config.residual_posterior:
                posterior = (prior[0] + posterior[0], prior[1] + posterior[1])
            groups.append(
                self.group(place, normal(*posterior), normal(*prior), None if noise is None else noise[place])
            )
            return groups[-1].latents

        outputs = self.decoded(len(features[0]), latents)
        return groups, outputs

    def group(self, place: int, posterior: Normal, prior: Normal, noise: Tensor | None) -> Group:
        latents = posterior.mean if noise is None else posterior.draw(noise)
        if not self.config.flows:
            return Group.of(latents, posterior, prior)
        log_posterior = posterior.log_density(latents)
        for number in range(self.config.flows):
            latents = self.nf_cells[self.config.flows * place + number](latents)
        return Group(latents, prior.log_density(latents), log_posterior, None)

    def inference_parameters(self) -> list[nn.Parameter]:
        parts = (self.stem, self.pre_process, self.enc_tower, self.enc0, self.enc_sampler, self.nf_cells)
        return [weight for part in parts for weight in part.parameters()]

    # ---- decoder ----

    def generate(self, count: int, choose: Choose) -> Tensor:
        return self.decoded(count, lambda place, decoded: choose(place, normal(*self.prior_parameters(place, decoded))))

    def decoded(self, count: int, latents: Callable[[int, Tensor], Tensor]) -> Tensor:
        """What the likelihood is told, count o H W. latents: of a group, given what was decoded of those before it."""
        x = self.prior_ftr0.expand(count, *self.prior_ftr0.shape)
        place = 0
        for cell in self.dec_tower:
            if isinstance(cell, DecoderCombiner):
                x = cell(x, latents(place, x))
                place += 1
            else:
                x = cell(x)
        for cell in self.post_process:
            x = cell(x)
        outputs: Tensor = self.image_conditional(x)
        padding = self.config.padding
        return outputs[..., padding : outputs.shape[-2] - padding, padding : outputs.shape[-1] - padding]

    def prior_parameters(self, place: int, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of a group's prior, as a network says them."""
        if place:
            return parameters(self.dec_sampler[place - 1](decoded))
        zeros = at_least_float(decoded).new_zeros(len(decoded), *self.group_shapes[0])
        return zeros, zeros

    # ---- training ----

    def regularised(self) -> Regularised:
        convolutions = [module for module in self.modules() if isinstance(module, Convolution)]
        return Regularised(
            matrices=[convolution.applied_weight().flatten(1) for convolution in convolutions],
            gains=[norm.weight for norm in batch_norms(self)],
        )

    @torch.no_grad()
    def fit_averages(
        self,
        temperatures: float | Sequence[float] = 1.0,
        batches: int = 50,
        count: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        """Makes the running averages of the decoder's batch norms those of samples at temperatures, which are as in
        `draw_latents`: as the paper samples below 1 (section 4.2). They are exact means over `batches` batches of
        `count` samples, and no longer those that images are to be judged or reconstructed by."""
        self.train()
        for _ in range(batches):
            self.draw_latents(count, generator, temperatures=temperatures)
        for norm in batch_norms(self):
            norm.take_noted(1.0)
        self.eval()


def parameters(said: Tensor) -> tuple[Tensor, Tensor]:
    """n 2c h w -> mean and log-scale, n c h w each."""
    mean, log_scale = at_least_float(said).chunk(2, dim=1)
    return mean, log_scale
