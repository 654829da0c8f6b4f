from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.gradient_estimators import ROWS, measure
from stage1_vae.gradients import (
    LearnedBaseline,
    RunningMean,
    baseline_loss,
    categorical_draws,
    gumbel_noise,
    gumbel_softmax,
    leave_one_out,
    score_function,
    straight_through,
    vimco,
)

DRAWS = 100_000


def within_errors(estimates: Tensor, exact: Tensor, errors: float = 4.0) -> bool:
    """Whether the mean of estimates, n ..., lies so many standard errors about the exact value at most."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    return bool(((estimates.mean(0) - exact).abs() < errors * error + 1e-12).all())


# ---- Gaussians ------------------------------------------------------------------------------------------------------


def quartic(z: Tensor) -> Tensor:
    """... 2 -> ...: with all the moments that a covariance shows in."""
    return z[..., 0] ** 4 + z[..., 0] * z[..., 1] ** 3 - z[..., 1] ** 2 + z[..., 0] * z[..., 1]


def expected_quartic(mean: Tensor, covariance: Tensor) -> Tensor:
    """In closed form, from Gaussian moments (Isserlis)."""
    (a, b), (aa, ab), (_, bb) = mean, covariance[0], covariance[1]
    fourth = a**4 + 6 * a**2 * aa + 3 * aa**2
    mixed = a * b**3 + 3 * a * b * bb + 3 * b**2 * ab + 3 * ab * bb
    return fourth + mixed - (b**2 + bb) + a * b + ab


@pytest.fixture
def gaussian() -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance, and draws without a graph."""
    mean = torch.tensor([0.4, -0.7], dtype=torch.float64)
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.8]], dtype=torch.float64)
    noise = torch.randn(DRAWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return mean, covariance, mean + noise @ torch.linalg.cholesky(covariance).T


def derivatives(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients n d and Hessians n d d."""
    return torch.vmap(torch.func.grad(function))(z), torch.vmap(torch.func.hessian(function))(z)


def test_bonnets_and_prices_identities(gaussian: tuple[Tensor, Tensor, Tensor]):
    """d E[f] / d mean = E[grad f], and d E[f] / d covariance = E[Hessian f] / 2."""
    mean, covariance, z = gaussian
    gradients, hessians = derivatives(quartic, z)
    by_mean, by_covariance = torch.func.grad(expected_quartic, argnums=(0, 1))(mean, covariance)
    assert within_errors(quartic(z), expected_quartic(mean, covariance))
    assert within_errors(gradients, by_mean)
    symmetric = 0.5 * (by_covariance + by_covariance.T)  # the closed form reads one of the two equal entries
    assert within_errors(0.5 * hessians, symmetric)
    assert not within_errors(hessians, symmetric)  # without the half


def test_the_score_function_has_the_same_means(gaussian: tuple[Tensor, Tensor, Tensor]):
    mean, covariance, z = gaussian
    by_mean, by_covariance = torch.func.grad(expected_quartic, argnums=(0, 1))(mean, covariance)
    means = mean.expand(DRAWS, 2).clone().requires_grad_()
    covariances = covariance.expand(DRAWS, 2, 2).clone().requires_grad_()
    log_density = torch.distributions.MultivariateNormal(means, covariances).log_prob(z)
    estimates = {}
    for baseline in (0.0, 0.8):
        surrogate = score_function(log_density, quartic(z), baseline)
        torch.testing.assert_close(surrogate, quartic(z))
        at_mean, at_covariance = torch.autograd.grad(surrogate.sum(), [means, covariances], retain_graph=True)
        assert within_errors(at_mean, by_mean)
        assert within_errors(at_covariance, 0.5 * (by_covariance + by_covariance.T))
        estimates[baseline] = at_mean
    assert not torch.equal(estimates[0.0], estimates[0.8])


def test_the_functions_own_gradient_stays():
    weight = torch.tensor(2.0, requires_grad=True)
    log_density = torch.zeros(3, 1, requires_grad=True)
    values = weight * torch.tensor([[1.0], [2.0], [3.0]])
    score_function(log_density, values, torch.tensor(1.0)).sum().backward()
    assert weight.grad == 6
    assert log_density.grad.flatten().tolist() == [1.0, 3.0, 5.0]


# ---- baselines ------------------------------------------------------------------------------------------------------


def test_a_draws_baseline_is_the_mean_of_the_others():
    values = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 8.0]])
    assert leave_one_out(values).tolist() == [[4.0, 6.5], [3.5, 6.5], [1.5, 5.0]]


def test_the_running_mean_knows_only_earlier_values():
    running = RunningMean(decay=0.5)
    assert running(torch.tensor([4.0, 6.0])) == 0
    assert running(torch.tensor([100.0])) == 5
    assert running(torch.tensor([0.0])) == pytest.approx((0.25 * 5 + 0.5 * 100) / 0.75)
    again = RunningMean(decay=0.5)
    again.load_state_dict(running.state_dict())
    assert again(torch.tensor([0.0])) == running(torch.tensor([0.0]))


def test_a_learned_baseline_comes_to_the_mean_value_of_each_input():
    torch.manual_seed(0)
    baseline, inputs = LearnedBaseline(1), torch.tensor([[-1.0], [1.0]])
    optimizer = torch.optim.Adam(baseline.parameters(), lr=0.02)
    values = torch.tensor([3.0, -5.0]) + torch.randn(64, 2)
    for _ in range(300):
        optimizer.zero_grad()
        baseline_loss(baseline(inputs), values).backward()
        optimizer.step()
    torch.testing.assert_close(baseline(inputs), values.mean(0), rtol=0.05, atol=0.05)


# ---- categories -----------------------------------------------------------------------------------------------------

CATEGORIES = 3
TABLE = torch.tensor([0.3, -1.2, 2.5], dtype=torch.float64)


@pytest.fixture
def logits() -> Tensor:
    return torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64)


def exact_gradient(logits: Tensor, count: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Of E[function of `count` independent choices], by all of them: function of choices, count -> scalar."""
    logits = logits.clone().requires_grad_()
    log_probabilities = logits.log_softmax(0)
    total = sum(
        log_probabilities[list(choice)].sum().exp() * function(torch.tensor(choice))
        for choice in itertools.product(range(CATEGORIES), repeat=count)
    )
    return torch.autograd.grad(total, logits)[0]


def mean_estimate(logits: Tensor, count: int, surrogate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of an estimate over all choices of `count` draws; surrogate: of log densities k 1 and choices k."""
    total = torch.zeros_like(logits)
    for choice in itertools.product(range(CATEGORIES), repeat=count):
        leaf = logits.clone().requires_grad_()
        log_probabilities = leaf.log_softmax(0)
        chosen = torch.tensor(choice)
        (found,) = torch.autograd.grad(surrogate(log_probabilities[chosen].unsqueeze(1), chosen).sum(), leaf)
        total += log_probabilities[chosen].sum().exp().detach() * found
    return total


def test_the_score_function_of_categories_is_unbiased_exactly(logits: Tensor):
    exact = exact_gradient(logits, 1, lambda choice: TABLE[choice].sum())
    for baseline in (0.0, 0.7):
        found = mean_estimate(logits, 1, lambda log_q, c, b=baseline: score_function(log_q, TABLE[c].unsqueeze(1), b))
        torch.testing.assert_close(found, exact)

    def others(log_q: Tensor, choice: Tensor) -> Tensor:
        values = TABLE[choice].unsqueeze(1)
        return score_function(log_q, values, leave_one_out(values)).mean(0)

    torch.testing.assert_close(mean_estimate(logits, 3, others), exact)


def test_vimco_is_unbiased_for_the_bound_exactly(logits: Tensor):
    """Of weights p(x, z) / q(z), which depend on q as well."""

    def bound(choice: Tensor, log_q: Tensor) -> Tensor:
        return (TABLE[choice] - log_q).logsumexp(0) - math.log(len(choice))

    for count in (2, 3):
        leaf = logits.clone().requires_grad_()
        log_probabilities = leaf.log_softmax(0)
        total = sum(
            log_probabilities[list(choice)].sum().exp() * bound(torch.tensor(choice), log_probabilities[list(choice)])
            for choice in itertools.product(range(CATEGORIES), repeat=count)
        )
        (exact,) = torch.autograd.grad(total, leaf)
        found = mean_estimate(logits, count, lambda log_q, c: vimco(log_q, TABLE[c].unsqueeze(1) - log_q))
        torch.testing.assert_close(found, exact)


def test_vimcos_value_is_the_bound_and_its_signals_are_the_papers():
    log_weights = torch.tensor([[0.1, 2.0], [-1.0, 0.5], [0.7, -3.0]], dtype=torch.float64)
    log_density = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    surrogate = vimco(log_density, log_weights)
    torch.testing.assert_close(surrogate, log_weights.exp().mean(0).log())
    (signal,) = torch.autograd.grad(surrogate.sum(), log_density)
    for b in range(2):
        for k in range(3):
            others = [log_weights[j, b].item() for j in range(3) if j != k]
            weights = [math.exp(other) for other in others] + [math.exp(sum(others) / 2)]
            expected = surrogate[b].item() - math.log(sum(weights) / 3)
            assert signal[k, b].item() == pytest.approx(expected)


def test_draws_have_the_probabilities_and_log_densities_of_the_logits(logits: Tensor):
    one_hot, log_density = categorical_draws(logits.expand(2, -1), DRAWS, torch.Generator().manual_seed(0))
    assert one_hot.shape == (DRAWS, 2, CATEGORIES)
    assert within_errors(one_hot, logits.softmax(0).expand(2, -1))
    torch.testing.assert_close(log_density, (one_hot * logits.log_softmax(0)).sum(-1))


def test_straight_through_has_the_gradient_of_probabilities(logits: Tensor):
    leaf = logits.unsqueeze(0).requires_grad_()
    drawn = straight_through(leaf, 50, torch.Generator().manual_seed(0))
    assert set(drawn.detach().round(decimals=9).flatten().tolist()) == {0.0, 1.0}
    (found,) = torch.autograd.grad((drawn @ TABLE).mean(), leaf)
    (expected,) = torch.autograd.grad((leaf.softmax(-1) @ TABLE).sum(), leaf)
    torch.testing.assert_close(found, expected)  # f is linear here, and so it is even exact
    torch.testing.assert_close(found[0], exact_gradient(logits, 1, lambda choice: TABLE[choice].sum()))


def test_gumbel_softmax_chooses_as_the_logits_say_and_is_colder_the_nearer(logits: Tensor):
    leaf = logits.unsqueeze(0).requires_grad_()
    noise = gumbel_noise((DRAWS, 1, CATEGORIES), logits, torch.Generator().manual_seed(0))
    assert within_errors(noise.flatten(), torch.tensor(0.5772156649015329))
    hard = gumbel_softmax(leaf, noise, 0.5, hard=True)
    assert within_errors(hard.detach()[:, 0], logits.softmax(0))
    relaxed = gumbel_softmax(leaf, noise, 0.5)
    for one in (hard, relaxed):
        torch.testing.assert_close(one.sum(-1), torch.ones(DRAWS, 1, dtype=torch.float64))
    gradients = [torch.autograd.grad((one @ TABLE).mean(), leaf, retain_graph=True)[0] for one in (hard, relaxed)]
    torch.testing.assert_close(*gradients)
    exact = exact_gradient(logits, 1, lambda choice: (TABLE[choice] ** 2).sum())

    def bias(temperature: float) -> float:
        relaxed = gumbel_softmax(leaf, noise, temperature)
        return float((torch.autograd.grad(((relaxed @ TABLE) ** 2).mean(), leaf)[0][0] - exact).norm())

    assert bias(0.1) < 0.5 * bias(0.5) < 0.5 * bias(2.0)


@pytest.mark.parametrize(("problem", "name", "estimator", "draws", "unbiased"), ROWS)
def test_estimators_on_one_problem_are_unbiased_or_found_to_be_biased(problem, name, estimator, draws, unbiased):
    """The benchmark's, of 100,000 draws."""
    _, error, variance, _ = measure(problem, estimator, draws, DRAWS)
    assert (error < 4) == unbiased
    if "running" in name or "learned" in name or "other" in name or name == "VIMCO":
        plain = next(row for row in ROWS if row[:2] == (problem, "score function"))
        assert variance < measure(problem, plain[2], plain[3], DRAWS)[2]
