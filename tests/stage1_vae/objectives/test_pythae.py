"""Losses and gradients of pythae through the public objectives. Where they say something else, the test says so."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage1_vae.networks.dense import DenseConfig, DenseLayers
from stage1_vae.objectives.adversarial import DiscriminatorConfig
from stage1_vae.objectives.hamiltonian import slope_of
from stage1_vae.objectives.importance import combined_bound, importance_bound, normalised_weights
from stage1_vae.objectives.information import mmd
from stage1_vae.objectives.terms import elbo, sampled_kl
from stage1_vae.objectives.total_correlation import kl_parts, telling_loss
from stage1_vae.posteriors import DiagonalGaussianConfig, DiagonalGaussianLayer
from stage1_vae.vae import VAE
from tests.stage1_vae.objectives.pythae import (
    Reference,
    assert_gradients,
    draws_of,
    images_of,
    model_of,
    reference,
)
from tests.stage1_vae.objectives.reference import facts, objective


def assert_encoder_and_decoder(found: Reference, model: VAE, latents: Tensor) -> None:
    """latents: k b d; theirs and what they decode to are of each image's first draw."""
    posterior = model.posterior(images_of(found))
    found.assert_close(posterior.mean, "enc/embedding")
    if "enc/log_covariance" in found.outputs:
        found.assert_close(2 * posterior.log_scale, "enc/log_covariance")
    found.assert_close(latents[0], "z")
    found.assert_close((model.decoder.mean(latents[0]) + 1) / 2, "recon_x")


@pytest.mark.parametrize("variant", ["vae_mse", "vae_bce", "beta_mse", "beta_bce", "disentangled"])
def test_vae_beta_vae_and_capacity(variant: str):
    found = reference("pythae_vae", variant)
    model, images, config = model_of(found), images_of(found), found.config
    settings = {"beta": config.get("beta", 1.0)}
    if variant == "disentangled":  # their C grows by epochs, and without an epoch is that of the last but one
        settings |= {"capacity": config["C"], "capacity_steps": config["warmup_epoch"] + 1}
    calls = config.get("calls", [{}])
    for number, call in enumerate(calls):
        noise = draws_of(found.inputs[f"call{number}.eps0" if number else "eps0"])
        step = call.get("epoch", config.get("warmup_epoch", 0))
        loss, metrics, *_ = objective("elbo", **settings).loss(model, images, step, noise)
        prefix = f"call{number}/" if number else ""
        found.assert_close(loss, f"{prefix}loss")
        found.assert_close(-metrics["log_likelihood"], f"{prefix}recon_loss")
        if variant != "disentangled":
            found.assert_close(metrics["kl"], f"{prefix}reg_loss")
        if not number:
            assert_gradients(found, model, loss)
            assert_encoder_and_decoder(found, model, model(images, noise=noise).latents[0])


@pytest.mark.parametrize("variant", ["info_imq", "info_rbf", "info_scales", "wae_imq", "wae_rbf"])
def test_infovae_and_wae(variant: str, monkeypatch: pytest.MonkeyPatch):
    found = reference("pythae_mmd", variant)
    config, wae = found.config, variant.startswith("wae")
    # Their WAE has a squared error of any factor, without the half.
    model, images = model_of(found, config.get("reconstruction_loss_scale", 1.0) if wae else None), images_of(found)
    settings = {
        "kernel": config["kernel_choice"],
        "bandwidth": config.get("kernel_bandwidth", 1.0),
        "alpha": 1.0 if wae else config["alpha"],
        "discrepancy_weight": config["reg_weight"] if wae else config["lbd"],
        "deterministic": wae,
        **({"scales": tuple(config["scales"])} if config.get("scales") else {}),
    }
    noise = None if wae else draws_of(found.inputs["eps0"])
    prior = found.inputs["eps0" if wae else "eps1"]
    monkeypatch.setattr(model.prior, "sample", lambda count: prior)
    one = objective("info", **settings)
    loss, metrics, *_ = one.loss(model, images, 0, noise)
    found.assert_close(loss, "loss")
    found.assert_close(metrics["mmd"], "mmd_loss")
    found.assert_close(-metrics["log_likelihood"], "recon_loss")
    if not wae:
        found.assert_close(metrics["kl"], "reg_loss")
    assert_gradients(found, model, loss)
    latents = model(images, draws=0).latents[0] if wae else model(images, noise=noise).latents[0]
    assert_encoder_and_decoder(found, model, latents)
    found.assert_close(
        mmd(found.outputs["z"], prior, one.config.kernel, one.config.bandwidth, one.config.scales), "mmd_loss"
    )


@pytest.mark.parametrize("variant", ["iwae", "iwae_bce", "miwae", "ciwae", "piwae"])
def test_importance_weighted(variant: str):
    """Their losses are surrogates whose gradient alone is the bound's: sum of normalised weights times log weights.
    MIWAE and PIWAE average over number_samples bounds of number_gradient_estimates draws: the names are exchanged."""
    found = reference("pythae_iwae", variant)
    model, images, config = model_of(found), images_of(found), found.config
    noise = draws_of(found.inputs["eps0"])
    several = "number_gradient_estimates" in config
    settings = {
        "draws": config["number_gradient_estimates"] if several else config["number_samples"],
        "estimates": config["number_samples"] if several else 1,
        "elbo_share": config.get("beta", 0.0),
        "generator_over_all": variant == "piwae",
    }
    loss = objective("importance", **settings).loss(model, images, 0, noise).loss
    terms = model(images, noise=noise)
    log_weights, estimates, share = terms.log_weights, settings["estimates"], settings["elbo_share"]

    def surrogate(groups: int) -> Tensor:
        parts = log_weights.unflatten(0, (-1, groups))
        weighted = (normalised_weights(parts).detach() * parts).sum(0).mean(0)
        return -(weighted if not share else share * log_weights.mean(0) + (1 - share) * weighted).mean()

    if variant != "piwae":
        assert_gradients(found, model, loss)
        found.assert_close(surrogate(estimates), "loss")
    else:
        found.assert_close(surrogate(estimates), "encoder_loss")
        found.assert_close(surrogate(1), "decoder_loss")
        assert_gradients(found, model, -combined_bound(log_weights, estimates).mean(), "encoder_loss")
        assert_gradients(found, model, -importance_bound(log_weights).mean(), "decoder_loss")
        names = [name for name, _ in model.named_parameters()]
        ours = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        latents = config["latent_dim"]
        found.assert_close(ours["decoder.network.layers.layers.1.bias"], "grad_decoder_loss/decoder.layers.1.0.bias")
        found.assert_close(ours["decoder.network.layers.layers.0.bias"], "grad_decoder_loss/decoder.layers.0.0.bias")
        head = ours["encoder.layers.layers.1.bias"]
        found.assert_close(head[:latents], "grad_encoder_loss/encoder.embedding.bias")
        found.assert_close(head[latents:], "grad_encoder_loss/encoder.log_var.bias")
    of_draws = -terms.log_likelihood.mean(1)  # theirs are of each draw, or, of IWAE, their mean
    shape = found.outputs["recon_loss"].shape
    found.assert_close(of_draws.reshape(shape) if shape else of_draws.mean(), "recon_loss")
    kl = sampled_kl(terms.log_prior[0], terms.log_posterior[0]).sum(-1).mean()
    torch.testing.assert_close(kl, found.outputs["reg_loss"].mean(), rtol=1e-5, atol=1e-5)
    assert_encoder_and_decoder(found, model, terms.latents[0])


def copy_layers(network: DenseLayers, found: Reference, names: list[str]) -> None:
    for layer, name in zip(network.layers, names, strict=True):
        layer.weight.data.copy_(found.weights[f"discriminator.{name}.weight"])
        layer.bias.data.copy_(found.weights[f"discriminator.{name}.bias"])


def assert_discriminator_gradients(found: Reference, network: DenseLayers, loss: Tensor, names: list[str]) -> None:
    biases = [layer.bias for layer in network.layers]
    for name, gradient in zip(names, torch.autograd.grad(loss, biases, retain_graph=True), strict=True):
        found.assert_close(gradient, f"grad_discriminator_loss/{name}.bias")


@pytest.mark.parametrize("variant", ["aae", "aae_det"])
def test_adversarial_autoencoder(variant: str, monkeypatch: pytest.MonkeyPatch):
    found = reference("pythae_adversarial", variant)
    config, deterministic = found.config, variant == "aae_det"
    model, images = model_of(found, config.get("reconstruction_loss_scale")), images_of(found)
    one = objective(
        "adversarial",
        facts(latent_shape=model.shape),
        weight=config["adversarial_loss_scale"],
        deterministic=deterministic,
        discriminator=DiscriminatorConfig(network=DenseConfig(hidden=(config["hidden"],))),
    )
    network = one.companions["discriminator"].module
    copy_layers(network, found, ["layers.0.0", "layers.1.0"])
    monkeypatch.setattr(model.prior, "sample", lambda count: found.inputs["eps1"])
    noise = draws_of(found.inputs["eps0"])
    output = one.loss(model, images, 0, noise)
    found.assert_close(output.loss, "autoencoder_loss")
    found.assert_close(output.companion_losses["discriminator"], "discriminator_loss")
    found.assert_close(output.loss + output.companion_losses["discriminator"], "loss")  # they report the sum
    assert_gradients(found, model, output.loss, "autoencoder_loss")
    left = torch.autograd.grad(output.loss, list(network.parameters()), retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in left)  # theirs has one there, which their optimiser does not use
    names = ["discriminator.layers.0.0", "discriminator.layers.1.0"]
    assert_discriminator_gradients(found, network, output.companion_losses["discriminator"], names)
    latents = (model(images, draws=0) if deterministic else model(images, noise=noise)).latents[0]
    found.assert_close(network(latents[0]).sigmoid(), "disc_z")
    assert_encoder_and_decoder(found, model, latents)


def columns_for_diagonals(batch: int, images: int) -> Tensor:
    """Their stratified weights, as those of the paper's code, stand in two columns in place of two diagonals."""
    others = batch - 1
    weights = torch.full((batch, batch), 1 / others)
    weights[:, 0] = 1 / images
    weights[:, 1] = weights[others - 1, 0] = (images - others) / (images * others)
    return weights.log()


@pytest.mark.parametrize("variant", ["mss", "mws"])
def test_beta_tc_vae(variant: str):
    found = reference("pythae_tc", variant)
    model, images, config = model_of(found), images_of(found), found.config
    settings = {name: config[name] for name in ("alpha", "beta", "gamma")}
    for number, call in enumerate(config["calls"]):
        prefix = f"call{number}/" if number else ""
        noise = draws_of(found.inputs[f"call{number}.eps0" if number else "eps0"])
        size = call["dataset_size"]
        if variant == "mws":
            one = objective("beta_tc", facts(images=size), sampling="weighted", **settings)
            loss = one.loss(model, images, 0, noise).loss
        else:
            parts = kl_parts(terms := model(images, noise=noise), columns_for_diagonals(len(images), size))
            kl = sum(weight * part for weight, part in zip(settings.values(), parts, strict=True))
            found.assert_close(kl, f"{prefix}reg_loss")
            loss = kl - terms.log_likelihood.mean()
        found.assert_close(loss, f"{prefix}loss")
        if not number:
            assert_gradients(found, model, loss)
            assert_encoder_and_decoder(found, model, model(images, noise=noise).latents[0])


def test_factor_vae():
    """Theirs codes and reconstructs one half of a permuted batch alone, and permutes the other; ours codes both."""
    found = reference("pythae_adversarial", "factor")
    model, config = model_of(found), found.config
    order, half = found.inputs["perm0"], len(found.inputs["x"]) // 2
    images, others = (images_of(found)[part] for part in (order[half:], order[:half]))
    assert order[half:].tolist() == found.outputs["recon_x_indices"].tolist()
    hidden = found.weights["discriminator.layers.0.bias"].shape[0]
    discriminator = DiscriminatorConfig(network=DenseConfig(hidden=(hidden,) * 5, activation="leaky_relu"))
    one = objective("factor", facts(latent_shape=model.shape), gamma=config["gamma"], discriminator=discriminator)
    network = one.companions["discriminator"].module
    names = [f"layers.{number}" for number in range(0, 12, 2)]
    copy_layers(network, found, names)
    noise = draws_of(found.inputs["eps0"])
    output = one.loss(model, images, 0, noise)
    found.assert_close(output.loss, "autoencoder_loss")
    assert_gradients(found, model, output.loss, "autoencoder_loss")
    permuted = model(others, noise=draws_of(found.inputs["eps1"])).latents[0][0].detach()
    permuted = torch.stack([permuted[found.inputs[f"perm{1 + j}"], j] for j in range(permuted.shape[1])], dim=1)
    found.assert_close(permuted, "z_bis_permuted")
    latents = model(images, noise=noise).latents[0]
    found.assert_close(network(latents[0]), "disc_z")
    own = telling_loss(network(latents[0].detach()), network(permuted))
    found.assert_close(own, "discriminator_loss")
    assert_discriminator_gradients(found, network, own, [f"discriminator.{name}" for name in names])
    found.assert_close((model.decoder.mean(latents[0]) + 1) / 2, "recon_x")


@pytest.mark.parametrize("variant", ["hvae", "hvae_learn"])
def test_hamiltonian_vae(variant: str):
    """Their leapfrog is none: it moves places by the momentum before the half step, and forgets to cool it. Their scale
    is softplus(s), while s enters log q(z_0|x) as a log-variance, without the noise's density and that of the momentum.
    Gradients do not pass through the slope of the likelihood, and do through that of the prior.
    So the move is theirs here, of our parts; test_hamiltonian.py holds ours against what it must be."""
    found = reference("pythae_hvae", variant)
    model, images, config = model_of(found), images_of(found), found.config
    model.posterior_layer = DiagonalGaussianLayer(DiagonalGaussianConfig(scale="softplus"), model.shape)
    size, root = (found.weights[name].requires_grad_() for name in ("eps_lf", "beta_zero_sqrt"))
    raw = model.encoder(images_of(found))[:, config["latent_dim"] :]

    def slope(log_joint: Callable[[Tensor], Tensor], place: Tensor) -> Tensor:
        return slope_of(log_joint, place).detach() + place.detach() - place

    def theirs(latents: Tensor, log_posterior: Tensor, log_joint: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        found.assert_close(latents[0], "z0")
        place, momentum = latents, found.inputs["eps1"] / root
        for _ in range(config["n_lf"]):
            halfway = momentum + 0.5 * size * slope(log_joint, place)
            place = place + size * momentum
            momentum = halfway + 0.5 * size * slope(log_joint, place)
        found.assert_close(momentum[0], "rho")
        constant = 0.5 * math.log(2 * math.pi)  # of log p(z), which they leave out
        return place, 0.5 * momentum.square() - 0.5 * raw - constant

    terms = model(images, noise=draws_of(found.inputs["eps0"]), move=theirs)
    loss = -elbo(terms).mean()
    found.assert_close(loss, "loss")
    found.assert_close(terms.latents[0][0], "z")
    found.assert_close((model.decoder.mean(terms.latents[0][0]) + 1) / 2, "recon_x")
    assert_gradients(found, model, loss)
    for weight, name in ((size, "eps_lf"), (root, "beta_zero_sqrt")):
        if f"grad_loss/{name}" in found.outputs:
            found.assert_close(torch.autograd.grad(loss, weight, retain_graph=True)[0], f"grad_loss/{name}")
