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
            ("direction", self.direction in ("code", "random"), "code or random"),
            ("noise", self.noise >= 0, "0 (straight to the code vector) or more; 0.001 is common"),
            ("space_filling", not self.space_filling or self.depth == 1, "False where depth is above 1"),
            (
                "space_filling",
                not self.space_filling or self.direction == "code",
                "False where direction=random: the line is approached by steps to its two ends",
            ),
        ]
        check_fields(self, rules)


class DiVeQuantizer(Quantizer):
    """z -> nearest code vector e, or the sum of those of `depth` residual layers -> in training z + |e - z| u, else e.

    Codes are those of the nearest code vectors, in the space-filling variant too. The gradient of z_q reaches z by
    itself and by |e - z|, and code vectors by |e - z|. All in float32, also under autocast; z_q has the type of z.
    """

    config_class = DiVeQConfig

    def __init__(self, config: DiVeQConfig) -> None:
        super().__init__(config.dim)
        self.config = config
        settings = CodebookSettings(
            size=config.codebook_size,
            width=config.dim,
            update="gradient",
            decay=config.decay,
            init=config.init,
            kmeans_iterations=config.kmeans_iterations,
            revive_after=config.revive_after,
            warn_usage_below=config.warn_usage_below,
        )
        self.layers = nn.ModuleList(Codebook(settings) for _ in range(config.depth))

    def stack(self) -> list[Codebook]:
        return [layer for layer in self.layers if isinstance(layer, Codebook)]

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        names = ["codes"] if self.config.depth == 1 else [f"depth{number}" for number in range(self.config.depth)]
        return tuple(Grid(name, height, width, self.config.codebook_size) for name in names)

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. No losses. Training mode draws noise (common/draws.py). Statistics: `quantization_error`, the
        squared error per element of the code vectors."""
        self.check_latents(z)
        with float32_island(z.device.type):
            latents = z.float()
            residual, total = latents.detach(), torch.zeros_like(latents)
            codes: list[Tensor] = []
            for layer in self.stack():
                codes.append(layer.nearest(residual, layer.codebook.detach(), note=self.training))
                nearest = look_up(codes[-1], layer.codebook)
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
        """b d h w: as long as the way to the target, in a direction that passes no gradient."""
        way, noise = target - latents, normal_like(latents)
        if self.config.direction == "code":
            noise = way.detach() + self.config.noise * noise
        return way.norm(dim=1, keepdim=True) * F.normalize(noise, dim=1)

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
                found.append(chosen[number] if number < len(chosen) else layer.codes(residual))
                residual = residual - layer.look_up(found[-1])
        return tuple(found)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        parts = [layer.look_up(grid) for layer, grid in zip(self.stack(), codes, strict=True)]
        return torch.stack(parts).sum(0)

    # ---- the codebooks, once per step -------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means layer by layer, each over the residuals that the ones before it leave."""
        with float32_island(batches[0].device.type):
            residuals = [z.float() for z in batches]
            for layer in self.stack():
                layer.initialise(residuals)
                residuals = [residual - layer.look_up(layer.codes(residual)) for residual in residuals]

    def update(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """Health: of `Codebook.update`, or with depth `parts.health_over` the layers."""
        healths = [layer.update(steps_per_epoch) for layer in self.stack()]
        if len(healths) == 1:
            return healths[0]
        return health_over({f"depth{number}": health for number, health in enumerate(healths)})

    def discard(self) -> None:
        for layer in self.stack():
            layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        if self.config.depth == 1:
            return self.stack()[0].warnings(metrics, steps_per_epoch, self.path)
        return [
            f"depth{number}: {line}"
            for number, layer in enumerate(self.stack())
            for line in layer.warnings(figures_of(f"depth{number}", metrics), steps_per_epoch, self.path)
        ]
