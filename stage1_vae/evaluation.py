"""How likely images are under a VAE: log p(x) by importance sampling with q(z|x) as the proposal, and what bounds it.

    log w_k = log p(x|z_k) + log p(z_k) - log q(z_k|x),   z_k drawn from q(z|x)
    log p(x) ~ log (1/K sum_k w_k)           a little too low on average, by about half the square of its standard error
    L_k = E log of the mean of k weights     Burda et al. 2015 (arXiv:1509.00519, equation 8); L_1 is the ELBO
    ELBO = E log p(x|z) - KL(q(z|x) || p(z)) its KL in closed form where there is one

All of it comes from the same draws, whose noise is a function of the seed, the number of the image and the number of
the draw: batches, chunks and processes change nothing but the last bits of what is computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stage1_vae.model import LikelihoodVAE, NoiseSource
from stage1_vae.objectives.terms import Terms

BLOCK = 250  # draws whose noise comes from one generator
AT_ONCE = {"cpu": 2**20, "other": 2**27}  # numbers in the largest tensor of a network at a time; on a CPU, of its cache
BOUNDS = (1, 5, 50, 500, 5000)  # k of L_k
ACTIVE = 0.01  # variance of the posterior means over images from which on a unit is active (Burda et al. 2015)


class ImageFigures(NamedTuple):
    """Of each of n images, in nats, float64 on the CPU. A standard error is of the draws alone: by how much other draws
    of the same image would differ; infinite where there is one draw, or one group of them."""

    log_p: Tensor  # n
    log_p_error: Tensor  # n, by the delta method: of the mean weight, over that mean
    effective_draws: Tensor  # n, (sum w)^2 / sum w^2, from 1 to K: of few the log_p and its error are not to be trusted
    elbo: Tensor  # n
    elbo_error: Tensor  # n
    gap: Tensor  # n, log_p - elbo
    gap_error: Tensor  # n
    log_likelihood: Tensor  # n, E log p(x|z): minus the distortion
    log_likelihood_error: Tensor  # n
    kl: tuple[Tensor, ...]  # of each group, n parts: KL(q(z|x) || p(z)) as terms that add up, the rate
    bounds: dict[int, Tensor]  # L_k, n, by k
    bound_errors: dict[int, Tensor]  # likewise
    means: tuple[Tensor, ...]  # of each group, n numbers: the posterior means
    first_latents: tuple[Tensor, ...]  # of each group, n *shape, float32: the first draw
    first_log_prior: Tensor  # n, log p(z) of it
    first_log_posterior: Tensor  # n, log q(z|x) of it

    @property
    def total_kl(self) -> Tensor:
        return torch.stack([group.sum(-1) for group in self.kl]).sum(0)


class Mean(NamedTuple):
    """Over images."""

    value: float
    draws_error: float  # by how much it would differ by other draws of the same images' latents; nan: not known
    images_error: float  # by how much it would differ for as many other images, other draws included


def mean_of(values: Tensor, draws_errors: Tensor | None = None) -> Mean:
    """Of n numbers, one an image, and, where they are known, their standard errors, which are independent of each
    other."""
    count = len(values)
    of_draws = math.nan if draws_errors is None else float(draws_errors.square().sum().sqrt()) / count
    of_images = float(values.std()) / math.sqrt(count) if count > 1 else math.inf
    return Mean(float(values.mean()), of_draws, of_images)


@torch.inference_mode()
def judge(
    model: LikelihoodVAE,
    images: Tensor,
    numbers: Sequence[int],
    draws: int,
    seed: int = 0,
    *,
    bounds: Sequence[int] = BOUNDS,
    at_once: int | None = None,
) -> ImageFigures:
    """Figures of images, b c H W in [-1, 1], by `draws` draws of the latents of each.

    numbers: of the images, for their noise. bounds: k of L_k, of which those up to `draws` are computed, and `draws`
    itself; where each divides the next and the last `draws`, no L_k is below the one before it. at_once: images times
    draws in the network at a time; None: as many as `draws_at_once` says. Besides these, memory holds three numbers
    for each draw of the images at once.
    """
    at_once = at_once or draws_at_once(model, images)
    each = max(1, at_once // draws)  # images at once; of more draws than fit, one image
    parts = []
    for start in range(0, len(images), each):
        few = slice(start, start + each)
        parts.append(figures_of(model, images[few], numbers[few], draws, seed, bounds, at_once))
    return joined(parts)


def figures_of(
    model: LikelihoodVAE,
    images: Tensor,
    numbers: Sequence[int],
    draws: int,
    seed: int,
    bounds: Sequence[int],
    at_once: int,
) -> ImageFigures:
    """`judge` of images whose draws are held at once."""
    log_weights, elbo_draws, log_likelihoods = [], [], []
    kl: list[Tensor] = []
    first: Terms | None = None
    for terms in terms_of_draws(model, images, numbers, draws, seed, at_once):
        count = len(terms.log_likelihood)
        log_weights.append(terms.log_weights.double().cpu())
        elbo_draws.append(elbo_by_draw(terms).double().cpu())
        log_likelihoods.append(terms.log_likelihood.double().cpu())
        parts = [count * group.double().cpu() for group in terms.kl]
        kl = [before + now for before, now in zip(kl, parts, strict=True)] if kl else parts
        first = first or terms
    assert first is not None
    weights, elbos, log_likelihood = map(torch.cat, (log_weights, elbo_draws, log_likelihoods))  # K b each
    log_p, relative = log_mean_exp(weights), weights.softmax(dim=0) * draws  # w_k over their mean
    kept = sorted({k for k in bounds if k <= draws} | {1, draws})
    found = {k: grouped_bound(weights, k) for k in kept}
    return ImageFigures(
        log_p=log_p,
        log_p_error=error_of_mean(relative),
        effective_draws=draws**2 / relative.square().sum(0),
        elbo=elbos.mean(0),
        elbo_error=error_of_mean(elbos),
        gap=log_p - elbos.mean(0),
        gap_error=error_of_mean(relative - elbos),  # both go by the same draws: their errors cancel in part
        log_likelihood=log_likelihood.mean(0),
        log_likelihood_error=error_of_mean(log_likelihood),
        kl=tuple(group / draws for group in kl),
        bounds={k: bound for k, (bound, _) in found.items()},
        bound_errors={k: error for k, (_, error) in found.items()},
        means=tuple(means.double().cpu() for means in model.group_means(images)),
        first_latents=tuple(group[0].cpu() for group in first.latents),
        first_log_prior=torch.stack([part[0].sum(-1) for part in first.log_prior]).sum(0).double().cpu(),
        first_log_posterior=torch.stack([part[0].sum(-1) for part in first.log_posterior]).sum(0).double().cpu(),
    )


def joined(parts: Sequence[ImageFigures]) -> ImageFigures:
    """Figures of several batches as those of one."""

    def together(values: Sequence[object]) -> object:
        if isinstance(values[0], Tensor):
            return torch.cat([value for value in values if isinstance(value, Tensor)])
        if isinstance(values[0], dict):
            return {key: together([value[key] for value in values if isinstance(value, dict)]) for key in values[0]}
        assert isinstance(values[0], tuple)
        groups = zip(*(value for value in values if isinstance(value, tuple)), strict=True)
        return tuple(together(group) for group in groups)

    return ImageFigures(*(together(values) for values in zip(*parts, strict=True)))  # type: ignore[arg-type]


# ---- draws ----------------------------------------------------------------------------------------------------------


def terms_of_draws(
    model: LikelihoodVAE, images: Tensor, numbers: Sequence[int], draws: int, seed: int, at_once: int
) -> Iterator[Terms]:
    """The terms of `draws` draws of the latents of images, a chunk of draws of all of them after the other: images
    times draws of a chunk are at most `at_once`, or the number of images."""
    chunk = max(1, at_once // len(images))
    span = BLOCK * max(1, chunk // BLOCK)  # draws whose noise is held: whole blocks
    alone = model.noise_source(images[:1])
    for start in range(0, draws, span):
        noise = noise_of_draws(alone, numbers, range(start, min(start + span, draws)), seed, images.device)
        for part in noise.split(chunk):
            yield model(images, noise=part)


def noise_of_draws(alone: NoiseSource, numbers: Sequence[int], draws: range, seed: int, device: torch.device) -> Tensor:
    """Noise of the draws of such numbers, k b *shape, of the images of such numbers. alone: of one image.
    draws: from a multiple of `BLOCK` on."""
    generator = torch.Generator(device)
    of_images = []
    for number in numbers:
        blocks = [
            alone.noise(BLOCK, generator.manual_seed(mixed(seed, number, block)))
            for block in range(draws.start // BLOCK, math.ceil(draws.stop / BLOCK))
        ]
        of_images.append(torch.cat(blocks)[: len(draws)])
    return torch.cat(of_images, dim=1)


def mixed(*numbers: int) -> int:
    """A seed of generators, from 0 to 2^64, that is unlike that of other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@torch.inference_mode()
def draws_at_once(model: LikelihoodVAE, images: Tensor) -> int:
    """How many draws of one image's latents a network takes at a time with no tensor larger than `AT_ONCE`: what all
    its layers put out for one draw is looked at."""
    largest = 1

    def look(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel())

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        model(images[:1], draws=1)
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, AT_ONCE["cpu" if images.device.type == "cpu" else "other"] // largest)


# ---- of log-weights -------------------------------------------------------------------------------------------------


def elbo_by_draw(terms: Terms) -> Tensor:
    """k b: what the ELBO is the mean of over draws, with the KL of each group in closed form where there is one."""
    found = terms.log_likelihood
    for log_prior, log_posterior, exact in zip(terms.log_prior, terms.log_posterior, terms.exact_kl, strict=True):
        found = found - (log_posterior.sum(-1) - log_prior.sum(-1) if exact is None else exact.sum(-1))
    return found


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """`k ...` -> `...`"""
    return log_weights.logsumexp(dim=0) - math.log(len(log_weights))


def error_of_mean(values: Tensor) -> Tensor:
    """Standard error of the mean over the first axis, `k ...` -> `...`; infinite for one value."""
    if len(values) < 2:
        return torch.full_like(values[0], math.inf)
    return values.std(dim=0) / math.sqrt(len(values))


def grouped_bound(log_weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """L_k of each image, b, and its standard error, from K b log-weights: the mean over groups of k draws of the log of
    their mean weight, which is unbiased. Draws behind the last whole group are left out. The error of one group alone
    is that of the delta method."""
    groups = len(log_weights) // k
    if groups == 1:
        whole = log_weights[:k]
        return log_mean_exp(whole), error_of_mean(whole.softmax(dim=0) * k)
    bounds = log_mean_exp(log_weights[: groups * k].unflatten(0, (groups, k)).transpose(0, 1))  # groups b
    return bounds.mean(0), error_of_mean(bounds)


def active_units(means: Tensor) -> Tensor:
    """Which numbers of the latents are active, a mask: those whose posterior means, n numbers, vary over images by more
    than 0.01 (Burda et al. 2015, arXiv:1509.00519, section 5.2)."""
    if len(means) < 2:
        return torch.zeros(means.shape[1], dtype=torch.bool)
    return means.double().var(dim=0) > ACTIVE
