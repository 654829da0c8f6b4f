"""QINCo, residual quantization with implicit neural codebooks (Huijben et al. 2024, arXiv:2401.14732): what a layer's
codes stand for depends on the codes before it. A small network makes a layer's code vectors of its codebook and of the
sum so far, so that each place has codebooks of its own at the price of one.

A code is found by making all k vectors of a layer at each place, which takes k passes through that network; training
then computes the chosen ones alone once more, with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.compatibility import never_compiled
from common.errors import check_fields
from common.float32 import float32_island, full_precision
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.beam import beam_search_after
from stage1_vq.quantizers.codebook import Codebook, CodebookInit, CodebookSettings, codebook_rules
from stage1_vq.quantizers.gradients import GRADIENTS, Gradient, pass_gradient
from stage1_vq.quantizers.parts import draw_kept, figures_of, health_over, mean_over
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class QINCoConfig:
    """The paper's networks have 2 to 16 blocks and a hidden width of 256, for vectors of 96 to 768 numbers."""

    kind: Literal["qinco"] = "qinco"
    depth: int = 4  # D, code vectors that add up to a latent
    codebook_size: int = 256  # k of each layer
    dim: int = 32  # d, width of z and z_q
    blocks: int = 2  # of the network of each layer after the first
    hidden: int = 64  # width inside a block
    commitment_weight: float = 0.25  # beta: pulls each residual to its code vector
    gradient: Gradient = "straight-through"  # how gradients pass from code vectors to the residuals they stand for
    beam: int = 1  # beginnings that the search for codes keeps; 1: each layer takes its nearest
    quantizer_dropout: float = 0.0  # share of training images whose z_q ends after a random number of layers
    kmeans_iterations: int = 10  # on the first batch's residuals, to start the codebooks from; 0 starts from noise
    revive_after: int = 100  # steps without use, after which a residual takes the place of a code; 0 never
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
            ("depth", self.depth >= 1, "at least 1"),
            ("dim", self.dim >= 1, "at least 1"),
            ("blocks", self.blocks >= 0, "0 (a linear map alone) or more"),
            ("hidden", self.hidden >= 1, "at least 1"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more; 0.25 is common"),
            ("gradient", self.gradient in GRADIENTS, "straight-through or rotation"),
            ("beam", self.beam >= 1, "at least 1; 4 to 16 are common"),
            ("quantizer_dropout", 0 <= self.quantizer_dropout <= 1, "a share from 0 to 1"),
        ]
        check_fields(self, rules)


class Network(nn.Module):
    """Code vectors, ... d, given the sum of the layers before, ... d: a linear map of both, and residual blocks.

    It begins near the code vectors themselves, as a plain residual quantizer that k-means has started.
    """

    def __init__(self, config: QINCoConfig) -> None:
        super().__init__()
        d, hidden = config.dim, config.hidden
        self.joined = nn.Linear(2 * d, d)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(d, hidden), nn.SiLU(), nn.Linear(hidden, d)) for _ in range(config.blocks)
        )
        with torch.no_grad():
            self.joined.weight.mul_(0.01)[:, d:].add_(torch.eye(d))
            self.joined.bias.zero_()
            for block in self.blocks:
                last: Any = block[-1]  # type: ignore[index]
                last.weight.mul_(0.1)
                last.bias.zero_()

    def forward(self, vectors: Tensor, total: Tensor) -> Tensor:
        x = self.joined(torch.cat([total, vectors], -1))
        for block in self.blocks:
            x = x + block(x)
        return x


class QINCoQuantizer(Quantizer):
    """r_1 = z, x_0 = 0; of layer i: e_i nearest to r_i among network_i(codebook_i, x_(i-1)), the first codebook as it
    is; x_i = x_(i-1) + e_i; r_(i+1) = z - x_i. z_q = x_D, to which each layer passes its gradient to its own residual.

    The losses are means over the layers: `codebook_loss`, squared errors per element, teaches codebooks, networks, and
    through what these go by the layers before; `commitment_loss` pulls residuals to their code vectors. All of it in
    float32.
    """

    config_class = QINCoConfig

    def __init__(self, config: QINCoConfig) -> None:
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
        self.networks = nn.ModuleList(Network(config) for _ in range(config.depth - 1))

    def stack(self) -> list[Codebook]:
        return [layer for layer in self.layers if isinstance(layer, Codebook)]

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """One per layer, `depth0` first."""
        return tuple(Grid(f"depth{n}", height, width, self.config.codebook_size) for n in range(self.config.depth))

    def draw_kept(self, b: int, device: torch.device) -> Tensor | None:
        """Codebooks, networks and losses know nothing of it."""
        share = self.config.quantizer_dropout
        return draw_kept(b, self.config.depth, share, device) if self.training and share else None

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    @never_compiled  # compiled, the products would take the precision that the user has set
    def vectors(self, number: int, codebook_rows: Tensor, total: Tensor) -> Tensor:
        """What rows of the codebook of layer `number`, ... d, stand for after this sum of the layers before, ... d."""
        if number == 0:
            return codebook_rows
        with full_precision():
            return self.networks[number - 1](codebook_rows, total)

    def every_vector(self, number: int, sums: Tensor) -> Tensor:
        """All code vectors of a layer after sums n m d: k d of the first, else n m k d."""
        book = self.stack()[number].codebook
        if number == 0:
            return book
        (n, m, d), k = sums.shape, len(book)
        return self.vectors(number, book.expand(n, m, k, d), sums.unsqueeze(2).expand(n, m, k, d))

    @torch.no_grad()
    def search(self, latents: Tensor, chosen: Codes) -> Codes:
        numbers = self.config.codebook_size * max(2 * self.dim, self.config.hidden)
        return beam_search_after(latents, self.config.depth, self.every_vector, self.config.beam, chosen, numbers)

    def forward(self, z: Tensor, kept: Tensor | None = None) -> Quantized:
        """z: b d h w; kept: as `draw_kept` draws it, None: drawn here. Losses: see above; statistics:
        `quantization_error`, the squared error per element that all layers together leave."""
        self.check_latents(z)
        kept = self.draw_kept(len(z), z.device) if kept is None else kept
        with float32_island(z.device.type):
            latents = z.float()
            codes = self.search(latents.detach(), ())
            residual, total = latents, torch.zeros_like(latents)
            seen, losses = total, []
            for number, (layer, grid) in enumerate(zip(self.stack(), codes, strict=True)):
                if self.training:
                    layer.note(residual.detach(), grid)
                vectors = self.look_up(number, grid, total)
                losses.append({"codebook_loss": squared_error(vectors, residual.detach())})
                if self.config.commitment_weight:
                    error = squared_error(residual, vectors.detach())
                    losses[-1]["commitment_loss"] = self.config.commitment_weight * error
                passed = pass_gradient(self.config.gradient, residual, vectors.detach())
                total, residual = total + passed, residual - vectors.detach()
                seen = seen + (passed if kept is None else passed * (number < kept.view(-1, 1, 1, 1)))
            error = residual.detach().square().mean()
            return Quantized(seen.to(z.dtype), codes, mean_over(losses), {"quantization_error": error})

    def look_up(self, number: int, codes: Tensor, total: Tensor) -> Tensor:
        """The code vectors of layer `number`, b h w to b d h w, after this sum, b d h w."""
        rows = F.embedding(codes, self.stack()[number].codebook)
        vectors = self.vectors(number, rows, rearrange(total, "b d h w -> b h w d"))
        return rearrange(vectors, "b h w d -> b d h w")

    def codes(self, z: Tensor) -> Codes:
        return self.codes_after(z, ())

    @torch.no_grad()
    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """Each layer describes what the ones before it, as they were chosen, leave of z."""
        self.check_latents(z)
        with float32_island(z.device.type):
            return self.search(z.float(), chosen)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        return self.latents_of_first(codes, codes[-1].shape[1], codes[-1].shape[2])

    def latents_of_first(self, codes: Codes, height: int, width: int) -> Tensor:
        with float32_island(codes[0].device.type):
            total = torch.zeros(len(codes[0]), self.dim, height, width, device=codes[0].device)
            for number, grid in enumerate(codes):
                total = total + self.look_up(number, grid, total)
            return total

    # ---- the codebooks, once per step -------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means layer by layer, each over the residuals that the ones before it leave; the networks are then near the
        identity."""
        if not self.config.kmeans_iterations:
            return
        with float32_island(batches[0].device.type):
            residuals = [z.float() for z in batches]
            for layer in self.stack():
                layer.initialise(residuals)
                residuals = [residual - layer.look_up(layer.codes(residual)) for residual in residuals]

    def update(self) -> None:
        for layer in self.stack():
            layer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`parts.health_over` the layers."""
        return health_over({f"depth{n}": layer.health(steps_per_epoch) for n, layer in enumerate(self.stack())})

    def discard(self) -> None:
        for layer in self.stack():
            layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        return [
            f"depth{number}: {line}"
            for number, layer in enumerate(self.stack())
            for line in layer.warnings(figures_of(f"depth{number}", metrics), steps_per_epoch, self.path)
        ]
