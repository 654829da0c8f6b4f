"""Correlated Gaussian posteriors against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from stage1_vae.posteriors import (
    FullCovariance,
    FullCovarianceConfig,
    Posterior,
    RankOne,
    RankOneConfig,
    build_posterior,
)

BATCH, D = 3, 7
CLASSES = {"full_covariance": FullCovariance, "rank_one": RankOne}
KINDS = sorted(CLASSES)


def parameters(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"full_covariance": [(D,), (D,), (D, D)], "rank_one": [(D,), (D,), (D,)]}[kind]
    return [torch.randn(BATCH, *shape, generator=generator) for shape in shapes]


def dense(kind: str, mean: Tensor, log_scale: Tensor, third: Tensor) -> MultivariateNormal:
    """The same distribution by its whole covariance matrix, whose Cholesky factor is of our sign and shape."""
    scale = torch.diag_embed(log_scale.exp())
    if kind == "full_covariance":
        factor = third.tril(-1) + scale
        covariance = factor @ factor.mT
    else:
        covariance = torch.linalg.inv(torch.linalg.inv(scale @ scale) + third[..., :, None] * third[..., None, :])
    return MultivariateNormal(mean, covariance)


def noise(count: int = 4) -> Tensor:
    return torch.randn(count, BATCH, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_and_densities_are_those_of_dense_matrices(kind: str):
    given = parameters(kind)
    posterior, reference = CLASSES[kind](*given), dense(kind, *(part.double() for part in given))
    latents, log_density = posterior.draw(noise())
    expected = reference.mean + torch.einsum("bij,kbj->kbi", reference.scale_tril, noise().double())
    torch.testing.assert_close(latents.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_density.sum(-1).double(), reference.log_prob(expected), rtol=1e-5, atol=1e-5)
    elsewhere = torch.randn(4, BATCH, D, generator=torch.Generator().manual_seed(3))
    exact = CLASSES[kind](*(part.double() for part in given)).log_density(elsewhere.double()).sum(-1)
    torch.testing.assert_close(exact, reference.log_prob(elsewhere.double()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.log_density(elsewhere).sum(-1).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_log_determinants_are_those_of_dense_matrices(kind: str):
    given = parameters(kind)
    posterior, reference = CLASSES[kind](*given), dense(kind, *(part.double() for part in given))
    at_the_mean = posterior.log_density(posterior.mean[None]).sum(-1)[0].double()
    log_determinant = -2 * at_the_mean - D * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(log_determinant, torch.logdet(reference.covariance_matrix), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_conditional_densities(kind: str):
    """The sum of the first i terms is the density of the first i numbers."""
    given = [part.double() for part in parameters(kind)]
    reference = dense(kind, *given)
    latents, terms = CLASSES[kind](*given).draw(noise().double())
    for i in range(1, D + 1):
        part = MultivariateNormal(reference.mean[:, :i], reference.covariance_matrix[:, :i, :i])
        torch.testing.assert_close(terms[..., :i].sum(-1), part.log_prob(latents[..., :i]))


@pytest.mark.parametrize("kind", KINDS)
def test_closed_kl_is_that_of_dense_matrices(kind: str):
    given = parameters(kind)
    reference = dense(kind, *(part.double() for part in given))
    standard = MultivariateNormal(torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64))
    expected = torch.distributions.kl_divergence(reference, standard)
    closed = CLASSES[kind](*given).kl_to_standard_normal()
    torch.testing.assert_close(closed.sum(-1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["draws", "density", "kl"])
def test_gradients_are_those_of_dense_matrices(kind: str, of: str):
    standard = MultivariateNormal(torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64))

    def ours(posterior: Posterior) -> Tensor:
        if of == "draws":
            latents, log_density = posterior.draw(noise().to(posterior.mean))
            return latents.sin().sum() + (log_density.sum(-1) ** 2).sum()
        if of == "density":
            return (posterior.log_density(noise().to(posterior.mean)).sum(-1) ** 2).sum()
        return (posterior.kl_to_standard_normal().sum(-1) ** 2).sum()

    def theirs(reference: MultivariateNormal) -> Tensor:
        if of == "draws":
            latents = reference.mean + torch.einsum("bij,kbj->kbi", reference.scale_tril, noise().double())
            return latents.sin().sum() + (reference.log_prob(latents) ** 2).sum()
        if of == "density":
            return (reference.log_prob(noise().double()) ** 2).sum()
        return (torch.distributions.kl_divergence(reference, standard) ** 2).sum()

    exact = [part.double().requires_grad_() for part in parameters(kind)]
    expected = torch.autograd.grad(theirs(dense(kind, *exact)), exact)
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        given = [part.to(dtype).requires_grad_() for part in parameters(kind)]
        for ours_, theirs_ in zip(torch.autograd.grad(ours(CLASSES[kind](*given)), given), expected, strict=True):
            torch.testing.assert_close(ours_.double(), theirs_, rtol=near, atol=near * float(theirs_.abs().max()))


def test_a_rank_one_precision_of_zero_is_mean_field():
    mean, log_scale, direction = parameters("rank_one")
    mean_field = FullCovariance(mean, log_scale, torch.zeros(BATCH, D, D))
    rank_one = RankOne(mean, log_scale, torch.zeros_like(direction))
    torch.testing.assert_close(rank_one.draw(noise()), mean_field.draw(noise()))
    torch.testing.assert_close(rank_one.kl_to_standard_normal(), mean_field.kl_to_standard_normal())


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_a_rank_one_precision_of_any_size_is_stable(size: float):
    mean, log_scale, direction = parameters("rank_one")
    given = [part.double() for part in (mean, log_scale, size * direction)]
    exact, ours = RankOne(*given), RankOne(*(part.float() for part in given))
    torch.testing.assert_close(ours.draw(noise()).latents.double(), exact.draw(noise()).latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.draw(noise()).log_density.double(), exact.draw(noise()).log_density, rtol=1e-5, atol=1e-5
    )


class Sizes(TorchDispatchMode):
    """Notes how many numbers the largest result of an operation has."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return result


def test_a_rank_one_precision_takes_memory_linear_in_d():
    d = 100_000
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, d, generator=generator).mul_(0.3).requires_grad_() for _ in range(3)]
    with Sizes() as sizes:
        posterior = RankOne(*given)
        latents, drawn = posterior.draw(posterior.noise(2, generator))
        again, kl = posterior.log_density(latents), posterior.kl_to_standard_normal()
        (drawn.sum() + again.sum() + kl.sum()).backward()
    assert sizes.largest <= 2 * 2 * d
    assert all(torch.isfinite(part.grad).all() for part in given)
    torch.testing.assert_close(drawn, again, rtol=1e-4, atol=1e-3)
    log_determinant = 2 * given[1].double().sum(-1)
    v = given[2].double() * given[1].double().exp()
    log_determinant = log_determinant - torch.log1p(v.square().sum(-1))
    at_the_mean = posterior.log_density(posterior.mean[None]).double().sum(-1)[0]
    expected = -0.5 * (log_determinant + d * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)))
    torch.testing.assert_close(at_the_mean, expected, rtol=1e-5, atol=1e-5)


def test_a_rank_one_precision_over_maps_is_that_of_their_numbers():
    shape = (2, 3, 4)
    features = torch.randn(BATCH, 6, 3, 4, generator=torch.Generator().manual_seed(4))
    posterior = build_posterior(RankOneConfig(), shape)(features)
    flat = RankOne(*(part.flatten(1) for part in (features[:, :2], 0.5 * features[:, 2:4], features[:, 4:])))
    noise = posterior.noise(5)
    assert noise.shape == (5, BATCH, *shape)
    torch.testing.assert_close(posterior.draw(noise).latents.flatten(2), flat.draw(noise.flatten(2)).latents)
    torch.testing.assert_close(posterior.without_gradient().log_density(noise), flat.log_density(noise.flatten(2)))


def test_full_covariance_has_no_maps():
    with pytest.raises(UserError, match=r"kind=full_covariance for latents of the shape \(2, 3, 4\)"):
        build_posterior(FullCovarianceConfig(), (2, 3, 4))


@pytest.mark.parametrize("config", [FullCovarianceConfig, RankOneConfig])
def test_a_negative_smallest_scale_is_refused(config: type):
    with pytest.raises(UserError, match=r"smallest_scale=-1, expected 0 or more"):
        config(smallest_scale=-1)
