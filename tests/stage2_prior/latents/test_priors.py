"""What all priors over latents share, and the densities of each."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from codes.latents import LatentSpec
from common.errors import UserError
from common.expectation_maximisation import Mixture, fit_mixture, improved
from common.model_io import load_pretrained
from common.processes import process_state
from stage2_prior.latents import (
    LATENT_PRIORS,
    GaussianMixture,
    GaussianMixtureConfig,
    LatentPriorModel,
    MaskedAutoregressiveFlow,
    MaskedAutoregressiveFlowConfig,
    SecondVAE,
    SecondVAEConfig,
)
from tests.golden import GoldenVAE, golden_vae
from tests.processes import Processes


def spec(*shape: int) -> LatentSpec:
    return LatentSpec(shape, True, 8, 8, 1)


CONFIGS: dict[str, Any] = {
    "gaussian_mixture": GaussianMixtureConfig(components=3, iterations=4),
    "diagonal": GaussianMixtureConfig(components=3, covariance="diagonal", iterations=4),
    "masked_autoregressive_flow": MaskedAutoregressiveFlowConfig(layers=2, hidden=(9, 7)),
    "batch_norm": MaskedAutoregressiveFlowConfig(layers=2, hidden=(9,), batch_norm=True, activation="tanh"),
    "second_vae": SecondVAEConfig(hidden=(8,), draws=3000),
}


def prior_of(name: str, *shape: int) -> LatentPriorModel:
    """With weights, statistics and a standardisation that are none of those at the start."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    prior = LATENT_PRIORS[config.kind](config, spec(*shape), "abc")
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if isinstance(prior, SecondVAE):  # draws near those of p(u), which make a bound that is tight
            prior.encoder.layers[-1].weight.mul_(0.1)
            prior.encoder.layers[-1].bias.copy_((torch.arange(2 * prior.width) >= prior.width) * 0.5)
        prior.shift.copy_(torch.linspace(-1, 1, prior.latent_spec.size))
        prior.scale.copy_(torch.linspace(0.5, 1.5, prior.latent_spec.size))
        for name_of, buffer in prior.named_buffers():
            if "running" in name_of:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return prior.eval()


def latents(count: int, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))


def test_every_kind_is_here():
    assert {config.kind for config in CONFIGS.values()} == LATENT_PRIORS.keys()
    for kind, prior in LATENT_PRIORS.items():
        assert kind == prior.kind == prior.config_class.kind


def on_a_grid(prior: LatentPriorModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Points n 2 all over the plane, and the density there times the area that each stands for."""
    axis = torch.linspace(-12, 12, 200 if prior.exact else 60)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        densities = torch.cat([prior.log_density(part) for part in grid.split(400)]).exp()
    return grid, densities * (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("name", CONFIGS)
def test_densities_integrate_to_one(name: str):
    prior = prior_of(name, 2)
    # an estimate by draws is as exact as their number allows
    assert float(on_a_grid(prior)[1].sum()) == pytest.approx(1, abs=2e-3 if prior.exact else 5e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_draws_have_the_moments_of_the_density(name: str):
    prior, count = prior_of(name, 2), 40_000
    grid, shares = on_a_grid(prior)
    z = prior.sample(count, torch.Generator().manual_seed(1))
    assert z.shape == (count, 2)
    for function in (lambda x: x, lambda x: x.square(), lambda x: x.prod(1, keepdim=True)):
        expected, found = (shares[:, None] * function(grid)).sum(0), function(z)
        error = found.std(0) / math.sqrt(count)
        allowed = 4 * error + (0.01 if prior.exact else 0.08) * function(grid.abs()).mul(shares[:, None]).sum(0)
        assert ((found.mean(0) - expected).abs() < allowed).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_training_minimises_the_negative_log_density(name: str):
    prior, z = prior_of(name, 3), latents(5, 3)
    torch.manual_seed(0)
    loss = torch.stack([prior(z) for _ in range(1 if prior.exact else 500)])
    if prior.exact:
        torch.testing.assert_close(loss[0], -prior.log_density(z))
    else:  # an ELBO lies below the importance-weighted bound
        assert (loss.mean(0) > -prior.log_density(z)).all()
    loss.mean().backward()
    for own, parameter in prior.named_parameters():
        assert parameter.grad is not None, own
        assert parameter.grad.abs().sum() > 0, own


@pytest.mark.parametrize("name", CONFIGS)
def test_maps_are_vectors_with_a_shape(name: str):
    flat, prior = prior_of(name, 12), prior_of(name, 3, 2, 2)
    z = latents(4, 3, 2, 2)
    torch.testing.assert_close(prior.log_density(z), flat.log_density(z.flatten(1)))
    assert prior.sample(5).shape == (5, 3, 2, 2)
    with pytest.raises(UserError, match=r"got latents of shape \(12,\), expected 3x2x2 latents"):
        prior.log_density(z.flatten(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_folder_gives_the_same_prior(name: str, tmp_path):
    prior = prior_of(name, 3)
    again = load_pretrained(prior.save_pretrained(tmp_path / "model"), LATENT_PRIORS)
    assert again.fingerprint() == prior.fingerprint()
    assert (again.stage1_fingerprint, again.latent_spec) == ("abc", spec(3))
    torch.testing.assert_close(again.log_density(latents(4, 3)), prior.log_density(latents(4, 3)))


@pytest.mark.parametrize("name", CONFIGS)
def test_standardisation_changes_numbers_and_no_density(name: str):
    prior = prior_of(name, 3)
    plain = copy.deepcopy(prior)
    plain.shift.zero_()
    plain.scale.fill_(1)
    z = latents(6, 3)
    expected = plain.log_density((z - prior.shift) / prior.scale) - prior.scale.log().sum()
    torch.testing.assert_close(prior.log_density(z), expected)
    generators = (torch.Generator().manual_seed(2) for _ in range(2))
    one, other = (of.sample(9, generator) for of, generator in zip((prior, plain), generators, strict=True))
    torch.testing.assert_close(one, other * prior.scale + prior.shift)


def test_numbers_that_hardly_vary_are_not_blown_up():
    prior = MaskedAutoregressiveFlow(MaskedAutoregressiveFlowConfig(layers=1, hidden=()), spec(3))
    prior.start(torch.zeros(3), torch.tensor([4.0, 1.0, 0.0]), latents(5, 3))
    torch.testing.assert_close(prior.scale, torch.tensor([2.0, 1.0, 2e-4]))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_mixture_is_the_sum_of_its_gaussians(covariance: str):
    prior = prior_of("gaussian_mixture" if covariance == "full" else "diagonal", 4)
    assert isinstance(prior, GaussianMixture)
    prior.shift.zero_()
    prior.scale.fill_(1)
    z = latents(7, 4).double()
    with torch.no_grad():
        weights = prior.logits.double().softmax(0)
        scales = prior.log_scales.double().exp()
        densities = []
        for k in range(3):
            factor = torch.diag(scales[k])
            if covariance == "full":
                factor = factor + prior.lower[k].double().tril(-1)
            gaussian = torch.distributions.MultivariateNormal(prior.means[k].double(), factor @ factor.T)
            densities.append(weights[k] * gaussian.log_prob(z).exp())
        torch.testing.assert_close(prior.log_density(z.float()).double(), sum(densities).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_expectation_maximisation_never_loses_likelihood(covariance: Any):
    torch.manual_seed(0)
    centres = torch.randn(5, 3) * 3
    z = centres[torch.randint(5, (2000,))] + torch.randn(2000, 3) * torch.tensor([0.3, 1.0, 0.1])
    _, history = fit_mixture(z, 5, covariance, 60, 1e-6)
    assert len(history) == 61
    assert all(after >= before - 1e-9 for before, after in pairwise(history))
    assert history[-1] > history[0] + 0.5


def test_expectation_maximisation_finds_the_mixture():
    torch.manual_seed(1)
    means = torch.tensor([[-4.0, 0.0], [4.0, 4.0], [4.0, -4.0]])
    factors = torch.tensor([[[1.0, 0], [0.8, 0.5]], [[0.5, 0], [0, 0.5]], [[1.5, 0], [-1.0, 1.0]]])
    which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 30_000, replacement=True)
    z = means[which] + (factors[which] @ torch.randn(30_000, 2, 1)).squeeze(2)
    found, _ = fit_mixture(z, 3, "full", 100, 1e-3)
    order = [int((found.means - mean).square().sum(1).argmin()) for mean in means]
    assert sorted(order) == [0, 1, 2]
    torch.testing.assert_close(found.means[order].float(), means, atol=0.05, rtol=0)
    torch.testing.assert_close(found.log_weights.exp()[order].float(), torch.tensor([0.5, 0.3, 0.2]), atol=0.01, rtol=0)
    torch.testing.assert_close(found.factors[order].float(), factors, atol=0.06, rtol=0)


def test_an_iteration_is_that_of_the_text_book():
    """Of responsibilities, with plain loops over vectors and components."""
    torch.manual_seed(2)
    z = torch.randn(40, 2, dtype=torch.float64)
    before = Mixture(
        torch.tensor([0.3, 0.7]).double().log(), torch.randn(2, 2).double(), torch.eye(2).double().repeat(2, 1, 1)
    )
    after, _ = improved(before, z, 0.0)
    for k in range(2):
        shares = torch.stack([row.softmax(0)[k] for row in before.log_densities(z)])
        mean = sum(share * one for share, one in zip(shares, z, strict=True)) / shares.sum()
        spread = sum(share * torch.outer(one - mean, one - mean) for share, one in zip(shares, z, strict=True))
        torch.testing.assert_close(after.means[k], mean)
        torch.testing.assert_close(after.factors[k] @ after.factors[k].T, spread / shares.sum())
        torch.testing.assert_close(after.log_weights[k].exp(), shares.mean())


def test_a_component_of_nothing_stays_where_it_is():
    z = torch.randn(50, 2, dtype=torch.float64)
    far = Mixture(
        torch.tensor([0.5, 0.5]).double().log(),
        torch.tensor([[0.0, 0.0], [1e3, 1e3]]).double(),
        torch.eye(2).double().repeat(2, 1, 1),
    )
    after, _ = improved(far, z, 1e-3)
    assert after.means[1].tolist() == [1e3, 1e3]
    assert all(part.isfinite().all() for part in after)


def test_as_many_components_as_numbers_are_no_matrices():
    """Variances K d with K = d are not taken for a covariance."""
    mixture, _ = fit_mixture(latents(100, 4), 4, "diagonal", 3, 1e-3)
    assert mixture.factors.shape == (4, 4)
    assert (mixture.factors > 0).all()


def test_a_mixture_starts_from_the_latents():
    torch.manual_seed(0)
    data = torch.cat([latents(500, 2) * 0.1 - 3, latents(500, 2) * 0.1 + 3])
    prior = GaussianMixture(GaussianMixtureConfig(components=2, iterations=30), spec(2))
    before = prior.log_density(data).mean()
    prior.start(data.mean(0), data.var(0), data)
    # two clouds of scale 0.1 in two dimensions, one bit between them
    entropy = math.log(2) + 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.1))
    assert before < -4
    assert float(-prior.log_density(data).mean().detach()) == pytest.approx(entropy, abs=0.1)
    with pytest.raises(UserError, match="components=2 for 1 training images"):
        prior.start(data.mean(0), data.var(0), data[:1])


@pytest.mark.parametrize("name", ["masked_autoregressive_flow", "batch_norm"])
def test_a_flow_inverts(name: str):
    prior = prior_of(name, 6)
    assert isinstance(prior, MaskedAutoregressiveFlow)
    z = latents(20, 6)
    with torch.no_grad():
        noise, log_determinant = prior.to_noise(z)
        torch.testing.assert_close(prior.from_noise(noise), z, atol=1e-5, rtol=1e-5)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: prior.to_noise(one[None])[0][0]))(z)
    torch.testing.assert_close(jacobian.slogdet().logabsdet, log_determinant, atol=1e-5, rtol=1e-5)
    assert (noise - z).abs().mean() > 0.1


def test_batch_norm_whitens_by_the_batch_and_remembers():
    prior = prior_of("batch_norm", 4)
    assert isinstance(prior, MaskedAutoregressiveFlow)
    step: Any = prior.steps[1]
    before, z = step.running_mean.clone(), latents(64, 4) * 3 + 1
    prior.train()
    out, _ = step(z)
    torch.testing.assert_close(out.mean(0), step.shift.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0), step.log_factor.exp().detach(), atol=1e-3, rtol=0)
    assert torch.equal(step.running_mean, before)  # a forward pass moves nothing
    prior.forget()
    prior.update()
    assert torch.equal(step.running_mean, before)
    step(z)
    step(z + 2)
    prior.update()
    torch.testing.assert_close(step.running_mean, 0.9 * before + 0.1 * (z.mean(0) + 1))
    prior.eval()
    assert step(z[:1])[0].isfinite().all()


def whitened(parts: int, folder: Path) -> None:
    """The gradient of a mean over a batch, of which this process has one of `parts`."""
    state = process_state()
    prior = prior_of("batch_norm", 4)
    z = (torch.linspace(-1, 1, 24).view(6, 4).cos() * 3)[state.process_index :: parts].requires_grad_()
    density = prior.train().log_density(z)
    (gradient,) = torch.autograd.grad(density.sum(), z)
    torch.save([density.detach(), gradient], folder / f"{parts}_{state.process_index}.pt")


def test_batch_norm_whitens_by_the_batch_of_all_processes(processes: Processes, tmp_path: Path):
    whitened(1, tmp_path)
    processes.together(whitened, 2, tmp_path)
    for number, whole in enumerate(torch.load(tmp_path / "1_0.pt")):
        for part in (0, 1):
            torch.testing.assert_close(torch.load(tmp_path / f"2_{part}.pt")[number], whole[part::2])


def test_the_bound_of_a_second_vae_rises_with_draws():
    z, bounds = latents(500, 3), []
    for draws in (1, 10, 1000):
        prior = prior_of("second_vae", 3)
        prior.config = SecondVAEConfig(hidden=(8,), draws=draws)
        with torch.no_grad():
            bounds.append(float(prior.log_density(z).mean()))
    assert bounds[0] < bounds[1] < bounds[2]


def test_a_linear_second_vae_has_the_density_of_its_gaussian():
    """Without hidden layers p(z) = N(b, W W^T + scale^2 I); by the exact posterior every bound is exact."""
    torch.manual_seed(0)
    prior = SecondVAE(SecondVAEConfig(hidden=(), draws=1), spec(3))
    weight, bias = prior.decoder.layers[0].weight.data, prior.decoder.layers[0].bias.data
    weight.copy_(torch.linalg.qr(torch.randn(3, 3))[0] @ torch.diag(torch.tensor([2.0, 1.0, 0.5])))
    prior.log_scale.data.fill_(math.log(0.6))
    precision = weight.T @ weight / 0.36 + torch.eye(3)  # diagonal, as the columns are orthogonal
    prior.encoder.layers[0].weight.data[:3] = precision.inverse() @ weight.T / 0.36
    prior.encoder.layers[0].bias.data[:3] = -precision.inverse() @ weight.T / 0.36 @ bias
    prior.encoder.layers[0].weight.data[3:] = 0
    prior.encoder.layers[0].bias.data[3:] = -precision.diagonal().log()
    exact = torch.distributions.MultivariateNormal(bias, weight @ weight.T + 0.36 * torch.eye(3))
    z = latents(6, 3)
    with torch.no_grad():
        torch.testing.assert_close(prior.log_density(z), exact.log_prob(z), atol=1e-4, rtol=1e-4)
        losses = torch.stack([prior(z) for _ in range(1000)])  # each estimates its likelihood term by one draw
    assert ((losses.mean(0) + exact.log_prob(z)).abs() < 4 * losses.std(0) / 1000**0.5).all()


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (GaussianMixtureConfig, {"components": 0}, "components=0"),
        (GaussianMixtureConfig, {"iterations": -1}, "iterations=-1"),
        (GaussianMixtureConfig, {"smallest_scale": 0.0}, "smallest_scale=0.0"),
        (MaskedAutoregressiveFlowConfig, {"layers": 0}, "layers=0"),
        (MaskedAutoregressiveFlowConfig, {"hidden": (3, 0)}, "hidden="),
        (SecondVAEConfig, {"latents": 0}, "latents=0"),
        (SecondVAEConfig, {"hidden": (0,)}, "hidden="),
        (SecondVAEConfig, {"draws": 0}, "draws=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config: Any, fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        config(**fields)


def published_flow(reference: GoldenVAE, name: str) -> MaskedAutoregressiveFlow:
    """pythae's MAF with its weights, whose scales and factors are the same numbers, in steps of the same order."""
    batch_norm = name == "maf_bn"
    layers = reference.config["blocks"]
    hidden = (reference.config["hidden"],) * (1 if batch_norm else 2)
    config = MaskedAutoregressiveFlowConfig(layers=layers, hidden=hidden, batch_norm=batch_norm)
    flow = MaskedAutoregressiveFlow(config, spec(reference.config["dim"]))
    state = {}
    for number, step in enumerate(flow.steps):
        theirs = f"{name}.net.{number}"
        if batch_norm and number % 2:
            names = {"log_factor": "log_gamma", "shift": "beta", "running_variance": "running_var"}
            for own in ("log_factor", "shift", "running_mean", "running_variance"):
                state[f"steps.{number}.{own}"] = reference.weights[f"{theirs}.{names.get(own, own)}"]
            continue
        for place in range(len(step.network.layers)):
            layer = f"{theirs}.net.{2 * place}"
            step.network.layers[place].mask = reference.weights[f"{layer}.mask"]  # random numbers, as the weights are
            for part in ("weight", "bias"):
                state[f"steps.{number}.network.layers.{place}.{part}"] = reference.weights[f"{layer}.{part}"]
    missing, unknown = flow.load_state_dict(state, strict=False)
    assert set(missing) == {"shift", "scale"}
    assert not unknown
    return flow.eval()


@pytest.mark.parametrize("name", ["maf", "maf_bn"])
def test_golden_flows(name: str):
    reference = golden_vae("pythae_flow_modules")
    flow, x = published_flow(reference, name), reference.inputs["x"]
    with torch.no_grad():
        noise, log_determinant = flow.to_noise(x)
        reference.check(f"{name}/forward/out", noise)
        reference.check(f"{name}/forward/log_det", log_determinant)
        reference.check(f"{name}/inverse/out", flow.from_noise(x))  # by masks of an order it would be the inverse


def test_golden_batch_norm_in_training():
    reference = golden_vae("pythae_flow_modules")
    flow = published_flow(reference, "maf_bn").train()
    with torch.no_grad():
        noise, log_determinant = flow.to_noise(reference.inputs["x"])
        reference.check("maf_bn/train/out", noise)
        reference.check("maf_bn/train/log_det", log_determinant)
    flow.update()  # theirs moves its averages by a tenth of that
    for number in (1, 3):
        for own, theirs in (("running_mean", "running_mean"), ("running_variance", "running_var")):
            reference.check(f"maf_bn/train/after/net.{number}.{theirs}", getattr(flow.steps[number], own))
