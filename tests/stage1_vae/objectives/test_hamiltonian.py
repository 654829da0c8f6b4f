from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import HamiltonianConfig
from stage1_vae.objectives.hamiltonian import Hamiltonian, Leapfrog, slope_of
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.objectives.reference import facts, objective

D = 2


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    small = DenseConfig(hidden=(7,), activation="tanh")
    made = VAE(VAEConfig(latents=D, encoder=small, decoder=small), (3, 3))
    with torch.no_grad():
        made.decoder.network.layers.layers[0].weight *= 2  # so that images tell something of latents
        made.decoder.network.layers.layers[1].weight *= 4
    return made


def binary_images(count: int = 3) -> Tensor:
    return torch.randint(0, 2, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def hamiltonian(**settings: Any) -> Hamiltonian:
    return objective("hamiltonian", facts(latent_shape=(D,)), **settings)


def energy(z: Tensor) -> Tensor:
    """log p(x, z) of a double well: k b."""
    return -(z[..., 0].square() - 1).square() - (z[..., 1] - 0.5 * z[..., 0]).square() - 0.1 * z.square().sum(-1) ** 2


def test_the_move_is_a_leapfrog_whose_volume_its_density_knows():
    """In float64: one place after the other, and the determinant of the Jacobian of place and momentum."""
    torch.manual_seed(0)
    settings = HamiltonianConfig(leapfrog_steps=4, step_size=0.2, temperature=0.4)
    move = Leapfrog(settings, (D,)).double()
    torch.nn.init.normal_(move.log_step_size, math.log(0.2), 0.3)
    start, noise = torch.randn(2, D, dtype=torch.float64)
    log_posterior = torch.randn(1, 1, D, dtype=torch.float64)
    size, beta = move.log_step_size.detach().exp(), 0.4

    def slow(place: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        def inverse_root(k: int) -> float:
            return 1 / math.sqrt(beta) + (1 - 1 / math.sqrt(beta)) * k**2 / 16

        for k in range(1, 5):
            momentum = momentum + size / 2 * torch.func.jacrev(energy)(place)
            place = place + size * momentum
            momentum = momentum + size / 2 * torch.func.jacrev(energy)(place)
            momentum = momentum * inverse_root(k) / inverse_root(k - 1)
        return place, momentum

    move.momentum = lambda latents: noise.view(1, 1, D)
    place, moved_posterior = move(start.view(1, 1, D), log_posterior, energy)
    first = noise / math.sqrt(beta)
    expected, momentum = slow(start, first)
    torch.testing.assert_close(place[0, 0], expected, rtol=1e-6, atol=1e-6)
    blocks = torch.func.jacrev(slow, argnums=(0, 1))(start, first)
    jacobian = torch.cat([torch.cat(row, dim=1) for row in blocks])
    volume = torch.linalg.slogdet(jacobian).logabsdet
    assert volume.item() == pytest.approx(D / 2 * math.log(beta), abs=1e-9)
    standard = torch.distributions.Normal(0.0, 1.0)
    cool = torch.distributions.Normal(0.0, 1 / math.sqrt(beta))
    # log q(z_0) log N(r_0; 0, I / beta_0) over the volume, and over N(r_K; 0, I), which the prior of momenta is
    density = log_posterior.sum() + cool.log_prob(first).sum() - volume - standard.log_prob(momentum).sum()
    torch.testing.assert_close(moved_posterior.sum(), density.detach(), rtol=1e-6, atol=1e-6)


def exact_log_likelihood(model: VAE, images: Tensor) -> Tensor:
    """b, by a grid over the two latents."""
    line = torch.linspace(-7, 7, 281)
    grid = torch.cartesian_prod(line, line).unsqueeze(1).expand(-1, len(images), -1)
    with torch.no_grad():
        joint = model.decoder.log_likelihood(grid, images) + model.prior.log_density(grid).sum(-1)
    return joint.logsumexp(0) + 2 * math.log(line[1] - line[0])


def test_weights_of_moved_draws_are_unbiased_and_their_bound_is_better(model: VAE):
    images, draws = binary_images(), 20_000
    exact = exact_log_likelihood(model, images)
    one = hamiltonian(leapfrog_steps=4, step_size=0.3, temperature=0.6)
    torch.manual_seed(3)
    with torch.no_grad():
        still, moved = (model(images, draws, move=move).log_weights for move in (None, one.leapfrog))
    for log_weights in (still, moved):
        ratio = (log_weights - exact).exp()
        assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(draws)).all()
        assert (log_weights.mean(0) < exact).all()
    assert (moved.mean(0) > still.mean(0) + 0.1).all()
    assert one.loss(model, images, 0).loss.requires_grad


def test_the_gradient_is_that_of_the_bound(model: VAE):
    """By differences, at every weight of the leapfrog and at some of the model, in float32 through double gradients."""
    images, noise = binary_images(), torch.randn(1, 3, D)
    one = hamiltonian(leapfrog_steps=2, step_size=0.2)
    momentum = torch.randn(1, 3, D)
    one.leapfrog.momentum = lambda latents: momentum
    weights = [one.leapfrog.log_step_size, one.leapfrog.root_logit]
    weights += [model.decoder.network.layers.layers[0].bias, model.encoder.layers.layers[1].bias]
    gradients = torch.autograd.grad(one.loss(model, images, 0, noise).loss, weights)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    for weight, gradient in zip(weights, gradients, strict=True):
        flat = weight.data.view(-1)
        for place in range(len(flat)):
            before, sides = flat[place].item(), []
            for shift in (1e-2, -1e-2):
                flat[place] = before + shift
                sides.append(one.loss(model, images, 0, noise).loss.item())
            flat[place] = before
            assert gradient.view(-1)[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=0.02, abs=2e-3)


def test_slopes_are_known_without_gradients_too():
    z = torch.randn(3, 2, D)
    with torch.no_grad():
        slope = slope_of(energy, z)
    assert not slope.requires_grad
    assert not z.requires_grad
    torch.testing.assert_close(slope, slope_of(energy, z.clone().requires_grad_()).detach())


def test_what_learns_is_a_companion(model: VAE):
    leapfrog = hamiltonian(learning_rate=0.02).companions["leapfrog"]
    settings, schedule = leapfrog.optimizer, leapfrog.schedule
    assert settings is not None
    assert schedule is not None
    assert schedule(5) == 0.02
    hamiltonian_loss = hamiltonian(learned=False)
    assert hamiltonian_loss.companions["leapfrog"].optimizer is None
    loss = hamiltonian_loss.loss(model, binary_images(), 0).loss
    loss.backward()
    assert all(weight.grad is None for weight in hamiltonian_loss.leapfrog.parameters())


CHANGES: dict[str, Any] = {"draws": 4, "leapfrog_steps": 5, "step_size": 0.2, "temperature": 0.6}


@pytest.mark.parametrize("field", sorted(HamiltonianConfig.__dataclass_fields__.keys() - {"kind"}))
def test_every_field_changes_the_loss_or_what_learns(model: VAE, field: str):
    if field in ("learned", "learning_rate"):
        return  # test_what_learns_is_a_companion
    found = []
    for settings in ({}, {field: CHANGES[field]}):
        torch.manual_seed(3)
        found.append(hamiltonian(**settings).loss(model, binary_images(), 0).loss)
    assert not torch.isclose(*found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"leapfrog_steps": 0}, "leapfrog_steps=0, expected at least 1"),
        ({"temperature": 1.0}, r"temperature=1\.0, expected between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        HamiltonianConfig(**settings)
