from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.likelihoods.bernoulli import BernoulliConfig
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives.terms import elbo, total_kl
from stage1_vae.priors import VampPriorConfig
from stage1_vae.vae import VAE, VAEConfig
from tests.golden import GOLDEN


def vae(components: int = 5, **prior: str) -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(
        latents=2, encoder=DenseConfig(hidden=(6,)), prior=VampPriorConfig(components=components, **prior)
    )
    return VAE(config, (4, 3))


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 4, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_the_prior_is_the_mean_of_the_posteriors_of_its_images():
    model = vae()
    z = torch.randn(3, 4, 2)
    with torch.no_grad():
        components = model.posterior(model.prior.pseudo_inputs)
        densities = torch.stack(
            [
                torch.distributions.Normal(mean, scale).log_prob(z).sum(-1).exp()
                for mean, scale in zip(components.mean, components.scale, strict=True)
            ]
        )
        torch.testing.assert_close(model.prior.log_density(z), densities.mean(0).log()[..., None])


def test_the_prior_integrates_to_one():
    model = vae()
    axis = torch.linspace(-9, 9, 400)
    z = torch.cartesian_prod(axis, axis)[None]
    with torch.no_grad():
        density = model.prior.log_density(z).exp().sum() * (axis[1] - axis[0]) ** 2
    assert density.item() == pytest.approx(1, abs=1e-3)


def test_samples_have_the_mixtures_moments():
    model, count = vae(), 100_000
    with torch.no_grad():
        components = model.posterior(model.prior.pseudo_inputs)
        mean = components.mean.mean(0)
        second = (components.mean.square() + components.scale.square()).mean(0)
        z = model.prior.sample(count, torch.Generator().manual_seed(0))
    for found, expected in ((z, mean), (z.square(), second)):
        assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / count**0.5).all()


def test_kl_is_estimated_and_trains_the_pseudo_inputs():
    model = vae()
    terms = model(images(6), draws=7)
    assert terms.exact_kl == (None,)
    drawn = (terms.log_posterior[0].sum(-1) - terms.log_prior[0].sum(-1)).mean(0)
    torch.testing.assert_close(total_kl(terms), drawn)
    elbo(terms).mean().backward()
    assert model.prior.pseudo_inputs.grad.abs().sum() > 0


def test_one_component_that_is_the_image_has_no_divergence():
    model = vae(components=1)
    model.prior.start(images(1))
    with torch.no_grad():
        terms = model(images(1), draws=4)
    torch.testing.assert_close(total_kl(terms), torch.zeros(1), atol=1e-5, rtol=0)


def test_pseudo_inputs_start_from_training_images():
    model, few = vae(components=5), images(3)
    model.prior.start(few)
    torch.testing.assert_close(model.prior.pseudo_inputs[:3], few)
    assert 0 < (model.prior.pseudo_inputs[3:] - few[:2]).abs().max() < 0.2
    many = images(8)
    model.prior.start(many)
    torch.testing.assert_close(model.prior.pseudo_inputs, many[:5])
    noise = vae(components=5, start="random")
    before = noise.prior.pseudo_inputs.clone()
    noise.prior.start(many)
    torch.testing.assert_close(noise.prior.pseudo_inputs, before)


def test_a_copy_goes_by_its_own_posterior():
    model = vae()
    average = copy.deepcopy(model)
    z = torch.randn(1, 3, 2)
    before = average.prior.log_density(z)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(average.prior.log_density(z), before)
    assert not torch.allclose(model.prior.log_density(z), before)


def test_the_model_owns_each_weight_once(tmp_path):
    model = vae()
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if name.startswith("prior.")] == ["prior.pseudo_inputs"]
    again = load_pretrained(model.save_pretrained(tmp_path / "model"), {"vae": VAE})
    torch.testing.assert_close(
        again.prior.log_density(torch.ones(1, 1, 2)), model.prior.log_density(torch.ones(1, 1, 2))
    )


def test_no_components_are_refused():
    with pytest.raises(UserError, match="components=0"):
        VampPriorConfig(components=0)


def published(variant: str) -> tuple[VAE, dict, dict, dict]:
    """pythae's VAMP with its weights, whose images are in [0, 1] where ours are in [-1, 1]."""
    path = GOLDEN.parent / "golden_vae" / "pythae_vamp_svae.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])[variant]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    weights, hidden = part(f"weights/{variant}."), (config["hidden"],)
    model = VAE(
        VAEConfig(
            latents=config["latent_dim"],
            encoder=DenseConfig(hidden=hidden),
            decoder=DenseConfig(hidden=hidden),
            prior=VampPriorConfig(components=config["number_components"]),
            likelihood=BernoulliConfig(),
        ),
        (4, 4),
    )
    state = {
        f"{ours}.{kind}": weights[f"{theirs}.{kind}"]
        for ours, theirs in (
            ("encoder.layers.layers.0", "encoder.layers.0.0"),
            ("decoder.network.layers.layers.0", "decoder.layers.0.0"),
            ("decoder.network.layers.layers.1", "decoder.layers.1.0"),
        )
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        heads = [weights[f"encoder.{head}.{kind}"] for head in ("embedding", "log_var")]
        state[f"encoder.layers.layers.1.{kind}"] = torch.cat(heads)
    pseudo_inputs = weights["pseudo_inputs.0.weight"].T + weights["pseudo_inputs.0.bias"]  # of a row of the identity
    state["prior.pseudo_inputs"] = (pseudo_inputs * 2 - 1).view(-1, 1, 4, 4)
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not missing
    assert not unknown
    return model, part(f"in/{variant}."), part(f"out/{variant}/"), config


@pytest.mark.parametrize("variant", ["vamp", "vamp_bce"])
def test_golden_vamp(variant: str):
    model, inputs, outputs, config = published(variant)
    x, noise = inputs["x"] * 2 - 1, inputs["eps0"]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        (model.prior.pseudo_inputs.clamp(-1, 1) + 1).flatten(1) / 2, outputs["pseudo_inputs"], **close
    )
    terms = model(x, noise=noise[None])
    z = terms.latents[0][0]
    torch.testing.assert_close(z, outputs["z"], **close)
    constant = 0.5 * config["latent_dim"] * torch.tensor(2 * torch.pi).log()  # which pythae leaves out of densities
    torch.testing.assert_close(terms.log_prior[0].sum(-1)[0] + constant, outputs["log_p_z"], **close)
    kl = total_kl(terms).mean()
    torch.testing.assert_close(kl, outputs["reg_loss"], **close)
    torch.testing.assert_close((model.decode(z) + 1) / 2, outputs["recon_x"], **close)
    if variant == "vamp_bce":
        reconstruction = -terms.log_likelihood.mean()
    else:  # "mse" is half the squared error of the mean image
        reconstruction = 0.5 * ((model.decoder.mean(terms.latents[0][0]) - x) / 2).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(reconstruction, outputs["recon_loss"], **close)
    # train mode has a weight of the KL, which rises linearly over epochs; eval mode has 1
    loss = reconstruction + kl
    torch.testing.assert_close(loss, outputs["loss"], **close)
    loss.backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    heads = gradient["encoder.layers.layers.1.bias"].chunk(2)
    expected = {
        "encoder.embedding.bias": heads[0],
        "encoder.log_var.bias": heads[1],
        "decoder.layers.0.0.bias": gradient["decoder.network.layers.layers.0.bias"],
        "decoder.layers.1.0.bias": gradient["decoder.network.layers.layers.1.bias"],
        "pseudo_inputs.0.bias": 2 * gradient["prior.pseudo_inputs"].flatten(1).sum(0),
    }
    for name, found in expected.items():
        torch.testing.assert_close(found, outputs[f"grad_loss/{name}"], **close)


def test_golden_vamp_in_training():
    model, inputs, outputs, config = published("vamp")
    x = inputs["x"] * 2 - 1
    with torch.no_grad():
        terms = model(x, noise=inputs["call1.eps0"][None])
    weight = config["calls"][1]["epoch"] / config["linear_scheduling_steps"]
    reconstruction = 0.5 * ((model.decode(terms.latents[0][0]) - x) / 2).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(reconstruction + weight * total_kl(terms).mean(), outputs["call1/loss"])
