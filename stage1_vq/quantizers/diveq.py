"""DiVeQ, differentiable vector quantization (Vali et al. 2025, arXiv:2509.26469): the quantization error is seen as a
step of its own length in a direction that is held constant, z_q = z + |e - z| * u, so that both the latent and the code
vector learn from what comes after, and no further loss is needed.

u points to the code vector, and a little noise is added before it gets length 1: DiVeQ. Noise alone, any direction, is
its predecessor NSVQ (Vali and Backstrom 2022, "NSVQ: Noise substitution in vector quantization for machine learning").
The space-filling variant trains on the line that runs through the code vectors in their order, a random point of each
segment at a time: no code vector is far from what is used, so none dies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.draws import normal_like, uniform_of_step
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.codebook import (
    Codebook,
    CodebookInit,
    CodebookSettings,
    codebook_rules,
    codes_of_map,
    look_up,
)
from stage1_vq.quantizers.parts import figures_of, health_over


@dataclass(frozen=True, kw_only=True)
class DiVeQConfig:
    """The noise is that of the authors' package, where it is called a variance; NSVQ is direction=random."""

    kind: Literal["diveq"] = "diveq"
    codebook_size: int = 1024  # k
    dim: int = 64  # d, width of z and z_q
    depth: int = 1  # residual layers, whose code vectors add up to one step
    groups: int = 1  # parts of equal width that the channels are split into, each with a codebook; one step for all
    direction: Literal["code", "random"] = "code"  # of the step: to the code vector and noise, or noise alone (NSVQ)
    noise: float = 1e-3  # standard deviation of what is added to e - z before it gives the direction (direction=code)
    space_filling: bool = False  # in training, e is a random point between two code vectors that follow each other
    kmeans_iterations: int = 10  # on the first batch's latents, to start the codebook from; 0 starts from noise
    revive_after: int = 100  # steps without use, after which a latent takes the place of a code; 0 never
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns
    init: CodebookInit = "unit"  # code vectors at first, without k-means: length 1 or so, +-1/codebook_size, normal

    @property
    def codebook_update(self) -> Literal["gradient"]:
        return "gradient"

    @property
    def decay(self) -> float:
        """Of moving averages, which there are none of."""
        return 0.0

    def __post_init__(self) -> None:
        rules = [
            *codebook_rules(self),
            ("dim", self.dim >= 1, "at least 1"),
            ("depth", self.depth >= 1, "at least 1"),
            ("groups", self.groups >= 1 and self.dim % self.groups == 0, f"a divisor of dim={self.dim}"),
            ("direction", self.direction in ("code", "random"), "code or random"),
            ("noise", self.noise >= 0, "0 (straight to the code vector) or more; 0.001 is common"),
            (
                "space_filling",
                not self.space_filling or self.depth == self.groups == 1,
                "False where depth or groups are above 1",
            ),
            (
                "space_filling",
                not self.space_filling or self.direction == "code",
                "False where direction=random: the line is approached by steps to its two ends",
            ),
        ]
        check_fields(self, rules)


def directional_step(latents: Tensor, target: Tensor, noise: float | None) -> Tensor:
    """b d h w: as long as the way to the target, in a direction that passes no gradient: that of the way and of noise
    of this deviation, or where it is None of noise alone."""
    way, direction = target - latents, normal_like(latents)
    if noise is not None:
        direction = way.detach() + noise * direction
    return way.norm(dim=1, keepdim=True) * F.normalize(direction, dim=1)


class DiVeQuantizer(Quantizer):
    """z -> nearest code vector e, or the sum of those of `depth` residual layers, of each of `groups` of channels -> in
    training z + |e - z| u, else e.

    Codes are those of the nearest code vectors, in the space-filling variant too. The gradient of z_q reaches z by
    itself and by |e - z|, and code vectors by |e - z|. All in float32, also under autocast; z_q has the type of z.
    """

    config_class = DiVeQConfig

    def __init__(self, config: DiVeQConfig) -> None:
        super().__init__(config.dim)
        self.config = config
        settings = CodebookSettings(
            size=config.codebook_size,
            width=config.dim // config.groups,
            update="gradient",
            decay=config.decay,
            init=config.init,
            kmeans_iterations=config.kmeans_iterations,
            revive_after=config.revive_after,
            warn_usage_below=config.warn_usage_below,
        )
        self.layers = nn.ModuleList(Codebook(settings) for _ in range(config.depth * config.groups))

    def stack(self) -> list[Codebook]:
        return [layer for layer in self.layers if isinstance(layer, Codebook)]

    def names(self) -> list[str]:
        """Of the codebooks: layer after layer, and of each layer the groups."""
        depth, groups = self.config.depth, self.config.groups
        if groups == 1:
            return [f"depth{number}" for number in range(depth)]
        layers = [""] if depth == 1 else [f"depth{number}_" for number in range(depth)]
        return [f"{layer}group{group}" for layer in layers for group in range(groups)]

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        names = self.names() if len(self.layers) > 1 else ["codes"]
        return tuple(Grid(name, height, width, self.config.codebook_size) for name in names)

    def part(self, x: Tensor, number: int) -> Tensor:
        """The channels of x, b d h w, that codebook `number` is of."""
        return x.chunk(self.config.groups, 1)[number % self.config.groups]

    def placed(self, vectors: Tensor, number: int) -> Tensor:
        """Vectors of codebook `number` among zeros in the other channels: b d h w."""
        width = vectors.shape[1]
        start = number % self.config.groups * width
        return F.pad(vectors, (0, 0, 0, 0, start, self.config.dim - start - width))

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. No losses. Training mode draws noise (common/draws.py). Statistics: `quantization_error`, the
        squared error per element of the code vectors."""
        self.check_latents(z)
        with float32_island(z.device.type):
            latents = z.float()
            residual, total = latents.detach(), torch.zeros_like(latents)
            codes: list[Tensor] = []
            for number, layer in enumerate(self.stack()):
                part = self.part(residual, number)
                codes.append(layer.nearest(part, layer.codebook.detach(), note=self.training))
                nearest = self.placed(look_up(codes[-1], layer.codebook), number)
                residual, total = residual - nearest.detach(), total + nearest
            error = residual.square().mean()
            if not self.training:
                z_q = total
            elif self.config.space_filling:
                z_q = self.on_the_line(latents)
            else:
                z_q = latents + self.step_to(latents, total)
            return Quantized(z_q.to(z.dtype), tuple(codes), {}, {"quantization_error": error})

    def step_to(self, latents: Tensor, target: Tensor) -> Tensor:
        return directional_step(latents, target, self.config.noise if self.config.direction == "code" else None)

    def on_the_line(self, latents: Tensor) -> Tensor:
        """b d h w: the segment whose random point is nearest, and a part of a step to each of its ends, so long that
        without noise they add up to the point."""
        vectors = self.stack()[0].codebook
        shares = uniform_of_step(len(vectors) - 1, device=vectors.device)  # of the way along each segment
        points = torch.lerp(vectors[:-1], vectors[1:], shares.unsqueeze(1)).detach()
        segments = codes_of_map(latents, points)
        share = rearrange(shares[segments], "b h w -> b 1 h w")
        z_q = latents
        for target, part in ((look_up(segments, vectors), 1 - share), (look_up(segments + 1, vectors), share)):
            z_q = z_q + part * self.step_to(latents, target)
        return z_q

    def codes(self, z: Tensor) -> Codes:
        return self.codes_after(z, ())

    @torch.no_grad()
    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """Each layer describes what the ones before it, as they were chosen, leave of z."""
        self.check_latents(z)
        with float32_island(z.device.type):
            residual = z.float()
            found: list[Tensor] = []
            for number, layer in enumerate(self.stack()):
                found.append(chosen[number] if number < len(chosen) else layer.codes(self.part(residual, number)))
                residual = residual - self.placed(layer.look_up(found[-1]), number)
        return tuple(found)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        books = enumerate(zip(self.stack(), codes, strict=True))
        parts = [self.placed(layer.look_up(grid), number) for number, (layer, grid) in books]
        return torch.stack(parts).sum(0)

    # ---- the codebooks, once per step -------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means layer by layer, each over the residuals that the ones before it leave."""
        with float32_island(batches[0].device.type):
            residuals = [z.float() for z in batches]
            for number, layer in enumerate(self.stack()):
                parts = [self.part(residual, number) for residual in residuals]
                layer.initialise(parts)
                residuals = [
                    residual - self.placed(layer.look_up(layer.codes(part)), number)
                    for residual, part in zip(residuals, parts, strict=True)
                ]

    def update(self) -> None:
        for layer in self.stack():
            layer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """That of the codebook, or with depth `parts.health_over` the layers."""
        healths = [layer.health(steps_per_epoch) for layer in self.stack()]
        if len(healths) == 1:
            return healths[0]
        return health_over(dict(zip(self.names(), healths, strict=True)))

    def discard(self) -> None:
        for layer in self.stack():
            layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        if len(self.layers) == 1:
            return self.stack()[0].warnings(metrics, steps_per_epoch, self.path)
        return [
            f"{name}: {line}"
            for name, layer in zip(self.names(), self.stack(), strict=True)
            for line in layer.warnings(figures_of(name, metrics), steps_per_epoch, self.path)
        ]
