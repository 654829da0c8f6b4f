"""MIWAE of Mattei and Frellsen 2019, "MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets"
(arXiv:1812.02633), and not-MIWAE of Ipsen et al. 2021 (arXiv:2006.12871), which models what is missing besides.

    z ~ N(0, I),  x|z each number by itself,  q(z|x) of the seen numbers, zeros in the place of others

    log w_k = log p(x_seen|z_k) + log p(z_k) - log q(z_k|x_seen)
              [+ log p(s|x_seen, x_missing,k),  x_missing,k ~ p(x|z_k)]

The objective is a bound made of these weights. Numbers are missing completely at random, or at random given those that
are seen, unless there is a mask model; then also not at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError, check_fields
from stage1_vae.completing import chosen_draws
from stage1_vae.evaluation import mixed
from stage1_vae.likelihoods.base import at_least_float
from stage1_vae.model import Move
from stage1_vae.networks.dense import Activation, DenseConfig, DenseLayers
from stage1_vae.objectives.importance import normalised_weights
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors.diagonal import DiagonalGaussian, log_scales
from stage1_vae.priors.standard_normal import StandardNormal, StandardNormalConfig
from stage1_vae.tables.data import Table
from stage1_vae.tables.likelihoods import Density, LikelihoodKind, density_of, outputs_for
from stage1_vae.tables.masks import MASKS, AtRandomConfig, MaskConfig, build_mask, log_probability
from stage1_vae.tables.model import TableVAE

ROUNDING = 1e-12  # of a column's size: less of a spread is what computing it leaves of equal numbers
AT_ONCE = 2**22  # numbers in the largest tensor of an imputation


@dataclass(frozen=True, kw_only=True)
class MIWAEConfig:
    """p(z) p(x|z) p(s|x) and q(z|x). The published sizes: 10 latents, layers of 128 units, 20 draws."""

    kind: Literal["miwae"] = "miwae"
    latents: int = 10  # d
    hidden: tuple[int, ...] = (128, 128)  # units of the layers of encoder and decoder
    activation: Activation = "relu"
    likelihood: LikelihoodKind = "student"  # of a number: Student's t, or Gaussian
    indicators: bool = False  # the encoder is told which numbers are missing, besides the zeros in their place
    mask: MaskConfig = field(default_factory=AtRandomConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_fields(self, [("latents", self.latents >= 1, "at least 1")])


class Column(NamedTuple):
    """How a column's numbers are standardised: (x - mean) / scale."""

    name: str
    mean: float
    scale: float


def columns_of(table: Table, training: Table, names: Sequence[str]) -> tuple[Column, ...]:
    """By the seen numbers of a table's training rows, or, of a column of which chance has left these none, of all rows.
    Raises UserError for a column without any."""
    found = []
    for name, *values in zip(names, training.numbers(names).T, table.numbers(names).T, strict=True):
        of_training, of_all = (column[~np.isnan(column)] for column in values)
        seen = of_training if len(of_training) else of_all
        if not len(seen):
            raise UserError(
                f"{table.path} has no number in column {name!r}, expected some: leave the column out of the table"
            )
        spread = float(seen.std())
        constant = spread <= ROUNDING * float(np.abs(seen).max())
        found.append(Column(name, float(seen.mean()), 1.0 if constant else spread))
    return tuple(found)


class MIWAE(TableVAE):
    """Rows are standardised numbers, b p, nan where one is missing."""

    kind = "miwae"
    config_class = MIWAEConfig

    def __init__(self, config: MIWAEConfig, columns: Sequence[Column]) -> None:
        super().__init__()
        self.config = config
        self.standard = tuple(columns)
        self.columns = tuple(column.name for column in columns)
        numbers = len(self.columns)
        layers = DenseConfig(hidden=config.hidden, activation=config.activation)
        self.encoder = DenseLayers(numbers * (1 + config.indicators), 2 * config.latents, layers)
        self.prior = StandardNormal(StandardNormalConfig(), (config.latents,))
        self.decoder = DenseLayers(config.latents, outputs_for(config.likelihood, numbers), layers)
        self.mask = build_mask(config.mask, numbers)
        self.noise_size = config.latents + (0 if self.mask is None else 2 * numbers)

    def arguments(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "columns": [list(column) for column in self.standard]}

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        config = dict(arguments["config"])
        config["mask"] = MASKS[config["mask"]["kind"]][1](**config["mask"])
        return cls(MIWAEConfig(**config), [Column(*column) for column in arguments["columns"]])

    def traits(self) -> list[str]:
        return [f"{self.config.latents} latents ({len(self.columns)} columns)"]

    def rows(self, table: Table) -> Tensor:
        self.check_has_columns(table)
        means, scales = (np.array([getattr(column, name) for column in self.standard]) for name in ("mean", "scale"))
        return torch.from_numpy((table.numbers(self.columns) - means) / scales).float()

    def numbers(self, rows: Tensor) -> Tensor:
        """... p, of rows as they are modelled, in the units of the table, float64."""
        means, scales = (rows.new_tensor([c[i] for c in self.standard], dtype=torch.float64) for i in (1, 2))
        return rows.double() * scales + means

    def posterior(self, rows: Tensor) -> DiagonalGaussian:
        seen = rows.isnan().logical_not()
        inputs = rows.nan_to_num(0.0)
        if self.config.indicators:
            inputs = torch.cat([inputs, seen.to(inputs.dtype)], dim=-1)
        mean, raw = at_least_float(self.encoder(inputs)).chunk(2, dim=-1)
        return DiagonalGaussian(mean, log_scales(raw, "softplus", 0.0))

    def density(self, latents: Tensor) -> Density:
        """p(x|z), ... d -> ... p"""
        return density_of(self.config.likelihood, self.decoder(latents))

    def log_likelihood(self, latents: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
        """Of what is seen of rows b p, and of which numbers are seen where that is modelled, in nats: k b d -> k b.
        noise: k b 2p, of the numbers that are not seen."""
        seen, density = rows.isnan().logical_not(), self.density(latents)
        values = rows.nan_to_num(0.0)
        found = torch.where(seen, density.log_density(values), 0.0).sum(-1)
        if self.mask is not None:
            found = found + log_probability(self.mask(torch.where(seen, values, density.draw(noise))), seen)
        return found

    def forward(self, rows: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None) -> Terms:
        if noise is None:
            noise = torch.randn(draws, len(rows), self.noise_size, device=rows.device)
        of_latents, of_numbers = noise.split([self.config.latents, self.noise_size - self.config.latents], dim=-1)
        posterior = self.posterior(rows)
        latents, log_posterior = posterior.draw(of_latents)
        if move is not None:

            def log_joint(moved: Tensor) -> Tensor:
                return self.log_likelihood(moved, rows, of_numbers) + self.prior.log_density(moved).sum(-1)

            latents, log_posterior = move(latents, log_posterior, log_joint)
        return Terms(
            latents=(latents,),
            log_likelihood=self.log_likelihood(latents, rows, of_numbers),
            log_prior=(self.prior.log_density(latents),),
            log_posterior=(log_posterior,),
            exact_kl=(self.prior.kl(posterior) if move is None else None,),
            posteriors=(posterior,),
            priors=(self.prior,),
        )

    def generator_parameters(self) -> list[nn.Parameter]:
        parts = [self.prior, self.decoder, *([] if self.mask is None else [self.mask])]
        return [weight for part in parts for weight in part.parameters()]

    def encode(self, rows: Tensor) -> Tensor:
        return self.posterior(rows).mean


# ---- imputation -----------------------------------------------------------------------------------------------------


class Imputed(NamedTuple):
    """Rows in which nothing is missing; what was seen is as it was."""

    single: Tensor  # n p: the mean of the missing given the seen, which has the least squared error
    multiple: Tensor  # m n p: draws of the missing given the seen
    effective_draws: Tensor  # n, of each row's weights, from 1 to the number of draws: of few nothing is to be trusted


@torch.inference_mode()
def impute(model: MIWAE, rows: Tensor, *, draws: int, multiple: int = 0, seed: int = 0, first: int = 0) -> Imputed:
    """Rows n p, nan where a number is missing, completed by importance sampling with `draws` draws of q(z|x) for each.

    single: sum_k v_k E[x|z_k] with v_k = w_k / sum w (Mattei and Frellsen 2019, equation 12); with a mask model, whose
    weights go by the x_k drawn, sum_k v_k x_k (Ipsen et al. 2021, equation 9). multiple: k drawn with the probabilities
    v_k, `multiple` times, with replacement, and x of p(x|z_k): sampling importance resampling (equation 13). Noise of a
    row is a function of the seed and its number, which is `first` of the first row.
    """
    each = max(1, AT_ONCE // (draws * 3 * rows.shape[1]))
    parts = [
        impute_few(model, few, noise_of_rows(model, len(few), draws, multiple, seed, first + start, rows.device))
        for start, few in parts_of(rows, each)
    ]
    return Imputed(
        torch.cat([part.single for part in parts]),
        torch.cat([part.multiple for part in parts], dim=1),
        torch.cat([part.effective_draws for part in parts]),
    )


def parts_of(rows: Tensor, each: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), each):
        yield start, rows[start : start + each]


class RowNoise(NamedTuple):
    of_latents: Tensor  # k b d, normal
    of_numbers: Tensor  # k b 2p with a mask model, else m b 2p, normal
    of_choice: Tensor  # m b, in [0, 1)


def noise_of_rows(
    model: MIWAE, count: int, draws: int, multiple: int, seed: int, first: int, device: torch.device
) -> RowNoise:
    latents, numbers = model.config.latents, 2 * len(model.columns)
    numbered = draws if model.mask is not None else multiple
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(mixed(seed, number))  # on the CPU: the same on any device
        parts.append(
            (
                torch.randn(draws, latents, generator=generator),
                torch.randn(numbered, numbers, generator=generator),
                torch.rand(multiple, generator=generator),
            )
        )
    return RowNoise(*(torch.stack(part, dim=1).to(device) for part in zip(*parts, strict=True)))


def impute_few(model: MIWAE, rows: Tensor, noise: RowNoise) -> Imputed:
    """`impute` of rows that are held at once, b p."""
    seen, values = rows.isnan().logical_not(), rows.nan_to_num(0.0)
    posterior = model.posterior(rows)
    latents, log_posterior = posterior.draw(noise.of_latents)
    density = model.density(latents)
    log_weights = torch.where(seen, density.log_density(values), 0.0).sum(-1)
    log_weights = log_weights + model.prior.log_density(latents).sum(-1) - log_posterior.sum(-1)
    completed = density.mean
    if model.mask is not None:
        completed = torch.where(seen, values, density.draw(noise.of_numbers))
        log_weights = log_weights + log_probability(model.mask(completed), seen)
    weights = normalised_weights(log_weights.double())  # k b
    single = torch.einsum("kb,kbp->bp", weights.to(completed.dtype), completed)
    chosen = chosen_draws(weights, noise.of_choice)  # m b
    if model.mask is not None:
        multiple = completed.gather(0, chosen[..., None].expand(*chosen.shape, rows.shape[1]))
    else:
        kept = latents.gather(0, chosen[..., None].expand(*chosen.shape, latents.shape[-1]))
        multiple = model.density(kept).draw(noise.of_numbers)
    return Imputed(torch.where(seen, values, single), torch.where(seen, values, multiple), 1 / weights.square().sum(0))
