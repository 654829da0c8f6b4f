from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import AdversarialAutoencoderConfig, ObjectiveOutput
from stage1_vae.objectives.adversarial import AdversarialAutoencoder, DiscriminatorConfig, discriminator_loss
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.objectives.reference import facts, objective


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    small = DenseConfig(hidden=(7,))
    return VAE(VAEConfig(latents=2, encoder=small, decoder=small), (3, 3))


def binary_images(count: int = 6) -> Tensor:
    return torch.randint(0, 2, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def adversarial(**settings: Any) -> AdversarialAutoencoder:
    torch.manual_seed(4)
    return objective("adversarial", facts(latent_shape=(2,)), **settings)


def output_of(one: AdversarialAutoencoder, model: VAE) -> ObjectiveOutput:
    torch.manual_seed(3)
    return one.loss(model, binary_images(), 0)


def test_both_losses_are_cross_entropies_and_each_network_learns_by_its_own(model: VAE):
    one = adversarial(weight=0.7)
    network = one.companions["discriminator"].module
    output = output_of(one, model)
    torch.manual_seed(3)
    terms = model(binary_images())
    prior = model.prior.sample(6)
    scores = {
        name: [1 / (1 + math.exp(-logit)) for logit in network(z).flatten().tolist()]
        for name, z in {"prior": prior, "latents": terms.latents[0][0]}.items()
    }
    deceiving = -sum(math.log(score) for score in scores["latents"]) / 6
    telling = -sum(math.log(score) for score in scores["prior"]) / 6
    telling -= sum(math.log(1 - score) for score in scores["latents"]) / 6
    assert output.loss.item() == pytest.approx(-terms.log_likelihood.mean().item() + 0.7 * deceiving, rel=1e-5)
    assert output.companion_losses["discriminator"].item() == pytest.approx(telling, rel=1e-5)
    for loss, mine, others in (
        (output.loss, model, network),
        (output.companion_losses["discriminator"], network, model),
    ):
        found = torch.autograd.grad(loss, list(mine.parameters()), retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
        found = torch.autograd.grad(loss, list(others.parameters()), retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in found)
    # The encoder's: of the reference with the discriminator as a function of nothing but z.
    slow = -terms.log_likelihood.mean() + 0.7 * torch.nn.functional.binary_cross_entropy_with_logits(
        network(terms.latents[0][0]), torch.ones(6, 1)
    )
    weights = list(model.parameters())
    for found, expected in zip(
        torch.autograd.grad(output.loss, weights), torch.autograd.grad(slow, weights), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_perfect_balance_costs_two_bits():
    assert discriminator_loss(torch.zeros(5), torch.zeros(5)).item() == pytest.approx(2 * math.log(2))


def test_the_aggregated_posterior_nears_the_prior(model: VAE):
    one = adversarial(weight=5.0, discriminator=DiscriminatorConfig(network=DenseConfig(hidden=(32,))))
    network = one.companions["discriminator"].module
    with torch.no_grad():
        model.encoder.layers.layers[-1].bias[:2] += 3.0  # far from the prior
    assert (model.encode(binary_images(64)).mean(0) > 2).all()
    optimizers = [torch.optim.Adam(module.parameters(), lr=5e-3, betas=(0.5, 0.9)) for module in (model, network)]
    means = []
    for step in range(400):
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = one.loss(model, binary_images(64), step)
        for loss in (*output.companion_losses.values(), output.loss):
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        means.append(model.encode(binary_images(64)).detach().mean(0))
    assert (torch.stack(means[200:]).mean(0).abs() < 0.5).all()  # they go round the equilibrium


CHANGES: dict[str, Any] = {
    "draws": 3,
    "weight": 5.0,
    "deterministic": True,
    "discriminator": DiscriminatorConfig(network=DenseConfig(hidden=(5,))),
}


@pytest.mark.parametrize("field", sorted(AdversarialAutoencoderConfig.__dataclass_fields__.keys() - {"kind"}))
def test_every_field_changes_the_loss(model: VAE, field: str):
    before, after = (output_of(adversarial(**settings), model).loss for settings in ({}, {field: CHANGES[field]}))
    assert not torch.isclose(before, after)


def test_the_discriminators_optimiser_is_as_configured():
    companion = adversarial(discriminator=DiscriminatorConfig(learning_rate=0.02, betas=[0.5, 0.9])).companions
    settings, schedule = companion["discriminator"].optimizer, companion["discriminator"].schedule
    assert settings is not None
    assert schedule is not None
    assert (settings.betas, schedule(7)) == ((0.5, 0.9), 0.02)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": 0.0}, "weight=0.0, expected above 0"),
        ({"draws": 2, "deterministic": True}, "draws=2, expected 1 beside deterministic=true"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        AdversarialAutoencoderConfig(**settings)
