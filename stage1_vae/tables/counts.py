"""Counts of genes in cells: scVI of Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics"
(Nature Methods 15). For work with single cells take scvi-tools; this file shows that the parts of this package suffice.

    z ~ N(0, I),  log l ~ N(m_s, v_s) by the batch s,  shares = softmax(f(z, s))
    x_g ~ ZINB(l * shares_g, theta_g, h_g(z, s))

A count is 0 with the probability sigmoid(h), and else from a negative binomial with the mean l * share and the variance
mean + mean^2 / theta. The batch is known and not modelled: z is what is left of a cell without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import UserError, check_fields
from stage1_vae.likelihoods.base import at_least_float
from stage1_vae.model import Move
from stage1_vae.networks.batch_norm import BatchNorm
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors.diagonal import DiagonalGaussian, log_normal
from stage1_vae.priors.standard_normal import StandardNormal, StandardNormalConfig
from stage1_vae.tables.data import Table, TableConfig, number_columns
from stage1_vae.tables.model import TableVAE

EPSILON = 1e-8  # inside logs
SMALLEST_VARIANCE = 1e-4  # of posteriors


@dataclass(frozen=True, kw_only=True)
class CountsConfig:
    """The defaults are the published ones; later versions of scvi-tools have library=observed."""

    kind: Literal["counts"] = "counts"
    latents: int = 10  # d, of the state of a cell
    hidden: int = 128  # units of a layer
    layers: int = 1  # of encoder and decoder
    dropout: float = 0.1  # of the encoders
    likelihood: Literal["zinb", "nb"] = "zinb"  # negative binomial, with surplus zeros or without
    dispersion: Literal["gene", "gene_batch", "gene_cell"] = "gene"  # what theta is of
    library: Literal["latent", "observed"] = "latent"  # a cell's size is inferred, or taken from its total
    simplex: bool = False  # the decoder sees softmax(z), shares that add up to 1
    encode_covariates: bool = False  # the encoders are told batch and covariates too
    norm: Literal["batch", "layer", "none"] = "batch"  # of layers
    log_inputs: bool = True  # encoders see log(1 + x)

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("latents", self.latents >= 1, "at least 1"),
                ("hidden", self.hidden >= 1, "at least 1"),
                ("layers", self.layers >= 1, "at least 1"),
                ("dropout", 0 <= self.dropout < 1, "0 (off) or more, below 1"),
            ],
        )


class Category(NamedTuple):
    """A column that says what a row is of, and all that it says."""

    column: str
    names: tuple[str, ...]


class CountsLikelihood(NamedTuple):
    """Of each count, in this order: mean of the negative binomial, inverse dispersion, logits of surplus zeros or None,
    and the share of the total that the mean is made of; ... p, broadcast."""

    rate: Tensor
    dispersion: Tensor
    zero_logits: Tensor | None
    share: Tensor

    def log_prob(self, counts: Tensor) -> Tensor:
        """log p of each count, in nats, ... p."""
        if self.zero_logits is None:
            return log_negative_binomial(counts, self.rate, self.dispersion)
        return log_zero_inflated(counts, self.rate, self.dispersion, self.zero_logits)

    @property
    def mean(self) -> Tensor:
        """Of counts, surplus zeros included."""
        return self.rate if self.zero_logits is None else self.rate * torch.sigmoid(-self.zero_logits)


# ---- likelihoods ----------------------------------------------------------------------------------------------------


def log_negative_binomial(counts: Tensor, rate: Tensor, dispersion: Tensor) -> Tensor:
    """log NB of counts by mean and inverse dispersion theta, elementwise, in nats: the variance is mean + mean^2 /
    theta."""
    log_sum = (dispersion + rate + EPSILON).log()
    return (
        dispersion * ((dispersion + EPSILON).log() - log_sum)
        + counts * ((rate + EPSILON).log() - log_sum)
        + torch.lgamma(counts + dispersion)
        - torch.lgamma(dispersion)
        - torch.lgamma(counts + 1)
    )


def log_zero_inflated(counts: Tensor, rate: Tensor, dispersion: Tensor, zero_logits: Tensor) -> Tensor:
    """Likewise, where a count is 0 with the probability sigmoid(zero_logits) and else from the negative binomial."""
    no_count = dispersion * ((dispersion + EPSILON).log() - (dispersion + rate + EPSILON).log())  # log NB of 0
    of_zero = F.softplus(no_count - zero_logits) - F.softplus(-zero_logits)
    of_others = log_negative_binomial(counts, rate, dispersion) - F.softplus(zero_logits)
    return torch.where(counts < EPSILON, of_zero, of_others)


# ---- networks -------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Dense layers with ReLU, each of which reads one-hot categories too: `n inputs`, `n categories` -> `n hidden`."""

    def __init__(self, inputs: int, categories: int, config: CountsConfig, layers: int, dropout: float) -> None:
        super().__init__()
        sizes = [inputs, *layers * [config.hidden]]
        self.linear = nn.ModuleList(nn.Linear(size + categories, following) for size, following in pairwise(sizes))
        self.norm = nn.ModuleList(norm_of(config) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, categories: Tensor) -> Tensor:
        for linear, norm in zip(self.linear, self.norm, strict=True):
            x = self.dropout(F.relu(norm(linear(torch.cat([x, categories], dim=-1)))))
        return x


def norm_of(config: CountsConfig) -> nn.Module:
    if config.norm == "batch":
        return BatchNorm(config.hidden, step=0.01, eps=1e-3)
    return nn.LayerNorm(config.hidden, elementwise_affine=False) if config.norm == "layer" else nn.Identity()


class Encoder(nn.Module):
    def __init__(self, inputs: int, categories: int, config: CountsConfig, layers: int, numbers: int) -> None:
        super().__init__()
        self.layers = Layers(inputs, categories, config, layers, config.dropout)
        self.mean, self.log_variance = nn.Linear(config.hidden, numbers), nn.Linear(config.hidden, numbers)

    def forward(self, x: Tensor, categories: Tensor) -> DiagonalGaussian:
        hidden = self.layers(x, categories)
        variance = at_least_float(self.log_variance(hidden)).exp() + SMALLEST_VARIANCE
        return DiagonalGaussian(at_least_float(self.mean(hidden)), 0.5 * variance.log())


# ---- the model ------------------------------------------------------------------------------------------------------


class Counts(TableVAE):
    """Rows, b r: p counts, numbers that are known of a cell, and the numbers of its categories, the batch first."""

    kind = "counts"
    config_class = CountsConfig

    def __init__(
        self,
        config: CountsConfig,
        columns: Sequence[str],
        covariates: Sequence[str] = (),
        categories: Sequence[Category] = (),
        batch_column: str | None = None,
    ) -> None:
        """covariates: names of columns of numbers that are known; categories: those of columns of names, the batch
        first where there is one, whose name is batch_column."""
        super().__init__()
        self.config = config
        self.columns, self.covariates = tuple(columns), tuple(covariates)
        self.categories, self.batch_column = tuple(Category(*category) for category in categories), batch_column
        self.sizes = [len(category.names) for category in self.categories]
        one_hot = sum(size for size in self.sizes if size > 1)  # one name alone says nothing
        batches = self.sizes[0] if batch_column is not None else 1
        genes, known = len(self.columns), len(self.covariates)
        told = (genes + known, one_hot) if config.encode_covariates else (genes, 0)
        self.encoder = Encoder(*told, config, config.layers, config.latents)
        self.library_encoder = None
        if config.library == "latent":
            self.library_encoder = Encoder(*told, config, 1, 1)
            self.register_buffer("library_mean", torch.zeros(batches))
            self.register_buffer("library_variance", torch.ones(batches))
        self.decoder = Layers(config.latents + known, one_hot, config, config.layers, 0.0)
        self.share = nn.Linear(config.hidden, genes)
        self.zeros = nn.Linear(config.hidden, genes) if config.likelihood == "zinb" else None
        self.dispersion_layer, self.log_dispersion = None, None
        if config.dispersion == "gene_cell":
            self.dispersion_layer = nn.Linear(config.hidden, genes)
        else:
            self.log_dispersion = nn.Parameter(torch.randn(batches if config.dispersion == "gene_batch" else 1, genes))
        self.prior = StandardNormal(StandardNormalConfig(), (config.latents,))
        self.noise_size = config.latents + (config.library == "latent")

    library_mean: Tensor  # by batch, of log totals
    library_variance: Tensor

    def arguments(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "columns": list(self.columns),
            "covariates": list(self.covariates),
            "categories": [[category.column, list(category.names)] for category in self.categories],
            "batch_column": self.batch_column,
        }

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        categories = [Category(column, tuple(names)) for column, names in arguments["categories"]]
        given = {**arguments, "config": CountsConfig(**arguments["config"]), "categories": categories}
        return cls(**given)

    def traits(self) -> list[str]:
        return [f"{self.config.latents} latents ({len(self.columns)} columns of counts)"]

    # -- tables

    def rows(self, table: Table) -> Tensor:
        self.check_has_columns(table)
        parts = [counts_of(table, self.columns)]
        if self.covariates:
            parts.append(complete(table, self.covariates))
        for column, names in self.categories:
            numbers = {name: number for number, name in enumerate(names)}
            said = table.texts(column)
            if unknown := next((name for name in said if name not in numbers), None):
                raise UserError(
                    f"{table.where(said.index(unknown))}, column {column!r} holds {unknown!r}, expected one of "
                    f"{', '.join(names)}: the model was trained on these alone"
                )
            parts.append(np.array([numbers[name] for name in said], dtype=np.float64)[:, None])
        return torch.from_numpy(np.concatenate(parts, axis=1)).float()

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Counts b p, covariates b c, one-hot categories b o, and the number of the batch, b int64."""
        counts, known, codes = rows.split([len(self.columns), len(self.covariates), len(self.sizes)], dim=-1)
        batch = codes[:, 0].long() if self.batch_column is not None else counts.new_zeros(len(rows), dtype=torch.long)
        hot = [
            F.one_hot(codes[:, place].long(), size).to(counts.dtype)
            for place, size in enumerate(self.sizes)
            if size > 1
        ]
        return counts, known, torch.cat([*hot, counts[:, :0]], dim=-1), batch

    def take_library(self, rows: Tensor) -> None:
        """The prior of log totals, by batch, from training rows: mean and variance of theirs, or, of a batch without
        training rows, those of all."""
        if self.library_encoder is None:
            return
        counts, _, _, batch = self.parts(rows)
        log_totals = counts.double().sum(-1).log()
        for number in range(len(self.library_mean)):
            mine = batch == number
            of_batch = log_totals[mine] if bool(mine.any()) else log_totals
            self.library_mean[number] = of_batch.mean()
            self.library_variance[number] = of_batch.var(unbiased=False).clamp(min=SMALLEST_VARIANCE)

    # -- distributions

    def posteriors(self, rows: Tensor) -> tuple[DiagonalGaussian, DiagonalGaussian | None]:
        """q(z|x, s) and, where it is latent, q(log l|x, s)."""
        counts, known, hot, _ = self.parts(rows)
        inputs = counts.log1p() if self.config.log_inputs else counts
        told = (torch.cat([inputs, known], dim=-1), hot) if self.config.encode_covariates else (inputs, hot[:, :0])
        return self.encoder(*told), None if self.library_encoder is None else self.library_encoder(*told)

    def likelihood(self, states: Tensor, log_library: Tensor, rows: Tensor) -> CountsLikelihood:
        """p(x|z, l, s): states k b d, log_library k b 1, and rows b r, whose counts are not looked at."""
        _, known, hot, batch = self.parts(rows)
        seen = states.softmax(-1) if self.config.simplex else states
        draws = len(states)
        inputs = torch.cat([seen, known.expand(draws, *known.shape)], dim=-1).flatten(0, 1)
        hidden = self.decoder(inputs, hot.repeat(draws, 1)).unflatten(0, states.shape[:2])
        share = at_least_float(self.share(hidden)).softmax(-1)
        if self.dispersion_layer is not None:
            log_dispersion = at_least_float(self.dispersion_layer(hidden))
        else:
            assert self.log_dispersion is not None
            log_dispersion = self.log_dispersion[batch if self.config.dispersion == "gene_batch" else 0 * batch]
        logits = None if self.zeros is None else at_least_float(self.zeros(hidden))
        return CountsLikelihood(log_library.exp() * share, log_dispersion.exp(), logits, share)

    def forward(self, rows: Tensor, draws: int = 1, noise: Tensor | None = None, move: Move | None = None) -> Terms:
        if move is not None:
            raise UserError(
                "counts have two groups of latents, expected an objective that takes their draws as they are: elbo, or "
                "importance with the reparameterised gradient"
            )
        if noise is None:
            noise = torch.randn(draws, len(rows), self.noise_size, device=rows.device)
        of_state, of_library = noise.split([self.config.latents, self.noise_size - self.config.latents], dim=-1)
        counts, _, _, batch = self.parts(rows)
        posterior, library = self.posteriors(rows)
        states, log_q = posterior.draw(of_state)
        groups = [(states, self.prior.log_density(states), log_q, self.prior.kl(posterior))]
        if library is None:
            log_library = counts.sum(-1, keepdim=True).log().expand(len(states), -1, -1)
        else:
            log_library, log_q = library.draw(of_library)
            mean, variance = self.library_mean[batch, None], self.library_variance[batch, None]
            groups.append((log_library, log_normal(log_library, mean, variance), log_q, kl(library, mean, variance)))
        likelihood = self.likelihood(states, log_library, rows)
        latents, log_prior, log_posterior, exact_kl = zip(*groups, strict=True)
        return Terms(
            latents=latents,
            log_likelihood=likelihood.log_prob(counts).sum(-1),
            log_prior=log_prior,
            log_posterior=log_posterior,
            exact_kl=exact_kl,
            posteriors=(posterior,) if library is None else (posterior, library),
        )

    def generator_parameters(self) -> list[nn.Parameter]:
        encoders = [encoder for encoder in (self.encoder, self.library_encoder) if encoder is not None]
        inference = {id(weight) for encoder in encoders for weight in encoder.parameters()}
        return [weight for weight in self.parameters() if id(weight) not in inference]

    def encode(self, rows: Tensor) -> Tensor:
        mean = self.posteriors(rows)[0].mean
        return mean.softmax(-1) if self.config.simplex else mean

    @torch.inference_mode()
    def denoised(self, rows: Tensor, *, total: float | None = None, batch: str | None = None) -> Tensor:
        """What is expected of each gene without surplus zeros, b p, at the means of the posteriors.

        total: what a cell's genes add up to; None: as many as its own. batch: a name; cells as they would be in it.
        Raises UserError for one that there is not.
        """
        posterior, library = self.posteriors(rows)
        if batch is not None:
            rows = rows.clone()
            rows[:, len(self.columns) + len(self.covariates)] = self.number_of_batch(batch)
        if total is not None:
            log_library = rows.new_full((1, len(rows), 1), math.log(total))
        elif library is not None:
            log_library = library.mean[None]
        else:
            log_library = self.parts(rows)[0].sum(-1, keepdim=True).log()[None]
        return self.likelihood(posterior.mean[None], log_library, rows).rate[0]

    def number_of_batch(self, name: str) -> int:
        names = self.categories[0].names if self.batch_column is not None else ()
        if name not in names:
            raise UserError(f"batch={name}, expected one of those of this model: {', '.join(names) or 'it has none'}")
        return names.index(name)


def kl(posterior: DiagonalGaussian, mean: Tensor, variance: Tensor) -> Tensor:
    """KL(posterior || N(mean, variance)) of each number, in nats."""
    ratio = posterior.scale.square() / variance
    return 0.5 * (ratio + (posterior.mean - mean).square() / variance - 1 - ratio.log())


# ---- tables ---------------------------------------------------------------------------------------------------------


def complete(table: Table, columns: Sequence[str]) -> NDArray[np.float64]:
    """Numbers of columns in which none may be missing, n p. Raises UserError."""
    values = table.numbers(columns)
    if (places := np.argwhere(np.isnan(values))).size:
        row, column = places[0]
        raise UserError(f"{table.where(row)}, column {columns[column]!r} is empty, expected a number")
    return values


def counts_of(table: Table, columns: Sequence[str]) -> NDArray[np.float64]:
    """Whole numbers, n p. Raises UserError for others, with line and column, and for a row without any count."""
    values = complete(table, columns)
    if (places := np.argwhere((values < 0) | (values != np.floor(values)))).size:
        row, column = places[0]
        raise UserError(
            f"{table.where(row)}, column {columns[column]!r} holds {values[row, column]:g}, expected a count, "
            "a whole number from 0 on: give raw counts; columns of other numbers are named by --table.covariate_columns"
        )
    if (empty := np.flatnonzero(values.sum(axis=1) == 0)).size:
        raise UserError(f"{table.where(empty[0])} has no counts at all, expected some; leave it out")
    return values


def counts_model(config: CountsConfig, table: Table, training: Table, data: TableConfig) -> Counts:
    """A fresh model for a table, which knows all of its categories, those that chance has left out of its training rows
    too. Raises UserError for a table that is not of counts."""
    if config.dispersion == "gene_batch" and data.batch_column is None:
        raise UserError("model.dispersion=gene_batch needs a batch, got none; give --table.batch_column")
    categories = [Category(column, tuple(sorted(set(table.texts(column))))) for column in data.categories]
    columns = number_columns(table, data)
    model = Counts(config, columns, data.covariate_columns, categories, data.batch_column)
    model.take_library(model.rows(training))
    return model
