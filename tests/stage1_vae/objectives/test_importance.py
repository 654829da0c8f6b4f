from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import ImportanceConfig
from stage1_vae.objectives.importance import combined_bound, effective_draws, importance_bound, normalised_weights
from stage1_vae.objectives.terms import elbo
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.objectives.reference import objective

K, M, IMAGES = 3, 2, 4


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    small = DenseConfig(hidden=(7,), activation="tanh")
    return VAE(VAEConfig(latents=2, encoder=small, decoder=small), (3, 3))


def binary_images(count: int = IMAGES) -> Tensor:
    return torch.randint(0, 2, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def noise_of(model: VAE, draws: int, count: int = IMAGES) -> Tensor:
    return torch.randn(draws, count, *model.shape, generator=torch.Generator().manual_seed(2))


def gradients(loss: Tensor, model: VAE) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, weights, found, strict=True)}


def assert_gradients(
    found: dict[str, Tensor], of_inference: dict[str, Tensor], of_generator: dict[str, Tensor]
) -> None:
    for name, value in found.items():
        expected = of_inference if name.startswith("encoder") else of_generator
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def slow_bound(log_weights: Tensor) -> Tensor:
    """log of the mean of weights, b, one image and draw after the other."""
    rows = []
    for b in range(log_weights.shape[1]):
        total = sum((log_weights[k, b].double().exp() for k in range(len(log_weights))), torch.zeros(()).double())
        rows.append((total / len(log_weights)).log())
    return torch.stack(rows).float()


def miwae(log_weights: Tensor) -> Tensor:
    """Draws are numbered k M + m."""
    return torch.stack([slow_bound(log_weights[m::M]) for m in range(M)]).mean(0)


BOUNDS: list[tuple[dict[str, Any], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    ({"draws": 1}, lambda w: w.mean(0), lambda w: w.mean(0)),
    ({"draws": K}, slow_bound, slow_bound),
    ({"draws": K, "estimates": M}, miwae, miwae),
    ({"draws": K, "elbo_share": 0.3}, *[lambda w: 0.3 * w.mean(0) + 0.7 * slow_bound(w)] * 2),
    ({"draws": K, "estimates": M, "generator_over_all": True}, slow_bound, miwae),
    (
        {"draws": K, "estimates": M, "generator_over_all": True, "elbo_share": 0.3},
        lambda w: 0.3 * w.mean(0) + 0.7 * slow_bound(w),
        lambda w: 0.3 * w.mean(0) + 0.7 * miwae(w),
    ),
]


@pytest.mark.parametrize(("settings", "of_generator", "of_inference"), BOUNDS)
def test_each_bound_and_its_gradients(model: VAE, settings: dict[str, Any], of_generator, of_inference):
    images = binary_images()
    noise = noise_of(model, settings["draws"] * settings.get("estimates", 1))
    output = objective("importance", **settings).loss(model, images, 0, noise)
    log_weights = model(images, noise=noise).log_weights
    torch.testing.assert_close(output.loss, -of_generator(log_weights).mean())
    torch.testing.assert_close(output.metrics["bound"], -output.loss.detach())
    slow = [gradients(-bound(log_weights).mean(), model) for bound in (of_inference, of_generator)]
    assert_gradients(gradients(output.loss, model), *slow)


def slow_doubly_reparameterised(model: VAE, images: Tensor, noise: Tensor, settings: dict[str, Any]) -> list[Tensor]:
    """Gradients of the negative bound at the encoder's weights: one draw of one image after the other, by Tucker et al.
    2018, equation 8."""
    groups, share = settings.get("estimates", 1), settings.get("elbo_share", 0.0)
    weights = list(model.encoder.parameters())
    log_weights = model(images, noise=noise).log_weights.detach().double()
    total = [torch.zeros_like(weight) for weight in weights]
    for b in range(len(images)):
        for k in range(len(noise)):
            others = log_weights[k % groups :: groups, b]
            squared = float((log_weights[k, b] - others.logsumexp(0)).exp() ** 2)
            factor = share / len(noise) + (1 - share) * squared / groups
            image = images[b : b + 1]
            drawn = model.posterior(image).draw(noise[k : k + 1, b : b + 1]).latents
            latents = drawn.detach().requires_grad_()
            log_joint = model.decoder.log_likelihood(latents, image) + model.prior.log_density(latents).sum(-1)
            log_weight = log_joint - model.posterior(image).log_density(latents).sum(-1)
            (at_latents,) = torch.autograd.grad(log_weight.sum(), latents)
            for place, found in enumerate(torch.autograd.grad(drawn, weights, at_latents)):
                total[place] -= factor * found / len(images)
    return total


@pytest.mark.parametrize(("settings", "of_generator", "of_inference"), BOUNDS)
def test_the_doubly_reparameterised_gradient(model: VAE, settings: dict[str, Any], of_generator, of_inference):
    images = binary_images()
    noise = noise_of(model, settings["draws"] * settings.get("estimates", 1))
    one = objective("importance", **settings, gradient="doubly_reparameterised")
    output = one.loss(model, images, 0, noise)
    log_weights = model(images, noise=noise).log_weights
    torch.testing.assert_close(output.loss, -of_generator(log_weights).mean())
    names = [name for name, _ in model.named_parameters() if name.startswith("encoder")]
    slow = dict(zip(names, slow_doubly_reparameterised(model, images, noise, settings), strict=True))
    assert_gradients(gradients(output.loss, model), slow, gradients(-of_generator(log_weights).mean(), model))


def test_both_gradients_have_one_mean_and_the_doubly_reparameterised_less_variance(model: VAE):
    images, repeats = binary_images(1), 4000
    many = images.expand(repeats, -1, -1, -1)
    noise = noise_of(model, 8, repeats)
    found = {}
    for gradient in ("reparameterised", "doubly_reparameterised"):
        # One backward pass gives each image its own gradient at its mean and log-variance: what the encoder put out.
        features: list[Tensor] = []
        hook = model.encoder.register_forward_hook(lambda m, i, out, kept=features: kept.append(out))
        loss = objective("importance", draws=8, gradient=gradient).loss(model, many, 0, noise).loss
        hook.remove()
        (found[gradient],) = torch.autograd.grad(loss * repeats, features[0])
    plain, doubly = found["reparameterised"], found["doubly_reparameterised"]
    error = (plain - doubly).std(0) / math.sqrt(repeats)
    assert ((plain - doubly).mean(0).abs() < 4 * error).all()
    assert (doubly.var(0) < plain.var(0)).all()


def test_bounds_grow_with_draws(model: VAE):
    images, most, repeats = binary_images(2), 500, 40
    with torch.no_grad():
        log_weights = model(images, draws=most * repeats).log_weights.unflatten(0, (most, repeats))
    bounds = {}
    for draws in (1, 5, 50, 500):  # of the same draws each: neighbouring bounds differ by little noise
        bounds[draws] = importance_bound(log_weights.unflatten(0, (draws, -1))).mean(0)  # repeats b
    for fewer, more in ((1, 5), (5, 50), (50, 500)):
        gain = bounds[more] - bounds[fewer]
        assert (gain >= -1e-4).all()  # the logarithm is concave: it holds for the same draws, not on average alone
        assert (gain.mean(0) > 0).all()


def test_the_bound_of_one_draw_is_the_elbo_term_by_term(model: VAE):
    terms = model(binary_images(), noise=noise_of(model, 1))
    by_draws = terms._replace(exact_kl=(None,))
    torch.testing.assert_close(importance_bound(terms.log_weights), elbo(by_draws))
    parts = terms.log_prior[0][0] - terms.log_posterior[0][0]
    torch.testing.assert_close(-by_draws.kl[0], parts)
    torch.testing.assert_close(importance_bound(terms.log_weights), terms.log_likelihood[0] + parts.sum(-1))


def test_weights_are_normalised_and_far_from_overflow():
    log_weights = torch.tensor([[-2000.0, 3000.0], [-2000.0, 2900.0]])
    torch.testing.assert_close(normalised_weights(log_weights), torch.tensor([[0.5, 1.0], [0.5, 0.0]]))
    torch.testing.assert_close(importance_bound(log_weights), torch.tensor([-2000.0, 3000.0 - math.log(2)]))
    torch.testing.assert_close(effective_draws(log_weights), torch.tensor([2.0, 1.0]))
    assert combined_bound(log_weights, elbo_share=0.5).isfinite().all()


CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "draws": ({"estimates": 2}, 12),
    "estimates": ({"draws": 12}, 2),
    "elbo_share": ({"draws": 24}, 0.5),
    "generator_over_all": ({"draws": 12, "estimates": 2}, True),
    "gradient": ({"draws": 24}, "doubly_reparameterised"),
}


@pytest.mark.parametrize("field", sorted(ImportanceConfig.__dataclass_fields__.keys() - {"kind"}))
def test_every_field_changes_the_loss_or_its_gradient(model: VAE, field: str):
    beside, value = CHANGES[field]
    found = []
    for settings in (beside, beside | {field: value}):
        one = objective("importance", **settings)
        noise = noise_of(model, one.config.draws * one.config.estimates)
        found.append(one.loss(model, binary_images(), 0, noise).loss)
    if field == "gradient":
        found = [gradients(loss, model)["encoder.layers.layers.0.weight"] for loss in found]
    assert not torch.allclose(*found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draws": 0}, "draws=0, expected at least 1"),
        ({"generator_over_all": True}, "estimates=1, expected at least 2 with generator_over_all"),
        ({"elbo_share": 1.5}, "elbo_share=1.5, expected a share"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        ImportanceConfig(**settings)
